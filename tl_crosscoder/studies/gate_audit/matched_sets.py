"""What the gated latents are compared with: sets as large, loud and frequent, and their own activations on other directions."""

import copy
from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch

from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.studies.controls import written_magnitude
from tl_crosscoder.types import TUNED

CALIPER, NEAREST = 0.1, 5


def matched_sets(
    table: pd.DataFrame, gated: Sequence[int], pool: Sequence[int], *, n_draws: int, seed: int = 0
) -> tuple[list[list[int]], float]:
    """``n_draws`` sets as large as ``gated`` out of ``pool``, and the share of their members outside the caliper.

    Greedily, in random order: among what is left within .1 (log10) of a member's mean written magnitude E[f] ‖d_tuned‖, one of the
    five nearest in frequency; where nothing is within, the nearest in magnitude.  Raises ValueError where the pool is too small
    and for members that write nothing into the tuned model.
    """
    magnitude = written_magnitude(table)
    frequency = table["frequency"].to_numpy(float)
    place = {int(j): i for i, j in enumerate(table.index)}
    own = [place[int(j)] for j in gated]
    if mute := [int(j) for j in gated if not magnitude[place[int(j)]] > 0]:
        raise ValueError(
            f"latents {mute} write nothing into the tuned model: nothing can be matched to them."
        )
    candidates = [
        place[int(j)] for j in pool if int(j) not in set(map(int, gated)) and magnitude[place[int(j)]] > 0
    ]
    if len(candidates) < len(own):
        raise ValueError(
            f"{len(own)} matched latents wanted, {len(candidates)} other live latents; raise the threshold."
        )
    loud, often = np.log10(magnitude[candidates]), np.log10(frequency[candidates])
    rng, sets, outside = np.random.default_rng(seed), [], 0
    for _ in range(n_draws):
        free, drawn = np.ones(len(candidates), dtype=bool), []
        for member in rng.permutation(own).tolist():
            gap = np.where(free, np.abs(loud - np.log10(magnitude[member])), np.inf)
            near = np.flatnonzero(gap <= CALIPER)
            if len(near):
                apart = np.abs(often[near] - np.log10(frequency[member]))
                pick = int(rng.choice(near[np.argsort(apart, kind="stable")[:NEAREST]]))
            else:
                pick, outside = int(np.argmin(gap)), outside + 1
            free[pick] = False
            drawn.append(int(table.index[candidates[pick]]))
        sets.append(drawn)
    return sets, outside / max(1, n_draws * len(own))


@torch.no_grad()
def turned(crosscoder: Crosscoder, latents: Sequence[int], seed: int) -> Crosscoder:
    """A copy that writes these latents into the tuned model along random directions of the same length; its codes are the same."""
    other = copy.deepcopy(crosscoder)
    ids = torch.as_tensor(list(latents), device=other.W_dec.device)
    rows = other.W_dec[ids, TUNED]
    random = torch.randn(rows.shape, generator=torch.Generator().manual_seed(seed)).to(rows)
    other.W_dec[ids, TUNED] = random / random.norm(dim=-1, keepdim=True) * rows.norm(dim=-1, keepdim=True)
    return other
