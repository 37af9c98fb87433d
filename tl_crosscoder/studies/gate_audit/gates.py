"""The gate: which latents are called specific to the tuned model, and how many pass at each threshold."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor

from tl_crosscoder.analysis.decoder_norms import DecoderNorms
from tl_crosscoder.analysis.difference_share import DifferenceShare
from tl_crosscoder.analysis.firing import Firing
from tl_crosscoder.analysis.latent_scaling import LatentScaling
from tl_crosscoder.analysis.table import latent_table
from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.models.activations import PairedActivations
from tl_crosscoder.studies.statistics import poisson_interval, ratio_of_counts

NORMS = (0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 5 / 6, 0.9, 0.95)
#: gate -> its threshold, and those that counts are given for; high is specific to the tuned model (peak: to one of the two)
GATES: dict[str, tuple[float, tuple[float, ...]]] = {
    "specificity": (5 / 6, NORMS),
    "delta_norm": (0.9, NORMS),
    "absence": (0.8, (0.3, 0.5, 0.7, 0.8, 0.9)),
    "peak": (0.5, (0.1, 0.2, 0.3, 0.5, 0.7, 1.0)),
}


@dataclass(frozen=True)
class Gate:
    """Latents whose ``by`` lies above ``threshold`` and that fire on ``least`` tokens and a share ``rarest`` of them at least.

    ``specificity``: the tuned decoder's share of both norms, n_tuned / (n_base + n_tuned); above 5/6 is Δnorm above .9.
    ``delta_norm``.  ``absence``: 1 − \\|nu_error\\|, how little the base model's error holds of it (Latent Scaling).
    ``peak``: the largest difference that the latent ever writes between the models, over √d_in, about the length of an activation;
    for narrow fine-tunes, which change parts of shared latents, so that norms pass none.  It does not say which model has more of
    the latent; one that writes nothing into the tuned model has none.
    """

    by: str = "specificity"
    threshold: float = math.nan
    least: int = 100
    rarest: float = 1e-5

    def __post_init__(self):
        if self.by not in GATES:
            raise KeyError(f"no gate named {self.by!r}; known: {', '.join(GATES)}")
        if math.isnan(self.threshold):
            object.__setattr__(self, "threshold", GATES[self.by][0])

    @property
    def sweep(self) -> list[float]:
        return sorted({*GATES[self.by][1], self.threshold})

    def alive(self, table: pd.DataFrame) -> list[int]:
        """The latents that fire often enough to be judged."""
        enough = (table["n_fired"] >= self.least) & (table["frequency"] >= self.rarest)
        return table.index[enough.to_numpy()].tolist()

    def passing(self, table: pd.DataFrame, threshold: float | None = None) -> list[int]:
        """The latents that pass, the most specific first."""
        above = table["gate"].loc[self.alive(table)].dropna()
        above = above[above.to_numpy() > (self.threshold if threshold is None else threshold)]
        return above.sort_values(ascending=False, kind="stable").index.tolist()


class Beginning:
    """The first tokens of a store, about ``n_tokens``."""

    def __init__(self, store: PairedActivations, n_tokens: int | None):
        self.store, self.n_tokens = store, n_tokens or len(store)

    def __iter__(self) -> Iterator[Tensor]:
        return (part.x for part in self.located(4096))

    def located(self, size: int) -> Iterator[Any]:
        seen = 0
        for part in self.store.located(size):
            yield part
            seen += len(part.x)
            if seen >= self.n_tokens:
                return


def measured(
    crosscoder: Crosscoder, store: PairedActivations, gate: Gate, max_tokens: int | None = None
) -> pd.DataFrame:
    """The numbers of the latent table that an audit needs, and ``gate``: what the gate looks at, high passes."""
    kinds = [DecoderNorms, Firing, DifferenceShare] + [LatentScaling] * (gate.by == "absence")
    table = latent_table(crosscoder, Beginning(store, max_tokens), [kind(crosscoder) for kind in kinds])
    if gate.by == "specificity":
        table["gate"] = table["norm_tuned"] / (table["norm_base"] + table["norm_tuned"])
    elif gate.by == "delta_norm":
        table["gate"] = table["delta_norm"]
    elif gate.by == "absence":
        table["gate"] = 1 - table["nu_error"].abs()
    else:
        peak = table["difference_peak"] / math.sqrt(crosscoder.d_in)
        table["gate"] = peak.where(table["norm_tuned"] > 0)
    return table.drop(columns="class")


def count_table(tables: dict[str, list[pd.DataFrame]], gate: Gate) -> pd.DataFrame:
    """One row an arm and threshold: the latents that pass, pooled over seeds, with exact Poisson intervals.

    ``counts``: of each seed.  ``mean``: a crosscoder, with ``low, high``.  ``alive``: mean number that could pass.
    ``ratio``: to the target arm's count, with its exact interval; NaN where neither has any.
    """
    rows = []
    for threshold in gate.sweep:
        found = {name: [len(gate.passing(t, threshold)) for t in arm] for name, arm in tables.items()}
        for name, counts in found.items():
            low, high = poisson_interval(sum(counts))
            ratio = ratio_of_counts(sum(counts), sum(found["target"]))
            about = {"arm": name, "threshold": threshold, "counts": " ".join(map(str, counts))}
            about |= {"mean": np.mean(counts), "low": low / len(counts), "high": high / len(counts)}
            about |= {"alive": np.mean([len(gate.alive(t)) for t in tables[name]])}
            rows.append(about | dict(zip(("ratio", "ratio_low", "ratio_high"), ratio, strict=True)))
    return pd.DataFrame(rows)
