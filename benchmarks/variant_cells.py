"""One cell of the comparison: a crosscoder trained to the study's number of active latents, and its marks."""

import math
import time
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor
from variant_grid import Study, Variant

from tl_crosscoder.analysis.marks import marks
from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.dictionary.difference import difference
from tl_crosscoder.dictionary.synthetic import SyntheticPair
from tl_crosscoder.training.config import TrainConfig
from tl_crosscoder.training.train import train

#: How far the number of active latents may be from what is asked for, on the tokens that the search looks at.
TOLERANCE = 0.04
MAX_TRAININGS = 8
#: Tokens of a pair that a training sees at most; a longer one sees them again.
POOL = 500_000

Result = TypeVar("Result")


def cell(study: Study, variant: Variant, seed: int, weight: float | None) -> dict[str, Any]:
    """The marks of one training, the last of those that the search for the weight took; ``weight``: where to start."""
    began = time.process_time()
    study = replace(study, **variant.changes, pair=replace(study.pair, seed=seed))
    trained = lambda weight: train_once(study, variant, weight, seed)
    trainings = 1
    if variant.weight is None:
        crosscoder = trained(0.0)
    else:
        l0 = lambda crosscoder: active_latents(study, crosscoder)
        crosscoder, weight, trainings = at_equal_l0(trained, l0, study.l0, weight or variant.weight)
    row: dict[str, Any] = {"seed": seed, "weight": weight, "trainings": trainings}
    row |= marks(study.pair, crosscoder, study.n_judged)
    return row | {"seconds": round(time.process_time() - began, 1)}


@lru_cache(maxsize=1)
def pool(pair: SyntheticPair, batch_size: int, seed: int, n: int) -> list[Tensor]:
    """The batches of a training; the last ones asked for are kept for the next variant."""
    return list(pair.batches(batch_size, seed, n))


def train_once(study: Study, variant: Variant, weight: float, seed: int) -> Crosscoder:
    crosscoder, losses = variant.build(study, weight, seed)
    n = min(study.steps, POOL // study.batch_size)
    batches = pool(study.pair, study.batch_size, seed, n)
    config = TrainConfig(steps=study.steps, lr=study.lr, warmup_steps=study.steps // 20, progress=False)
    history = train(crosscoder, batches if variant.n_models == 2 else difference(batches), losses, config)
    if history.interrupted:  # a half-trained one is no cell
        raise KeyboardInterrupt
    return crosscoder


def at_equal_l0(
    make: Callable[[float], Result], l0: Callable[[Result], float], target: float, weight: float
) -> tuple[Result, float, int]:
    """What ``make(weight)`` gives for a weight that brings its ``l0`` near the target, the weight, and how many were tried.

    Near: within TOLERANCE; after MAX_TRAININGS the nearest one.  ``l0`` falls with the weight: guesses go along a straight line in
    logarithms until the target lies between two of them, then half way between that line and the middle.
    """
    tried: list[tuple[float, float, Result]] = []
    while True:
        made = make(weight)
        tried.append((math.log(weight), math.log(max(l0(made), 1e-3) / target), made))
        nearest = min(tried, key=lambda each: abs(each[1]))
        if abs(nearest[1]) <= math.log(1 + TOLERANCE) or len(tried) == MAX_TRAININGS:
            return nearest[2], math.exp(nearest[0]), len(tried)
        weight = math.exp(_next_guess([each[:2] for each in tried]))


def _next_guess(tried: list[tuple[float, float]]) -> float:
    """The next log weight, given those tried and how far their L0 was off, in logarithms."""
    above = max((each for each in tried if each[1] > 0), default=None)
    below = min((each for each in tried if each[1] < 0), default=None)
    if above and below:
        line = above[0] + (below[0] - above[0]) * above[1] / (above[1] - below[1])
        return (line + (above[0] + below[0]) / 2) / 2
    at, miss = min(tried, key=lambda each: abs(each[1]))
    return at + min(2.0, max(-2.0, miss / 0.5))


@torch.no_grad()
def active_latents(study: Study, crosscoder: Crosscoder, n: int = 10_000) -> float:
    """Mean active latents per token of fresh activations."""
    return crosscoder.encode_sparse(study.pair.sample(n, seed=5).x).l0
