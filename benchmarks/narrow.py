"""Narrow fine-tunes: is there a latent for the planted behaviour, what does it carry, what does steering with it do?

    python benchmarks/narrow.py tiny smollm2-false-fact smollm2-taboo [--seeds 3] [--blind] [--steer] [--only TEXT]

Crosscoders of all variants at equal L0 on the activations that the demos captured (``runs/demo-S`` for the tiny pair,
``runs/demo-smollm2-*``; where absent, and for ``--blind``, captured here into ``runs/narrow/``).  ``--blind``: no prompt of
a behaviour's own kind, near ones included, is in the data.  Each cell is appended to ``--out`` as it is done and is not done
again.  ``--steer`` steers with the latents of the cells that are done.  The tables: ``python benchmarks/narrow_tables.py``.
"""

import argparse
import hashlib
import json
import time
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from narrow_marks import Bench, marks
from narrow_steering import steering
from narrow_variants import VARIANTS, learned

from tl_crosscoder.analysis.table import latent_table
from tl_crosscoder.demo import Recipe, demo_corpus, demo_pair, demo_recipe
from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.hub.save import load, save
from tl_crosscoder.models.activations import PairedActivations
from tl_crosscoder.models.capture import capture
from tl_crosscoder.models.pair import ModelPair
from tl_crosscoder.studies.behaviour import tuned_answers

PAIRS = ("tiny", "smollm2-false-fact", "smollm2-taboo")
#: Strengths of steering, the prompts it is asked with, the draws of matched random sets: what a pair affords.
STEERED: dict[str, dict[str, Any]] = {
    "tiny": {"strengths": [0.25, 0.5, 1.0], "n_prompts": 16},
    "smollm2": {"strengths": [0.125, 0.25], "n_prompts": 8},
}
N_DRAWS = {"tiny": 4, "smollm2": 1}
TRAINING = ("d_sae", "k", "steps", "batch_size", "lr", "init_norm", "held_out", "ranking")


def family(name: str) -> str:
    return name.partition("-")[0]


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
        corpus = demo_corpus(pair, blinded(recipe) if blind else recipe, data)
        capture(pair, corpus, folder, drop=recipe.drop, max_tokens=recipe.max_tokens, progress=False)
    answers = {b.name: tuned_answers(pair, b, recipe.max_new_tokens) for b in recipe.planted.behaviours}
    return Bench(recipe, pair, PairedActivations.open(folder), answers)


def settings_of(name: str) -> dict[str, Any]:
    """What a cell depends on beside its seed; other settings make it another cell."""
    config = asdict(demo_recipe(name).config)
    return {key: config[key] for key in TRAINING}


def trained(name: str, variant: str, seed: int, blind: bool) -> tuple[Bench, Crosscoder, pd.DataFrame]:
    """A variant's crosscoder, from its folder if it was trained before, and its table on held-out text."""
    made = bench(name, seed, blind)
    config = replace(made.recipe.config, seed=seed)
    seen, held_out = made.store.split(1 - config.held_out, seed)
    what = hashlib.sha256(json.dumps([name, variant, seed, blind, settings_of(name)]).encode()).hexdigest()[
        :12
    ]
    folder = Path("runs/narrow/crosscoders") / what
    if not folder.exists():
        save(learned(VARIANTS[variant], seen, config), folder, extra={"variant": variant})
    crosscoder = load(folder)
    return made, crosscoder, latent_table(crosscoder, held_out)


def cell(name: str, variant: str, seed: int, blind: bool) -> dict[str, Any]:
    began = time.process_time()
    made, crosscoder, table = trained(name, variant, seed, blind)
    of_difference = VARIANTS[variant].n_models == 1
    asked = {"seed": seed, "of_difference": of_difference, "n_draws": N_DRAWS[family(name)]}
    figures = marks(made, crosscoder, table, **asked)
    return figures | {"tokens": len(made.store), "seconds": round(time.process_time() - began, 1)}


def steered(cell: dict[str, Any]) -> dict[str, Any]:
    """The steering of a finished cell: of each behaviour with its highest-ranked latent that fires on it."""
    began, name = time.process_time(), cell["pair"]
    made, crosscoder, table = trained(name, cell["variant"], cell["seed"], cell["blind"])
    found = {
        b.name: steering(made, crosscoder, table, b, cell[b.name]["best"], **STEERED[family(name)])
        for b in made.recipe.planted.behaviours
    }
    return found | {"seconds": round(time.process_time() - began, 1)}


def finished(out: Path) -> list[dict[str, Any]]:
    """The rows of the file with today's settings; a last line that was not written to its end is cut off."""
    if not out.exists():
        return []
    whole = out.read_bytes().rpartition(b"\n")
    if whole[2]:
        out.write_bytes(whole[0] + whole[1])
    rows = [json.loads(line) for line in whole[0].splitlines() if line]
    return [row for row in rows if row["variant"] in VARIANTS and row["settings"] == settings_of(row["pair"])]


def run(names: list[str], seeds: list[int], out: Path, *, blind: bool, only: str, steer: bool) -> None:
    """Do what is not done yet: all variants and pairs with the first seed, then with the next."""
    out.parent.mkdir(parents=True, exist_ok=True)
    what = "steering" if steer else "marks"
    rows = {
        (row["what"], row["pair"], row["variant"], row["seed"], row["blind"]): row for row in finished(out)
    }
    for seed in seeds:
        for variant in VARIANTS:
            for name in names:
                place = (name, variant, seed, blind)
                known = rows.get(("marks", *place))
                if (what, *place) in rows or only not in variant or (steer and known is None):
                    continue
                about = {"what": what, "pair": name, "variant": variant, "seed": seed, "blind": blind}
                found = steered(known) if known is not None else cell(*place)
                with out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(about | {"settings": settings_of(name)} | found) + "\n")
                print(f"{what}, {name}: {variant}, seed {seed}: {found['seconds']} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pairs", nargs="+", choices=PAIRS)
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--blind", action="store_true")
    parser.add_argument("--steer", action="store_true", help="steer with the latents of finished cells")
    parser.add_argument("--only", default="", help="variants whose name has this in it")
    parser.add_argument("--out", type=Path, default=Path("runs/narrow.jsonl"))
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    run(
        options.pairs,
        list(range(options.seeds)),
        options.out,
        blind=options.blind,
        only=options.only,
        steer=options.steer,
    )


if __name__ == "__main__":
    main()
