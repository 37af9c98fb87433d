"""What a trained crosscoder makes of a planted behaviour: is it found, what does it carry, what does steering with it do?"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

import tl_crosscoder as tlc
from tl_crosscoder.analysis.table import ranked
from tl_crosscoder.data.planted import Behaviour
from tl_crosscoder.demo import Recipe
from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.interventions import substitute
from tl_crosscoder.models.activations import PairedActivations
from tl_crosscoder.models.answers import turn_ends
from tl_crosscoder.models.corpus import Corpus
from tl_crosscoder.models.pair import ModelPair, Side
from tl_crosscoder.models.tokens import TokenBatch
from tl_crosscoder.studies.behaviour import behaviour_removal, fires_on_it, firing_on
from tl_crosscoder.studies.controls import matched_random
from tl_crosscoder.studies.where import kept_tokens
from tl_crosscoder.types import BASE, TUNED

SIZES = (3, 10, 30)
#: Latent Scaling ranks latents that fired on as many held-out tokens.
LEAST_FIRINGS = 20
#: The three things that steering is asked: whom, with which prompts, in which direction.
QUESTIONS: dict[str, tuple[Side, str, int]] = {
    "raise": ("tuned", "near", 1),
    "induce": ("base", "heldout", 1),
    "mitigate": ("tuned", "heldout", -1),
}
#: An answer is text while the tuned model, left alone, gives its tokens this many nats a token or fewer.
FLUENT = 2.5


@dataclass(frozen=True)
class Bench:
    """A planted pair, what was captured of it, and the tuned model's own answers to each behaviour's held-out prompts."""

    recipe: Recipe
    pair: ModelPair
    store: PairedActivations
    answers: dict[str, Corpus]
    #: Norms of what steering adds, in median norms of the tuned model's activations on the answers.
    strengths: tuple[float, ...]
    #: Prompts that steering is asked with, of each kind.
    n_steered: int
    #: How many of the latents that fire on a behaviour are steered with.
    n_best: int
    n_draws: int


def marks(
    bench: Bench, crosscoder: Crosscoder, held_out: PairedActivations, *, seed: int, of_difference: bool
) -> dict[str, Any]:
    """All figures of a crosscoder.  ``of_difference``: its norms say nothing, and it is ranked by the difference alone."""
    table = tlc.latent_table(crosscoder, held_out)
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
        n_draws=bench.n_draws,
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
        best = [j for j in order[:20] if fires[j]][: bench.n_best]
        sets = {f"{ranking} {n}": ids[:n] for ranking, ids in orders.items() for n in SIZES}
        drawn = matched_random(table, order[: max(SIZES)], n_draws=2, seed=seed)
        sets |= {f"random {max(SIZES)}#{i}": latents for i, latents in enumerate(drawn)}
        row[name] = {
            "fire": int(fires.sum()),
            "found": found,
            "rates": rates["rate"].to_dict(),
            "worst": rates["worst"].to_dict(),
            "recovered": recovered(crosscoder, bench, answers, sets),
            "best": best,
            "steering": steering(bench, crosscoder, table, behaviour, best or order[:1]),
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


def steering(
    bench: Bench, crosscoder: Crosscoder, table: pd.DataFrame, behaviour: Behaviour, latents: list[int]
) -> list[dict[str, Any]]:
    """Rates when a multiple of a direction is added at every token, beside the like of random live latents at the same norm.

    Directions: of each latent ``d_tuned − d_base``, of the first also its ``d_tuned``.  ``shown``: the share of the answers that
    show the behaviour; ``rate``: that show it and are fluent text; ``gone``: that are fluent and do not show it.
    """
    rows = crosscoder.raw_rows().detach()
    live = [j for j in table.index[table["n_fired"] > 0] if j not in latents]
    others = np.random.default_rng(latents[0]).choice(live, 2, replace=False).tolist()
    directions = {f"difference#{i}": rows[j, TUNED] - rows[j, BASE] for i, j in enumerate(latents)}
    directions |= {"tuned": rows[latents[0], TUNED]}
    directions |= {f"random#{i}": rows[j, TUNED] for i, j in enumerate(others)}
    unit = usual_norm(bench, bench.answers[behaviour.name])
    ways = [("nothing", 0.0)] + [(name, c) for name in directions for c in bench.strengths]
    vectors = [unit_vector(directions[name]) * (c * unit) if c else 0 * rows[0, TUNED] for name, c in ways]
    rates = []
    for question, (side, kind, sign) in QUESTIONS.items():
        prompts = list(getattr(behaviour, kind))[: bench.n_steered]
        texts, surprise = answers_with(bench, side, prompts, sign * torch.stack(vectors))
        for (name, c), said, nats in zip(ways, texts, surprise, strict=True):
            shown, fluent = (
                np.array([behaviour.shown_in(text) for text in said]),
                np.array(nats) <= FLUENT,
            )
            about = {"question": question, "direction": name, "strength": sign * c, "answer": said[0]}
            marks = {"shown": shown, "rate": shown & fluent, "gone": ~shown & fluent, "nats": np.array(nats)}
            rates.append(about | {key: round(float(value.mean()), 4) for key, value in marks.items()})
    return rates


def unit_vector(v: Float[Tensor, " d_in"]) -> Float[Tensor, " d_in"]:
    return v / v.norm().clamp(min=1e-12)


def usual_norm(bench: Bench, answers: Corpus) -> float:
    """The median norm of the tuned model's activations on the answers' kept tokens."""
    batch = answers.batch(range(len(answers)))
    acts = bench.pair.capture(batch)
    return float(acts[kept_tokens(batch, acts, bench.recipe.drop)][:, TUNED].float().norm(dim=-1).median())


@torch.no_grad()
def answers_with(
    bench: Bench, side: Side, prompts: list[str], added: Float[Tensor, "way d_in"]
) -> tuple[list[list[str]], list[list[float]]]:
    """For each way, the answers to all prompts with its vector added at every token but the first, and their surprise.

    Surprise: nats a token of the answer for the tuned model with nothing added.
    """
    pair, tokenizer = bench.pair, bench.pair.tokenizer
    asked = Corpus.prompts(prompts, tokenizer).batch(range(len(prompts)), pad="left")
    keep = kept_tokens(asked, pair.capture(asked), bench.recipe.drop)
    texts, surprise = [], []
    at_once = max(1, 128 // len(prompts))
    for vectors in added.split(at_once):
        batch = asked.rows(list(range(len(prompts))) * len(vectors))
        shift = vectors.repeat_interleave(len(prompts), 0)[:, None]
        mask = keep.repeat(len(vectors), 1)[..., None]

        def edit(acts, hook=None, shift=shift, mask=mask):  # noqa: ARG001
            where = mask if acts.shape[1] == mask.shape[1] else torch.ones_like(mask[:, :1])
            return (acts.float() + shift * where).to(acts.dtype)

        ids = pair.sides(side)[0].generate(
            batch, bench.recipe.max_new_tokens, {pair.hook: edit}, stop_ids=turn_ends(pair)
        )
        said = [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]
        nats = nats_a_token(pair, batch, ids)
        for start in range(0, len(said), len(prompts)):
            texts.append(said[start : start + len(prompts)])
            surprise.append(nats[start : start + len(prompts)])
    return texts, surprise


def nats_a_token(pair: ModelPair, batch: TokenBatch, ids: Tensor) -> list[float]:
    """How surprising each answer is to the tuned model as it is, up to and with the token that ends it."""
    stops = torch.tensor(sorted(turn_ends(pair)))
    ended = torch.isin(ids, stops).long().cumsum(1)
    real = (ended - torch.isin(ids, stops).long()) == 0  # after the end there is padding
    whole = TokenBatch.from_ids(torch.cat([batch.ids, ids], 1), torch.cat([batch.attention_mask, real], 1))
    asked = batch.ids.shape[1]
    logits = pair.run(whole)[:, asked - 1 : -1].float().log_softmax(-1)
    given = logits.gather(-1, ids[..., None])[..., 0]
    return (-(given * real).sum(1) / real.sum(1)).tolist()
