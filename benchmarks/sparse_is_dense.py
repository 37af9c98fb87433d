"""Does the sparse step pay with quality?  One training of a run's activations by it, and one by dense torch alone.

    python benchmarks/sparse_is_dense.py runs/demo [--steps 780] [--json]

Same data, order, start and losses.  The dense training writes every pre-activation, activation and gradient out, cuts the gradient
by torch's ``clip_grad_norm_`` and steps by ``torch.optim.Adam``.  In float64 the two must stay together to rounding; in float32
rounding grows over the steps as it does between any two machines, and what counts is how good the crosscoders are."""

import argparse
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from jaxtyping import Float
from torch import Tensor

import tl_crosscoder as tlc
from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.dictionary.losses import Loss, Progress
from tl_crosscoder.dictionary.shard import WHOLE
from tl_crosscoder.diffing.config import DiffConfig
from tl_crosscoder.diffing.run import plain
from tl_crosscoder.models.activations import PairedActivations
from tl_crosscoder.training.config import TrainConfig
from tl_crosscoder.training.dead import FiringRecord
from tl_crosscoder.training.train import start_bias, train, training

DTYPES = {"float64": torch.float64, "float32": torch.float32}


def train_densely(
    crosscoder: Crosscoder, batches: Iterable[Tensor], losses: Sequence[Loss], config: TrainConfig
) -> None:
    """What ``train`` does, with nothing of its sparse step."""
    adam, tokens = torch.optim.Adam(crosscoder.parameters()), 0
    firing = FiringRecord(crosscoder.d_sae, crosscoder.W_dec.device)
    epochs = chain.from_iterable(repeat(batches))
    with patch("tl_crosscoder.dictionary.crosscoder.MAX_DENSITY", 0.0), training(crosscoder):
        for step, x in enumerate(islice(epochs, config.steps)):
            if step == 0:
                start_bias(crosscoder, x, config)
            crosscoder.sparsity.advance(step, config.steps)
            out = crosscoder(x)
            progress = Progress(step, config.steps, tokens, firing.tokens_since_fired)
            total = torch.stack([loss(x, out, crosscoder, progress) for loss in losses]).sum()
            adam.zero_grad()
            total.backward()
            torch.nn.utils.clip_grad_norm_(crosscoder.parameters(), config.clip)
            adam.param_groups[0]["lr"] = config.lr_at(step)
            adam.step()
            firing.update(out.codes)
            tokens += len(x)


def compare(store: PairedActivations, settings: DiffConfig, dtype: torch.dtype) -> dict[str, Any]:
    """How far apart the two are, and how good each is."""
    seen, held_out = store.split(1 - settings.held_out, settings.seed)
    made: list[Crosscoder] = []
    seconds = []
    for way in (train, train_densely):
        crosscoder, losses, config = plain(seen, settings, WHOLE)
        began = time.perf_counter()
        way(
            crosscoder.to(dtype),
            seen.shuffled(settings.batch_size, settings.seed),
            losses,
            replace(config, progress=False),
        )
        seconds.append(time.perf_counter() - began)
        made.append(crosscoder)
    sparse, dense = made
    result: dict[str, Any] = {
        "W_dec_apart": (sparse.W_dec - dense.W_dec).abs().max().item() / dense.W_dec.abs().max().item(),
        "same_pairs": same_pairs(sparse, dense, torch.cat(list(held_out.batches(4096)))),
        "seconds": seconds,
    }
    tables = [tlc.latent_table(crosscoder.float(), held_out) for crosscoder in made]
    for name in ("fve", "fve_difference", "l0", "dead_fraction"):
        result[name] = [table.attrs["metrics"][name] for table in tables]
    top = [set(table.nlargest(30, settings.ranking).index) for table in tables]
    return result | {"same_top_30": len(top[0] & top[1])}


@torch.no_grad()
def same_pairs(a: Crosscoder, b: Crosscoder, x: Float[Tensor, "token model d_in"]) -> float:
    """Of the (token, latent) pairs active under one, the share active under both."""
    both = either = 0
    for part in x.split(4096):
        on_a, on_b = a.encode(part) > 0, b.encode(part) > 0
        both, either = both + int((on_a & on_b).sum()), either + int((on_a | on_b).sum())
    return both / max(1, either)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of a finished diff")
    parser.add_argument("--steps", type=int, help="of training; as many as the run had")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    settings = json.loads((options.run / "metrics.json").read_text(encoding="utf-8"))["config"]
    settings = DiffConfig(**settings | {"top": tuple(settings["top"])})
    settings = replace(settings, steps=options.steps or settings.steps)
    store = PairedActivations.open(options.run / "acts")
    results = {name: compare(store, settings, dtype) for name, dtype in DTYPES.items()}
    if options.json:
        print(json.dumps(results))
        return
    for name, result in results.items():
        print(name)
        for what, value in result.items():
            shown = (
                " against ".join(f"{each:.4g}" for each in value)
                if isinstance(value, list)
                else f"{value:.4g}"
            )
            print(f"  {what}: {shown}")


if __name__ == "__main__":
    main()
