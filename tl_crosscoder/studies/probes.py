"""Tokens on which to ask what a latent does: those on which it is active, weak and strong alike."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from tl_crosscoder.analysis.base import encoded
from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.models.activations import PairedActivations
from tl_crosscoder.studies.pool import Pool
from tl_crosscoder.studies.progress import TrackedBatches

STRATA, POOL = 8, 2048


def active_probes(
    crosscoder: Crosscoder,
    store: PairedActivations,
    latents: Sequence[int],
    n: int,
    *,
    seed: int = 0,
    progress: bool = False,
) -> pd.DataFrame:
    """At most ``n`` of each latent's active tokens: ``latent, value, sequence, position``.

    Drawn evenly from eight strata of equal width between the latent's weakest and strongest activation (among 2,048 random
    ones), so that rare strong firings are there; what a stratum lacks is drawn from the others.
    """
    pool, rng, wanted = Pool(POOL), np.random.default_rng(seed), np.zeros(crosscoder.d_sae, dtype=bool)
    wanted[list(latents)] = True
    for batch in encoded(crosscoder, TrackedBatches(store, "looking for active tokens", progress)):
        latent, token = batch.codes.latents.cpu().numpy(), batch.tokens.cpu().numpy()
        here = np.flatnonzero(wanted[latent])
        places = {name: getattr(batch, name).cpu().numpy()[token[here]] for name in ("sequence", "position")}
        value = batch.codes.values.float().cpu().numpy()[here]
        pool.add(latent[here], rng.random(len(here)), value=value, **places)
    found = pool.table()
    if not len(found):
        return pd.DataFrame({"latent": [], "value": [], "sequence": [], "position": []})
    chosen = [stratified(group, n, rng) for _, group in found.groupby("latent")]
    return pd.concat(chosen, ignore_index=True).drop(columns="key")


def stratified(rows: pd.DataFrame, n: int, rng: np.random.Generator) -> pd.DataFrame:
    """``n`` rows, as evenly as there are over equal-width strata of ``value``."""
    if len(rows) <= n:
        return rows
    value = rows["value"].to_numpy()
    width = np.ptp(value) or 1.0
    stratum = np.minimum((STRATA * (value - value.min()) / width).astype(int), STRATA - 1)
    order = rng.permutation(len(rows))
    # the first of every stratum, then the second of every one ...
    turn = pd.Series(stratum[order]).groupby(stratum[order]).cumcount().to_numpy()
    return rows.iloc[np.sort(order[np.argsort(turn, kind="stable")[:n]])]


def last_token_probes(
    crosscoder: Crosscoder, store: PairedActivations, latents: Sequence[int], n: int, *, seed: int = 0
) -> pd.DataFrame:
    """The published choice: the last tokens of ``n`` random sequences, the same for all latents, where each is active."""
    rng = np.random.default_rng(seed)
    sequences = rng.permutation(store.sequences)[:n].tolist()
    rows = []
    for sequence in sequences:
        here = store.subset([sequence])
        *_, batch = encoded(crosscoder, here)
        last = batch.tokens == len(batch.codes) - 1
        chosen = {
            "latent": batch.codes.latents[last].cpu().numpy(),
            "value": batch.codes.values[last].cpu().numpy(),
        }
        rows.append(
            pd.DataFrame({**chosen, "sequence": sequence, "position": int(batch.position[-1])}).astype(
                {"latent": int, "value": float}
            )
        )
    found = pd.concat(rows, ignore_index=True)
    keep = np.isin(found["latent"].to_numpy(), list(latents))
    return found.iloc[np.flatnonzero(keep)].sort_values(["latent"], kind="stable", ignore_index=True)
