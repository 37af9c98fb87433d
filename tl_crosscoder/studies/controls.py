"""Sets of latents to compare with: as large, as loud or as often on, but not chosen by the ranking."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

NEIGHBOURS = 25  # each match is drawn from this many latents nearest in magnitude


def matched_random(
    table: pd.DataFrame, latents: Sequence[int], *, n_draws: int, seed: int, exclude: Sequence[int] = ()
) -> list[list[int]]:
    """``n_draws`` sets as large as ``latents``, each member near one of them in mean written magnitude ``E[f_j]
    ‖d_j^tuned‖``.

    Drawn without replacement from the live latents outside ``latents`` and ``exclude``.  Matching on magnitude
    keeps a control from failing only because it is quieter."""
    magnitude = np.log(
        (table["mean_act"] * table["frequency"] * table["norm_tuned"]).where(table["n_fired"] > 0)
    )
    magnitude = magnitude.replace([np.inf, -np.inf], np.nan)
    wanted = magnitude.loc[list(latents)]
    if wanted.isna().any():
        raise ValueError(
            f"latents {wanted[wanted.isna()].index.tolist()} never fired: nothing can be matched to them."
        )
    pool = magnitude.drop(index=list(set(latents) | set(exclude))).dropna()
    if len(pool) < len(wanted):
        raise ValueError(
            f"{len(wanted)} matched latents wanted, only {len(pool)} other live latents; choose fewer latents."
        )
    rng = np.random.default_rng(seed)
    return [_draw(pool, wanted.to_numpy(), rng) for _ in range(n_draws)]


def _draw(pool: pd.Series, wanted: np.ndarray, rng: np.random.Generator) -> list[int]:
    free, ids, drawn = pool.to_numpy().copy(), pool.index.to_numpy(), []
    for magnitude in rng.permutation(wanted):
        nearest = np.argsort(np.abs(free - magnitude), kind="stable")[:NEIGHBOURS]
        nearest = nearest[np.isfinite(free[nearest])]
        pick = rng.choice(nearest)
        drawn.append(int(ids[pick]))
        free[pick] = np.inf
    return drawn


def same_firing(
    table: pd.DataFrame, mass_on_behaviour: pd.Series, n: int, *, exclude: Sequence[int] = ()
) -> list[int]:
    """The ``n`` latents that write most on the behaviour's own tokens and are *not* tuned-specific (class ``shared``)."""
    shared = table.index[(table["class"] == "shared") & ~table.index.isin(list(exclude))]
    return mass_on_behaviour.loc[shared].sort_values(ascending=False, kind="stable").index[:n].tolist()
