"""The tables of a steering sweep: every answer with what the judge made of it, and rates over the answers."""

import math
from typing import Any

import numpy as np
import pandas as pd

from tl_crosscoder.studies.intervals import wilson
from tl_crosscoder.studies.pushes import LATENTS, Push
from tl_crosscoder.studies.sweep import SIDES, Answer

Row = dict[str, Any]
KEYS = ["behaviour", "prompts", "side", "target", "kind", "strength"]


def answer_rows(where: dict[str, str], push: Push, said: list[Answer], verdicts: list[Any]) -> pd.DataFrame:
    """A row an answer: where it was asked, under which push, what the judge made of it, its perplexity under both models."""
    about = where | {"target": push.target, "kind": push.kind, "draw": push.draw}
    frame = pd.DataFrame([about | answer for answer in said])
    frame["shown"] = pd.array([holds for holds, _ in verdicts], dtype="boolean")
    frame["judge_said"] = [came for _, came in verdicts]
    for side in SIDES:
        frame[f"perplexity_{side}"] = np.exp(frame[f"nll_{side}"] / frame["n_tokens"])
    return frame


def summarise(answers: pd.DataFrame, made: list[Push], typical: dict[Any, float]) -> pd.DataFrame:
    """A row for each of ``KEYS``: the dose, the rates over the answers of all draws, and what they cost in perplexity."""
    doses = {push.target: (float(push.vector.norm()), push.unit) for push in made if push.kind == LATENTS}
    rows = []
    for key, group in answers.groupby(KEYS, sort=False):
        row: Row = dict(zip(KEYS, list(key), strict=True))  # pyright: ignore[reportArgumentType]
        norm, unit = doses.get(row["target"], (0.0, math.nan))
        added = abs(row["strength"]) * norm
        dose = {"raw_strength": row["strength"] * (unit if row["kind"] == LATENTS else math.nan)}
        dose |= {"norm": added, "relative_norm": added / typical[row["side"]]}
        tokens = group["n_tokens"].to_numpy(float).sum()
        cost = {f"perplexity_{s}": math.exp(group[f"nll_{s}"].to_numpy(float).sum() / tokens) for s in SIDES}
        text = group["nll_text"].to_numpy(float).mean()  # each draw as often: they answer the same prompts
        rows.append(row | dose | _rates(group) | cost | {"perplexity_text": math.exp(text)})
    return pd.DataFrame(rows)


def stopped(answers: pd.DataFrame) -> dict[tuple[Any, ...], tuple[float, float]]:
    """By ``KEYS``: of the judged answers the share that is coherent and does not show the behaviour, and its highest single draw.

    Without a judged answer there is no entry.
    """
    judged: Any = answers[answers["shown"].notna().to_numpy(bool)]
    gone = judged["coherent"].to_numpy(bool) & ~judged["shown"].to_numpy(bool)
    each = judged.assign(gone=gone).groupby([*KEYS, "draw"], sort=False)["gone"].agg(["sum", "count"])
    by_target = each.assign(share=each["sum"] / each["count"]).groupby(level=KEYS, sort=False)
    pooled = by_target["sum"].sum() / by_target["count"].sum()
    return {key: (float(pooled[key]), float(most)) for key, most in by_target["share"].max().items()}


def _rates(group: pd.DataFrame) -> Row:
    """The rates over the judged answers of one row; ``coherent`` over all of them."""
    judged = group["shown"].notna().to_numpy(bool)
    shown, coherent = group["shown"].fillna(False).to_numpy(bool), group["coherent"].to_numpy(bool)
    good, draw, n = (shown & coherent)[judged], group["draw"].to_numpy(int)[judged], int(judged.sum())
    rate, low, high = wilson(int(shown[judged].sum()), n)
    return {
        "rate": rate,
        "low": low,
        "high": high,
        "rate_coherent": float(good.mean()) if n else math.nan,
        "most": max((float(good[draw == d].mean()) for d in np.unique(draw)), default=math.nan),
        "coherent": float(coherent.mean()),
        "n": n,
        "n_unjudged": len(group) - n,
    }
