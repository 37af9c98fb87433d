"""Ratios of Latent Scaling: which of them mean something, and how the called latents' compare with the shared ones'."""

from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from tl_crosscoder.gates import NU_ERROR_GATE, NU_HIGH, NU_LOW, NU_RECON_GATE

#: a latent is specific to the probed model where both ratios are below
GATES = {"nu_error": NU_ERROR_GATE, "nu_recon": NU_RECON_GATE}
TOO_FEW = 20  # shared latents below which the ends of their distribution are not known


def filtered(frame: Any, least: int) -> Any:
    """The latents with ``dropped`` (the first reason not to use the ratios, or ""), ``rank_sum`` and ``specific``.

    ``rank_sum = rank(nu_error) + rank(nu_recon)`` over what is kept; low: specific to the probed model.
    """
    ratios = frame[list(GATES)]
    side = np.where(frame["probed"] == "tuned", "tuned", "base")
    own = {
        target: np.where(side == "tuned", frame[f"beta_{target}_tuned"], frame[f"beta_{target}_base"])
        for target in ("error", "recon")
    }
    reasons = {
        "too few firings": frame["n_fired"] < least,
        "undefined": ratios.isna().any(axis=1),
        "negative beta": (own["error"] <= 0) | (own["recon"] <= 0),
        "out of range": ((ratios < NU_LOW) | (ratios > NU_HIGH)).any(axis=1),
    }
    dropped = pd.Series(np.select(list(reasons.values()), list(reasons), ""), index=frame.index)
    kept = ratios[dropped == ""]
    small = (ratios.abs() < pd.Series(GATES)).all(axis=1)
    return frame.assign(
        dropped=dropped,
        rank_sum=kept.rank().sum(axis=1).reindex(frame.index),
        specific=small & (dropped == ""),
    )


def target_row(frame: Any, target: str) -> dict[str, Any]:
    """One target: the called latents beside the shared ones, and Δnorm beside the ratio."""
    ratio = frame[f"nu_{target}"].where(frame["dropped"] == "")
    called, shared = ratio[frame["called"]].dropna(), ratio[frame["reference"]].dropna()
    row: dict[str, Any] = {"target": target, "called": len(called), "called_median": _median(called)}
    row |= {"shared": len(shared), "shared_median": _median(shared)}
    enough = len(shared) >= TOO_FEW
    low, high = np.quantile(shared, [0.025, 0.975]).tolist() if enough else (np.nan, np.nan)
    row |= {"shared_low": low, "shared_high": high}
    inside = {"inside": np.nan, "inside_low": np.nan, "inside_high": np.nan}
    if enough and len(called):
        n_inside = int(((called >= low) & (called <= high)).sum())
        interval = stats.binomtest(n_inside, len(called)).proportion_ci(method="wilson")
        inside = {
            "inside": n_inside / len(called),
            "inside_low": interval.low,
            "inside_high": interval.high,
        }
    known = ratio.dropna()
    delta = frame["delta_norm"]
    all_of_them = _correlation(delta[known.index], known)
    own = _correlation(delta[called.index], called)
    return row | inside | all_of_them | {"pearson_called": own["pearson"]}


def _correlation(a: Any, b: Any) -> dict[str, float]:
    """NaN below four latents, and where one of the two does not vary."""
    if len(a) < 4 or a.nunique() < 2 or b.nunique() < 2:
        return dict.fromkeys(("pearson", "pearson_low", "pearson_high", "spearman"), np.nan)
    found: Any = stats.pearsonr(a, b)
    by_rank: Any = stats.spearmanr(a, b)
    interval = found.confidence_interval()
    return {
        "pearson": float(found.statistic),
        "pearson_low": float(interval.low),
        "pearson_high": float(interval.high),
        "spearman": float(by_rank.statistic),
    }


def control_row(frame: Any, called: Any, least: int) -> dict[str, Any]:
    """The called latents with directions that are not theirs: ratios, and how many would pass."""
    frame["probed"] = np.where(frame["probed"] > 0, "tuned", "base")
    here = filtered(frame, least)[called.to_numpy()]
    kept = here[here["dropped"] == ""]
    return {
        "latents": len(here),
        "kept": len(kept),
        "nu_error": _median(kept["nu_error"]),
        "nu_recon": _median(kept["nu_recon"]),
        "specific": float(here["specific"].mean()) if len(here) else np.nan,
    }


def _median(values: Any) -> float:
    return float(values.median()) if len(values) else np.nan
