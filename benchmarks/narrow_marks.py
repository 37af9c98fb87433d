"""What a trained crosscoder makes of a planted behaviour: is it found, and what does it carry?"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch

from tl_crosscoder.analysis.table import ranked
from tl_crosscoder.demo import Recipe
from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.interventions import substitute
from tl_crosscoder.models.activations import PairedActivations
from tl_crosscoder.models.corpus import Corpus
from tl_crosscoder.models.pair import ModelPair
from tl_crosscoder.studies.behaviour import behaviour_removal, fires_on_it, firing_on
from tl_crosscoder.studies.controls import matched_random
from tl_crosscoder.studies.where import kept_tokens
from tl_crosscoder.types import BASE

SIZES = (3, 10, 30)
#: Latent Scaling ranks latents that fired on as many held-out tokens.
LEAST_FIRINGS = 20


@dataclass(frozen=True)
class Bench:
    """A planted pair, what was captured of it, and the tuned model's own answers to each behaviour's held-out prompts."""

    recipe: Recipe
    pair: ModelPair
    store: PairedActivations
    answers: dict[str, Corpus]


def marks(
    bench: Bench, crosscoder: Crosscoder, table: pd.DataFrame, *, seed: int, of_difference: bool, n_draws: int
) -> dict[str, Any]:
    """All figures of a crosscoder.  ``of_difference``: its norms say nothing, and it is ranked by the difference alone."""
    metrics, alive = table.attrs["metrics"], table["n_fired"] > 0
    row: dict[str, Any] = {name: metrics[name] for name in ("l0", "fve_difference")}
    row |= {
        "fve": None if of_difference else metrics["fve"],
        "dead": metrics["dead_fraction"],
        "largest_delta_norm": None if of_difference else table.loc[alive, "delta_norm"].max(),
    }
    orders = rankings(table, of_difference)
    order = orders[bench.recipe.config.ranking]
    removal = behaviour_removal(
        crosscoder,
        bench.pair,
        bench.recipe.planted.behaviours,
        table,
        ranking=bench.recipe.config.ranking,
        top=SIZES,
        n_draws=n_draws,
        install=False,
        drop=bench.recipe.drop,
        max_new_tokens=bench.recipe.max_new_tokens,
        seed=seed,
    )
    for behaviour in bench.recipe.planted.behaviours:
        name, answers = behaviour.name, bench.answers[behaviour.name]
        here = firing_on(crosscoder, bench.pair, answers)["frequency"]
        fires = fires_on_it(here, table["frequency"])
        found = {ranking: hits(order, fires) for ranking, order in orders.items()}
        rates = removal.table[removal.table["behaviour"] == name].set_index("condition")
        sets = {f"{ranking} {n}": ids[:n] for ranking, ids in orders.items() for n in SIZES}
        drawn = matched_random(table, order[: max(SIZES)], n_draws=2, seed=seed)
        sets |= {f"random {max(SIZES)}#{i}": latents for i, latents in enumerate(drawn)}
        row[name] = {
            "fire": int(fires.sum()),
            "found": found,
            "rates": rates["rate"].to_dict(),
            "worst": rates["worst"].to_dict(),
            "recovered": recovered(crosscoder, bench, answers, sets),
            "best": next((j for j in order[:20] if fires[j]), order[0]),
        }
    return row


def rankings(table: pd.DataFrame, of_difference: bool) -> dict[str, list[int]]:
    """Latents in order, by each statistic; none uses the behaviour.

    "latent scaling": by the sum of the ranks of ``nu_error`` and ``nu_recon``, low first, of latents in whose ratios there is
    something to see.
    """
    columns = ["difference_share", "difference_peak", "rank_score"]
    orders = {column: ranked(table, column) for column in columns}
    if of_difference:
        return orders
    seen = table[table["n_fired"] >= LEAST_FIRINGS].query("-.1 <= nu_error <= 2 and -.1 <= nu_recon <= 2")
    low_first = (seen["nu_error"].rank() + seen["nu_recon"].rank()).sort_values(kind="stable")
    return {
        "delta_norm": ranked(table, "delta_norm"),
        "latent scaling": low_first.index.tolist(),
    } | orders


def hits(order: Sequence[int], fires: pd.Series) -> dict[str, int | None]:
    """How many of the top 3 and 20 fire on it, and the place of the first that does (None: none at all)."""
    on = fires.loc[list(order)].to_numpy()
    first = int(np.argmax(on)) + 1 if on.any() else None
    return {"top 3": int(on[:3].sum()), "top 20": int(on[:20].sum()), "first": first}


@torch.no_grad()
def recovered(
    crosscoder: Crosscoder, bench: Bench, answers: Corpus, sets: dict[str, list[int]]
) -> dict[str, float]:
    """The share of the KL, to the tuned model, of the base activations that each set's change wins back on the answers' words."""
    pair, batch = bench.pair, answers.batch(range(len(answers)))
    acts = pair.capture(batch)
    where = kept_tokens(batch, acts, bench.recipe.drop)
    spoken = torch.cat([batch.assistant[:, 1:], torch.zeros_like(where[:, :1])], 1)
    counted = where & spoken
    clean = pair.run(batch)[counted].float().log_softmax(-1)

    def kl(latents: Sequence[int]) -> float:
        edit = substitute(crosscoder, latents, acts[:, :, BASE], mask=where)
        patched = pair.run(batch, edit)[counted].float().log_softmax(-1)
        return float((clean.exp() * (clean - patched)).sum(-1).double().mean())

    without = kl([])
    sets = sets | {"all": list(range(crosscoder.d_sae))}
    return {name: 1 - kl(latents) / without for name, latents in sets.items()}
