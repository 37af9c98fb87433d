"""Sets of latents to compare with: as large, as loud or as often on, but not chosen by the ranking."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float

from tl_crosscoder.studies.by_latent import by_latent

NEIGHBOURS = 25  # each match is drawn from this many latents nearest in magnitude


def written_magnitude(table: pd.DataFrame) -> Float[np.ndarray, " d_sae"]:
    """``E[f_j] ‖d_j^tuned‖``: how much each latent writes into the tuned model, over all tokens; NaN where it never fired."""
    apart = "tuned_mass" in table  # each model chose for itself
    mass = table["tuned_mass"] if apart else table["mean_act"] * table["frequency"]
    return (mass * table["norm_tuned"]).to_numpy(float)


def matched_random(
    table: pd.DataFrame, latents: Sequence[int], *, n_draws: int, seed: int, exclude: Sequence[int] = ()
) -> list[list[int]]:
    """``n_draws`` sets as large as ``latents``, each member near one of them in mean written magnitude ``E[f_j]
    ‖d_j^tuned‖``; one that writes into base alone is matched by what it writes there.

    Drawn without replacement from the live latents outside ``latents`` and ``exclude``.  Matching on magnitude
    keeps a control from failing only because it is quieter."""
    magnitude = _log(written_magnitude(table), table)
    place = {int(latent): i for i, latent in enumerate(table.index)}
    asked = [place[j] for j in latents]
    wanted = magnitude[asked]
    if np.isnan(wanted).any() and "norm_base" in table:
        in_base = (table["mean_act"] * table["frequency"] * table["norm_base"]).to_numpy(float)
        wanted = np.where(np.isnan(wanted), _log(in_base, table)[asked], wanted)
    if np.isnan(wanted).any():
        silent = [j for j, value in zip(latents, wanted, strict=True) if np.isnan(value)]
        raise ValueError(f"latents {silent} never fired, or write nothing: nothing can be matched to them.")
    free = magnitude.copy()
    free[[place[j] for j in {*latents, *exclude}]] = np.nan
    if (n_free := int(np.isfinite(free).sum())) < len(wanted):
        raise ValueError(
            f"{len(wanted)} matched latents wanted, only {n_free} other live latents; choose fewer latents."
        )
    rng = np.random.default_rng(seed)
    ids = table.index.to_numpy()
    return [ids[_draw(free, wanted, rng)].tolist() for _ in range(n_draws)]


def _log(magnitude: Float[np.ndarray, " d_sae"], table: pd.DataFrame) -> Float[np.ndarray, " d_sae"]:
    """NaN where nothing is written or the latent never fired."""
    live = (magnitude > 0) & (table["n_fired"].to_numpy() > 0)
    return np.log(magnitude, where=live, out=np.full(len(table), np.nan))


def _draw(free: np.ndarray, wanted: np.ndarray, rng: np.random.Generator) -> list[int]:
    """Places in ``free`` (NaN: taken), one near each wanted value, drawn without replacement."""
    free, drawn = np.where(np.isnan(free), np.inf, free), []
    for value in rng.permutation(wanted):
        nearest = np.argsort(np.abs(free - value), kind="stable")[:NEIGHBOURS]
        pick = int(rng.choice(nearest[np.isfinite(free[nearest])]))
        drawn.append(pick)
        free[pick] = np.inf
    return drawn


def same_firing(
    table: pd.DataFrame, mass: Float[np.ndarray, " d_sae"], n: int, *, exclude: Sequence[int] = ()
) -> list[int]:
    """The ``n`` latents that write most (``mass``, latent by latent) on the behaviour's own tokens and are of class ``shared``."""
    table = by_latent(table, len(mass))
    shared = (table["class"] == "shared").to_numpy() & ~table.index.isin(list(exclude))
    order = np.argsort(-mass, kind="stable")
    return order[shared[order]][:n].tolist()
