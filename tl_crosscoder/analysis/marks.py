"""How good a dictionary is, by what was planted: a :class:`SyntheticPair` knows the truth about every latent."""

import math
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float

from tl_crosscoder.analysis.decoder_norms import DecoderNorms, mirror_pairs
from tl_crosscoder.analysis.firing import Firing
from tl_crosscoder.analysis.latent_scaling import LatentScaling
from tl_crosscoder.analysis.reconstruction import Reconstruction
from tl_crosscoder.analysis.table import latent_table
from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.dictionary.difference import difference
from tl_crosscoder.dictionary.synthetic import TRUE_BASE_PRESENCE, SyntheticPair
from tl_crosscoder.gates import tuned_specific

#: A concept is found where one latent's activation correlates with its strength at least so much.
FOUND = 0.85


def marks(pair: SyntheticPair, crosscoder: Crosscoder, n: int = 20_000) -> dict[str, Any]:
    """Every mark by name, judged on ``n`` fresh tokens; of a dictionary of the difference, those that are defined for one.

    ``{gate}_precision, _recall, _calls``: of calls of tuned-only concepts by ``norm`` (delta_norm > .9), ``gated`` (and both Latent
    Scaling gates), ``nu`` (the gates alone); the rest in :func:`found` and :func:`strengths`.
    """
    compares = crosscoder.n_models > 1
    batches = pair.sample(n, seed=7).x.split(4096)
    makes = [DecoderNorms, Firing, LatentScaling, Reconstruction] if compares else [Firing, Reconstruction]
    parts = [make(crosscoder) for make in makes]
    table = latent_table(crosscoder, batches if compares else difference(batches), parts)
    metrics = table.attrs["metrics"]
    row = {"l0": metrics["l0"], "dead": metrics["dead_fraction"], "fve": metrics["fve"] if compares else None}
    row["fve_difference"] = metrics["fve_difference" if compares else "fve"]
    row |= found(pair, crosscoder, n)
    if not compares:
        return row
    labels, fired = pair.label(crosscoder, n), table["n_fired"]
    by_norm, by_scaling = table["class"] == "tuned_only", tuned_specific(table) & (fired > 0)
    for name, called in {"norm": by_norm, "gated": by_norm & by_scaling, "nu": by_scaling}.items():
        score = pair.mark(labels, torch.tensor(called.to_numpy()))
        row |= {f"{name}_precision": score.precision, f"{name}_recall": score.recall}
        row[f"{name}_calls"] = score.calls
    row["mirror_pairs"] = mirror_pairs(crosscoder, fired)
    row["largest_delta_norm"] = table.loc[fired > 0, "delta_norm"].max()
    return row | strengths(labels, table)


def found(pair: SyntheticPair, crosscoder: Crosscoder, n: int) -> dict[str, float]:
    """``found``: the share of concepts with a latent of their own (FOUND); ``mcc``: mean correlation; ``_tuned``: of tuned-only.

    Of a dictionary of the difference, concepts of equal strength in both models are not asked for.
    """
    recovery = pair.recovery(crosscoder, n)
    if crosscoder.n_models == 1:
        recovery = recovery[recovery["kind"] != "shared"]
    correlation = np.asarray(recovery["correlation"])
    tuned = correlation[np.asarray(recovery["kind"] == "tuned")]
    return {
        "found": float((correlation >= FOUND).mean()),
        "mcc": float(correlation.mean()),
        "found_tuned": float((tuned >= FOUND).mean()),
        "mcc_tuned": float(tuned.mean()),
    }


def strengths(labels: pd.DataFrame, table: pd.DataFrame) -> dict[str, float]:
    """How well the norms tell what is there; NaN where there is no such latent.

    ``agreement``: correlation of delta_norm with that of the true strengths, of latents about one concept.  ``shrinkage``: how far
    delta_norm of the weak concepts' latents is above the truth, in the median.  ``exclusive``: share of the living latents with
    delta_norm outside .1 to .9.  ``shared_nu_error, shared_nu_recon``: medians of the shared concepts' latents.  ``caught``: of the
    decoupled concepts' latents called wrongly by norm, the share that nu_recon >= .5 takes back.
    """
    alive = np.asarray(table["n_fired"]) > 0
    delta, nu_error, nu_recon, presence, correlation = (
        np.asarray(column, dtype=float)[alive]
        for column in (
            *(table[name] for name in ("delta_norm", "nu_error", "nu_recon")),
            *(labels[name] for name in ("base_presence", "correlation")),
        )
    )
    kind, truth, about_one = np.asarray(labels["kind"])[alive], presence_norm(presence), correlation > 0.5
    weak, shared = (about_one & (kind == name) for name in ("weak", "shared"))
    called = (kind == "decoupled") & (delta > 0.9) & (presence >= TRUE_BASE_PRESENCE)
    varied = about_one.sum() > 2 and min(np.ptp(delta[about_one]), np.ptp(truth[about_one])) > 0
    return {
        "agreement": float(np.corrcoef(delta[about_one], truth[about_one])[0, 1]) if varied else math.nan,
        "shrinkage": _median((delta - truth)[weak]),
        "exclusive": _mean((delta < 0.1) | (delta > 0.9)),
        "shared_nu_error": _median(nu_error[shared]),
        "shared_nu_recon": _median(nu_recon[shared]),
        "caught": _mean(np.abs(nu_recon[called]) >= 0.5),
    }


def presence_norm(presence: Float[np.ndarray, " latent"]) -> Float[np.ndarray, " latent"]:
    """The delta_norm of a latent whose norms are as its concept's strengths, base / tuned: 1 - r/2, or 1/2r for r > 1."""
    return np.where(presence <= 1, 1 - presence / 2, 0.5 / np.maximum(presence, 1))


def _median(values: np.ndarray) -> float:
    return float(np.median(values)) if len(values) else math.nan


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else math.nan
