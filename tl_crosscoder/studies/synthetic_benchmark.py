"""Does a sparsity tell what is new from what only looks new?  The field's claims, where the difference is known."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pandas as pd

from tl_crosscoder.figures import Drawing
from tl_crosscoder.figures.claims import claims_figure
from tl_crosscoder.studies.intervals import t_interval
from tl_crosscoder.studies.parts import Parts
from tl_crosscoder.studies.progress import tracked
from tl_crosscoder.studies.records import records
from tl_crosscoder.studies.result import StudyResult
from tl_crosscoder.studies.synthetic_cells import CELLS, FAST, FULL, Setting, cell_marks

Marks = dict[str, dict[str, float]]  # of one seed: cell -> mark -> value


@dataclass(frozen=True)
class Claim:
    """What is said, the figure that shows it (NaN where a seed has none), and between which values it must lie."""

    text: str
    what: str
    figure: Callable[[Marks], float]
    at_least: float = -np.inf
    at_most: float = np.inf


L1, TOPK = "L1", "BatchTopK"
CLAIMS = (
    Claim("L1 shrinks weak concepts", "Δnorm above the truth, median", lambda m: m[L1]["shrinkage"], 0.01),
    Claim("... so that some look tuned-only", "weak concepts called", lambda m: m[L1]["norm_weak"], 1.0),
    Claim("L1 cuts concepts in two", "mirror pairs", lambda m: m[L1]["mirror_pairs"], 3.0),
    Claim(
        "Latent Scaling repairs its precision",
        "precision gained",
        lambda m: m[L1]["gated_precision"] - m[L1]["norm_precision"],
        0.2,
    ),
    Claim(
        "... at unchanged recall",
        "recall lost",
        lambda m: m[L1]["norm_recall"] - m[L1]["gated_recall"],
        at_most=0.02,
    ),
    Claim(
        "BatchTopK does not shrink",
        "Δnorm above the truth, median",
        lambda m: m[TOPK]["shrinkage"],
        -0.01,
        0.01,
    ),
    Claim(
        "... so that no weak concept looks tuned-only",
        "weak concepts called",
        lambda m: m[TOPK]["norm_weak"],
        at_most=0.0,
    ),
    Claim(
        "Norms are truer under BatchTopK than under L1",
        "gain in their correlation with the truth",
        lambda m: m[TOPK]["agreement"] - m[L1]["agreement"],
        0.02,
    ),
    Claim(
        "Wide magnitudes still cut concepts in two",
        "mirror pairs, BatchTopK",
        lambda m: m[f"{TOPK}, wide"]["mirror_pairs"],
        1.0,
    ),
    Claim(
        "... and ν of the reconstruction catches it",
        "share of those wrong calls taken back",
        lambda m: m[f"{TOPK}, wide"]["caught"],
        0.9,
    ),
    Claim(
        "ν of shared concepts is 1",
        "median ν of the error, BatchTopK",
        lambda m: m[TOPK]["shared_nu_error"],
        0.95,
        1.05,
    ),
    Claim(
        "Equal models have nothing of their own: L1",
        "share of exclusive latents",
        lambda m: m["L1, identity"]["exclusive"],
        at_most=0.0,
    ),
    Claim(
        "Equal models have nothing of their own: BatchTopK",
        "share of exclusive latents",
        lambda m: m["BatchTopK, identity"]["exclusive"],
        at_most=0.0,
    ),
    Claim(
        "Models that read other tokens share almost nothing",
        "share of exclusive latents",
        lambda m: m["BatchTopK, disjoint"]["exclusive"],
        0.8,
    ),
)


@dataclass(frozen=True)
class SyntheticBenchmarkResult(StudyResult):
    """``table``: a row a claim: ``claim, figure, mean, low, high`` (95 % t interval over seeds), what is ``wanted``, and in how
    many of the ``seeds`` that have the figure it ``holds``.  ``cells``: every mark of every training."""

    key: ClassVar = "synthetic-benchmark"
    title: ClassVar = "What is found where the truth is known"
    text: ClassVar = "Crosscoders of synthetic activations with planted shared, weak, exclusive and context-dependent concepts."
    notes: ClassVar = (
        "Intervals: 95 %, Student's t over seeds of data and initialisation. Figures without a case in a seed are left out there.",
    )
    index: ClassVar = ("claim",)

    table: pd.DataFrame
    cells: pd.DataFrame

    @property
    def verdict(self) -> str:
        """How many claims hold, and which do not."""
        rows = records(self.table)
        unseen = sum(row["seeds"] == 0 for row in rows)
        fails = [row for row in rows if row["holds"] < row["seeds"]]
        text = f"{len(rows) - len(fails) - unseen} of {len(rows)} claims hold in every seed"
        if any(0 < row["seeds"] < max(row["seeds"] for row in rows) for row in rows):
            text += " that has a case of them"
        text += f", {unseen} could not be judged" if unseen else ""
        names = [
            f"“{row['claim'].removeprefix('... ')}” in {row['holds']} of {row['seeds']}" for row in fails
        ]
        return f"{text}; {', '.join(names)}." if names else f"{text}."

    def plot(self) -> Drawing:
        """Precision before and after the gates, what the wrong calls are, and the two controls."""
        return claims_figure(self.cells)


def synthetic_benchmark(
    *,
    seeds: int = 5,
    fast: bool = False,
    setting: Setting | None = None,
    parts: str | Path | None = None,
    progress: bool = True,
) -> SyntheticBenchmarkResult:
    """The claims of crosscoder papers on planted pairs, for each of ``seeds``; ``fast``: small pairs, for a look in seconds.

    Of the small pairs the claims about wide magnitudes need not hold.  Every training is a part that is kept in ``parts``.

    Claims: Minder et al. 2025 (arXiv:2504.02922), Complete Shrinkage, Latent Decoupling and Latent Scaling; the controls of two
    equal models and of disjoint halves after "Variant-specific crosscoder features are seed-stable ..." (2026).
    """
    if seeds < 1:
        raise ValueError(f"the benchmark wants at least one seed, got {seeds}")
    chosen = setting or (FAST if fast else FULL)
    kept = Parts(parts, study="synthetic-benchmark", setting=asdict(chosen))
    rows = []
    trainings = [(seed, cell) for seed in range(seeds) for cell in CELLS]
    for seed, cell in tracked(trainings, "synthetic benchmark", len(trainings), progress):
        name = f"{cell.name.replace(', ', '-').lower()}-{seed}"
        marks = kept(name, lambda cell=cell, seed=seed: cell_marks(chosen, cell, seed))
        rows.append({"cell": cell.name, "seed": seed} | marks)
    cells = pd.DataFrame(rows).astype({"found_tuned": float, "mcc_tuned": float})
    return SyntheticBenchmarkResult(judged(cells), cells)


def judged(cells: pd.DataFrame) -> pd.DataFrame:
    """The table of claims, from the marks of every cell and seed."""
    by_seed = [group.set_index("cell").to_dict("index") for _, group in cells.groupby("seed")]
    return pd.DataFrame([_row(claim, np.array([claim.figure(m) for m in by_seed])) for claim in CLAIMS])


def _row(claim: Claim, figures: np.ndarray) -> dict[str, float | str | int]:
    known = figures[np.isfinite(figures)]
    low, high = t_interval(known)
    return {
        "claim": claim.text,
        "figure": claim.what,
        "mean": float(known.mean()) if len(known) else np.nan,
        "low": low,
        "high": high,
        "wanted": _wanted(claim),
        "holds": int(((known >= claim.at_least) & (known <= claim.at_most)).sum()),
        "seeds": len(known),
    }


def _wanted(claim: Claim) -> str:
    if np.isinf(claim.at_most):
        return f"≥ {claim.at_least:g}"
    return f"≤ {claim.at_most:g}" if np.isinf(claim.at_least) else f"{claim.at_least:g} to {claim.at_most:g}"
