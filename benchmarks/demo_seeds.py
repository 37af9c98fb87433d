"""The causal figures of a finished demo over further seeds of the crosscoder, on the activations it captured.

    python benchmarks/demo_seeds.py smollm2-false-fact runs/demo-smollm2-false-fact --seeds 1 2

Each seed trains a crosscoder anew on the run's ``acts/`` (another initialisation, order of data and held-out part) and
asks the two studies about the planted behaviours only.  Prints one JSON line a seed.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch

import tl_crosscoder as tlc
from tl_crosscoder.data import data_path
from tl_crosscoder.demo import RECIPES
from tl_crosscoder.diffing.run import learn
from tl_crosscoder.studies.behaviour import tuned_answers


def main(name: str, run: Path, seeds: list[int], draws: int) -> None:
    recipe = RECIPES[name]
    planted = recipe.planted
    adapter = data_path(planted.adapter)
    pair = tlc.ModelPair.load(recipe.base(), adapter=adapter, hook=planted.hook, merged=True)
    store = tlc.PairedActivations.open(run / "acts")
    texts = {b.name: tuned_answers(pair, b, recipe.max_new_tokens) for b in planted.behaviours}
    for seed in seeds:
        config = replace(recipe.config, seed=seed)
        seen, held_out = store.split(1 - config.held_out, seed)
        crosscoder, _ = learn(seen, config, progress=False)
        table = tlc.latent_table(crosscoder, held_out)
        asking = {"ranking": config.ranking, "drop": recipe.drop, "seed": seed}
        row = {"seed": seed, **{k: round(v, 3) for k, v in table.attrs["metrics"].items()}}
        row["largest_delta_norm"] = round(table["delta_norm"].max(), 3)
        for behaviour, text in texts.items():
            part = tlc.substitution(
                crosscoder,
                pair,
                text,
                table,
                top=(10, 30),
                n_random=1,
                max_tokens=recipe.max_tokens,
                **asking,
            )
            recovered = part.table.query("tokens == 'all'").set_index("condition")["recovered"]
            row[f"{behaviour}: KL recovered"] = (
                recovered[["top 10 ranked", "top 30 ranked", "all"]].round(2).to_dict()
            )
        removal = tlc.behaviour_removal(
            crosscoder, pair, planted.behaviours, table, top=(3, 10, 30), n_draws=draws,
            max_new_tokens=recipe.max_new_tokens, install=False, **asking,
        )  # fmt: skip
        for behaviour, rates in removal.table.groupby("behaviour"):
            row[f"{behaviour}: rate"] = rates.set_index("condition")["rate"].round(2).to_dict()
        row["fire"] = removal.firing.groupby("behaviour")["fires_on_it"].sum().to_dict()
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=list(RECIPES))
    parser.add_argument("run", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--draws", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    arguments = vars(parser.parse_args())
    torch.set_num_threads(arguments.pop("threads"))
    main(**arguments)
