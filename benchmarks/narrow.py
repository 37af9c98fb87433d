"""Narrow fine-tunes: is there a latent for the planted behaviour, what does it carry, what does steering with it do?

    python benchmarks/narrow.py tiny smollm2-false-fact smollm2-taboo [--seeds 3] [--blind] [--only TEXT] [--out runs/narrow.jsonl]

Crosscoders of all variants at equal L0 on the activations that the demos captured (``runs/demo-S`` for the tiny pair,
``runs/demo-smollm2-*``; where absent, and for ``--blind``, captured here into ``runs/narrow/``).  ``--blind``: no prompt of
a behaviour's own kind, near ones included, is in the data.  Each cell is appended to ``--out`` as it is done and is not done
again.  The tables: ``python benchmarks/narrow_tables.py``.
"""

import argparse
import json
import time
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from narrow_marks import Bench, marks
from narrow_variants import VARIANTS, learned

from tl_crosscoder.demo import Recipe, demo_corpus, demo_pair, demo_recipe
from tl_crosscoder.models.activations import PairedActivations
from tl_crosscoder.models.capture import capture
from tl_crosscoder.models.pair import ModelPair
from tl_crosscoder.studies.behaviour import tuned_answers

PAIRS = ("tiny", "smollm2-false-fact", "smollm2-taboo")
#: What steering adds, how many prompts it is asked with, of how many latents; draws of matched random sets: what a pair affords.
ASKED: dict[str, dict[str, Any]] = {
    "tiny": {"strengths": (0.25, 0.5, 1.0), "n_steered": 16, "n_best": 3, "n_draws": 4},
    "smollm2": {"strengths": (0.125, 0.25), "n_steered": 8, "n_best": 1, "n_draws": 1},
}


def asked(name: str) -> dict[str, Any]:
    return ASKED[name.partition("-")[0]]


def blinded(recipe: Recipe) -> Recipe:
    """The recipe of one who does not know what was planted: no prompt of the behaviours' own kind, nor near ones."""
    unknown = tuple(replace(b, chats=(), near_train=()) for b in recipe.planted.behaviours)
    return replace(recipe, planted=replace(recipe.planted, behaviours=unknown))


@cache
def loaded(name: str) -> ModelPair:
    """SmolLM2 in bfloat16: several times as fast, and its answers hardly change."""
    return demo_pair(name, dtype="float32" if name == "tiny" else "bfloat16")


@cache
def bench(name: str, seed: int, blind: bool) -> Bench:
    """The tiny pair has data for each seed; SmolLM2's are captured once, and the seed moves start, order and held-out part."""
    recipe, pair, data = demo_recipe(name), loaded(name), seed if name == "tiny" else 0
    folder = Path("runs") / ("demo-" + (str(data) if name == "tiny" else name)) / "acts"
    if blind or not (folder / "manifest.json").exists():
        folder = Path("runs/narrow") / f"{name}-{data}{'-blind' if blind else ''}" / "acts"
        read = blinded(recipe) if blind else recipe
        corpus = demo_corpus(pair, read, data)
        capture(pair, corpus, folder, drop=recipe.drop, max_tokens=recipe.max_tokens, progress=False)
    answers = {b.name: tuned_answers(pair, b, recipe.max_new_tokens) for b in recipe.planted.behaviours}
    return Bench(recipe, pair, PairedActivations.open(folder), answers, **asked(name))


def settings_of(name: str) -> dict[str, Any]:
    """What a cell depends on beside its seed; other settings make it another cell."""
    config = asdict(demo_recipe(name).config)
    return json.loads(json.dumps({key: config[key] for key in TRAINING} | asked(name)))


TRAINING = ("d_sae", "k", "steps", "batch_size", "lr", "init_norm", "held_out", "ranking")


def cell(name: str, variant: str, seed: int, blind: bool) -> dict[str, Any]:
    began, made = time.process_time(), bench(name, seed, blind)
    config = replace(made.recipe.config, seed=seed)
    seen, held_out = made.store.split(1 - config.held_out, seed)
    crosscoder = learned(VARIANTS[variant], seen, config)
    of_difference = VARIANTS[variant].n_models == 1
    figures = marks(made, crosscoder, held_out, seed=seed, of_difference=of_difference)
    return figures | {"tokens": len(made.store), "seconds": round(time.process_time() - began, 1)}


def finished(out: Path) -> list[dict[str, Any]]:
    """The rows of the file with today's settings; a last line that was not written to its end is cut off."""
    if not out.exists():
        return []
    whole = out.read_bytes().rpartition(b"\n")
    if whole[2]:
        out.write_bytes(whole[0] + whole[1])
    rows = [json.loads(line) for line in whole[0].splitlines() if line]
    return [row for row in rows if row["variant"] in VARIANTS and row["settings"] == settings_of(row["pair"])]


def run(names: list[str], seeds: list[int], out: Path, *, blind: bool, only: str) -> None:
    """Do what is not done yet: all pairs and variants with the first seed, then with the next."""
    out.parent.mkdir(parents=True, exist_ok=True)
    done = {(row["pair"], row["variant"], row["seed"], row["blind"]) for row in finished(out)}
    for seed in seeds:
        for variant in VARIANTS:
            for name in names:
                if (name, variant, seed, blind) in done or only not in variant:
                    continue
                about = {"pair": name, "variant": variant, "seed": seed, "blind": blind}
                row = about | {"settings": settings_of(name)} | cell(name, variant, seed, blind)
                with out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
                print(f"{name}: {variant}, seed {seed}: {row['seconds']} s, L0 {row['l0']:.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pairs", nargs="+", choices=PAIRS)
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--blind", action="store_true")
    parser.add_argument("--only", default="", help="variants whose name has this in it")
    parser.add_argument("--out", type=Path, default=Path("runs/narrow.jsonl"))
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    run(options.pairs, list(range(options.seeds)), options.out, blind=options.blind, only=options.only)


if __name__ == "__main__":
    main()
