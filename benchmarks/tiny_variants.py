"""Variants on the tiny language-model pair: how much of its planted behaviours do the highest-ranked latents carry?"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import tl_crosscoder as tlc
from tl_crosscoder.data import data_path
from tl_crosscoder.demo import RECIPES, demo_corpus
from tl_crosscoder.dictionary.init import Init
from tl_crosscoder.dictionary.losses import MSE, AuxK, Delta, Loss
from tl_crosscoder.dictionary.normalizer import Normalizer
from tl_crosscoder.dictionary.sparsity import BatchTopK, Sparsity, Split
from tl_crosscoder.models.activations import PairedActivations
from tl_crosscoder.models.capture import capture
from tl_crosscoder.models.corpus import Corpus
from tl_crosscoder.studies.behaviour import tuned_answers
from tl_crosscoder.training.config import TrainConfig
from tl_crosscoder.training.train import train


@dataclass(frozen=True)
class Training:
    """What all variants get; k and d_sae unless they say otherwise."""

    d_sae: int = 1024
    k: int = 16
    steps: int = 780
    batch_size: int = 512
    lr: float = 3e-3
    decay_fraction: float = 0.3
    init_norm: float = 0.5
    held_out: float = 0.1


RECIPE = RECIPES["tiny"]
TRAINING = Training()
SHARED, K_REST = 0.8, 2
RANKINGS = ("difference_share", "difference_peak")
Parts = tuple[Sparsity, list[Loss], bool | float, int]


def batch_topk(same: bool | float, k: int = TRAINING.k, d_sae: int = TRAINING.d_sae) -> Callable[[], Parts]:
    return lambda: (BatchTopK(k), [], same, d_sae)


def delta(weight: float, same: bool | float = SHARED) -> Callable[[], Parts]:
    sparsity = lambda: Split(SHARED, BatchTopK(TRAINING.k - K_REST), BatchTopK(K_REST))
    return lambda: (sparsity(), [Delta(weight, SHARED)], same, TRAINING.d_sae)


TINY = {
    "BatchTopK, same": batch_topk(True),
    "BatchTopK, same on 80 %": batch_topk(SHARED),
    "BatchTopK, apart": batch_topk(False),
    "Delta 0, same": delta(0.0, True),
    "Delta 1, same": delta(1.0, True),
    "Delta 0, same on 80 %": delta(0.0),
    "Delta 1, same on 80 %": delta(1.0),
    "BatchTopK, same, d_sae 2048": batch_topk(True, d_sae=2048),
    "BatchTopK, same, k 8": batch_topk(True, k=8),
    "BatchTopK, same, k 32": batch_topk(True, k=32),
}


@cache
def captured(folder: Path) -> tuple[tlc.ModelPair, PairedActivations, dict[str, Corpus]]:
    """The pair, what was captured of it (once, into ``folder``), and the tuned model's answers to each held-out prompt."""
    planted = RECIPE.planted
    adapter = data_path(planted.adapter)
    pair = tlc.ModelPair.load(RECIPE.base(), adapter=adapter, hook=planted.hook, merged=True)
    if not (folder / "manifest.json").exists():
        corpus = demo_corpus(pair, RECIPE, seed=0)
        capture(pair, corpus, folder, drop=RECIPE.drop, max_tokens=RECIPE.max_tokens, progress=False)
    texts = {b.name: tuned_answers(pair, b, RECIPE.max_new_tokens) for b in planted.behaviours}
    return pair, PairedActivations.open(folder), texts


def tiny_cell(variant: str, seed: int, folder: Path) -> dict[str, Any]:
    """A crosscoder's figures on held-out text, and the share of the KL that its top latents win back on each behaviour."""
    pair, store, texts = captured(folder)
    began = time.process_time()
    seen, held_out = store.split(1 - TRAINING.held_out, seed)
    sparsity, losses, same, d_sae = TINY[variant]()
    crosscoder = tlc.Crosscoder(
        store.d_in,
        d_sae,
        sparsity,
        normalizer=Normalizer.fit(seen),
        init=Init(norm=TRAINING.init_norm, same=same, seed=seed),
    )
    config = TrainConfig(
        steps=TRAINING.steps, lr=TRAINING.lr, decay_fraction=TRAINING.decay_fraction, progress=False
    )
    losses = [MSE(), AuxK(dead_after_tokens=max(10_000, len(seen) // 10)), *losses]
    history = train(crosscoder, seen.shuffled(TRAINING.batch_size, seed), losses, config)
    if history.interrupted:  # a half-trained one is no cell
        raise KeyboardInterrupt
    table = tlc.latent_table(crosscoder, held_out)
    metrics = table.attrs["metrics"]
    row = {"seed": seed} | {name: metrics[name] for name in ("l0", "fve", "fve_difference")}
    row |= {
        "dead": metrics["dead_fraction"],
        "largest_delta_norm": table.loc[table["n_fired"] > 0, "delta_norm"].max(),
    }
    for ranking in RANKINGS:
        for behaviour, text in texts.items():
            asking = {"ranking": ranking, "top": (10, 30), "n_random": 1, "n_bootstrap": 20, "seed": seed}
            result = tlc.substitution(
                crosscoder, pair, text, table, drop=RECIPE.drop, max_tokens=RECIPE.max_tokens, **asking
            )
            recovered = result.table.query("tokens == 'all'").set_index("condition")["recovered"]
            row |= {f"{behaviour}, {ranking} {n}": recovered[f"top {n} ranked"] for n in (10, 30)}
            row[f"{behaviour}, all"] = recovered["all"]
    return row | {"seconds": round(time.process_time() - began, 1)}
