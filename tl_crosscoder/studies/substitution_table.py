"""The table of the substitution study: sums of scores over each sequence, and what they come to with intervals."""

from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from tl_crosscoder.studies.conditions import Condition, Reading
from tl_crosscoder.studies.intervals import middle, ratio_draws
from tl_crosscoder.studies.predictions import SCORES, scores

KEYS = ["condition", "tokens", "sequence"]


def sums(reading: Reading, patched: Tensor) -> dict[str, dict[str, list[Any]]]:
    """For each set of tokens, the sum of every score over each sequence, and ``n`` predictions."""
    every = reading.counted["all"]
    true = reading.batch.ids.roll(-1, 1)[every]
    found = {}
    of = scores(reading.tuned, reading.base, patched, true)
    for tokens, where in reading.counted.items():
        columns = {"n": where.sum(-1).tolist()}
        for name, values in of.items():
            spread = torch.zeros(every.shape, dtype=torch.float64, device=every.device)
            spread[every] = values
            columns[f"{name}_sum"] = (spread * where).sum(-1).tolist()
        found[tokens] = columns
    return found


def merge_draws(drawn: Any) -> Any:
    """One row for each condition, set of tokens and conversation; of ``random N#draw`` the mean of the draws."""
    values = ["n", *(f"{name}_sum" for name in SCORES)]
    parts = drawn["condition"].str.partition("#")
    drawn = drawn.assign(condition=parts[0], draw=parts[2])
    each = drawn.groupby([*KEYS, "draw"], sort=False)[values].sum()
    return each.groupby(KEYS, sort=False).mean().reset_index()


def summarise(
    merged: Any, drawn: Any, asked: dict[str, Condition], n_bootstrap: int, seed: int
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The table, and the paired differences; all intervals of one set of tokens come from the same draws."""
    names = list(dict.fromkeys(name.split("#")[0] for name in asked))
    sizes = {n.split("#")[0]: len(c.latents) for n, c in asked.items() if c.latents is not None}
    spread = _spread_of_draws(drawn)
    table, paired = [], []
    for tokens, group in merged.groupby("tokens", sort=False):
        wide: Any = group.pivot(index="sequence", columns="condition")
        counts = wide["n"]["none"].to_numpy(float)
        draws = ratio_draws(wide["kl_sum"][names].to_numpy(float), counts, n_bootstrap, seed)
        rows = _rows(wide, names, counts, draws)
        rows["n_latents"] = [sizes.get(name, np.nan) for name in names]
        rows["draws_sd"] = [spread.get((name, tokens), np.nan) for name in names]
        rows.insert(1, "tokens", tokens)
        table.append(rows)
        paired.append(_top_minus_bottom(rows["kl"].to_numpy(), names, draws).assign(tokens=tokens))
    whole = pd.concat(table)
    order = {name: i for i, name in enumerate(names)}
    whole = whole.sort_values(
        "condition", key=lambda column: column.map(order), kind="stable", ignore_index=True
    )
    gaps = pd.concat(paired, ignore_index=True)
    return whole, gaps if len(gaps) else pd.DataFrame()


def _rows(wide: Any, names: list[str], counts: np.ndarray, draws: np.ndarray) -> pd.DataFrame:
    """A row a condition: the scores, KL's interval, and the share of ``none``'s KL that is gone with its own."""
    total, none = counts.sum(), names.index("none")
    values = {name: wide[f"{name}_sum"][names].to_numpy(float).sum(0) for name in SCORES}
    values = {name: each / total if total else np.full(len(names), np.nan) for name, each in values.items()}
    low, high = middle(draws)
    rows = {"condition": names, "kl": values["kl"], "ci_low": low, "ci_high": high}
    if values["kl"][none] > 0:
        rows["recovered"] = 1 - values["kl"] / values["kl"][none]
        missing = draws[:, [none]]
        least, most = middle(1 - draws / np.where(missing > 0, missing, np.nan))
        rows |= {"recovered_low": least, "recovered_high": most}
    else:
        rows |= dict.fromkeys(("recovered", "recovered_low", "recovered_high"), np.full(len(names), np.nan))
    rows |= {score: values[score] for score in ("nll", "nll_argmax", "agreement", "kl_base")}
    return pd.DataFrame(rows | {"n_tokens": int(total)})


def _top_minus_bottom(kl: np.ndarray, names: list[str], draws: np.ndarray) -> pd.DataFrame:
    """Of each split of latents in halves the difference in KL, with its interval over the same draws."""
    found = []
    for a, name in enumerate(names):
        other = name.replace(" top", " bottom")
        if other != name and other in names:
            b = names.index(other)
            low, high = middle(draws[:, a] - draws[:, b])
            gap = {"split": name.replace(" top", ""), "tokens": "", "kl_top_minus_bottom": kl[a] - kl[b]}
            found.append(gap | {"ci_low": float(low), "ci_high": float(high)})
    return pd.DataFrame(found)


def _spread_of_draws(drawn: Any) -> dict[tuple[str, str], float]:
    """The standard deviation of the draws' KL, for conditions that are drawn more than once."""
    totals = (
        drawn[drawn["condition"].str.contains("#")].groupby(["condition", "tokens"])[["kl_sum", "n"]].sum()
    )
    values: dict[tuple[str, str], list[float]] = {}
    for (condition, tokens), row in totals.iterrows():
        if row["n"] > 0:
            values.setdefault((condition.split("#")[0], tokens), []).append(row["kl_sum"] / row["n"])
    return {key: float(np.std(v, ddof=1)) for key, v in values.items() if len(v) > 1}
