"""Which latent of one dictionary is which of another, by when and how strongly they fire on the same tokens."""

from collections.abc import Iterable
from typing import cast

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy import sparse
from torch import Tensor

from tl_crosscoder.analysis.base import evaluating
from tl_crosscoder.analysis.coactivation import csr
from tl_crosscoder.analysis.matching import Matching, Method, match
from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.errors import EmptyData


def acts_of(
    crosscoders: tuple[Crosscoder, Crosscoder], batches: Iterable, most: int = 100_000
) -> tuple[sparse.csc_matrix, sparse.csc_matrix]:
    """The activations of both on the first ``most`` tokens, sparse ``[tokens, d_sae]``: as large as the active pairs."""
    parts: tuple[list, list] = ([], [])
    tokens = 0
    for x in batches:
        if tokens >= most:
            break
        tokens += len(x)
        for crosscoder, kept in zip(crosscoders, parts, strict=True):
            with evaluating(crosscoder):
                codes = crosscoder.encode_sparse(x.to(crosscoder.W_dec.device, crosscoder.W_dec.dtype))
            kept.append(csr(codes))
    if not tokens:
        raise EmptyData("no tokens on which two crosscoders could be compared; was the iterator used up?")
    a, b = (sparse.csc_matrix(sparse.vstack(kept), dtype=np.float64) for kept in parts)
    return a, b


def match_acts(
    acts_a: sparse.csc_matrix,
    acts_b: sparse.csc_matrix,
    latents_a: Int[Tensor, " a"],
    latents_b: Int[Tensor, " b"],
    *,
    method: Method | None = None,
) -> Matching:
    """The matching by Pearson correlation of activations on the same tokens; latents that never fire are like nothing (0)."""
    a, b = acts_a[:, latents_a.numpy()], acts_b[:, latents_b.numpy()]
    n = cast(tuple[int, int], acts_a.shape)[0]
    (mean_a, spread_a), (mean_b, spread_b) = _moments(a, n), _moments(b, n)

    def correlations(i: slice, j: slice) -> Float[Tensor, "i j"]:
        together = (a[:, i].T @ b[:, j]).toarray() / n
        gap = together - np.outer(mean_a[i], mean_b[j])
        spread = np.outer(spread_a[i], spread_b[j])
        return torch.from_numpy(np.divide(gap, spread, out=np.zeros_like(gap), where=spread > 0))

    return match(correlations, len(latents_a), len(latents_b), method=method)


def _moments(acts: sparse.csc_matrix, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each column."""
    mean = np.asarray(acts.sum(0)).ravel() / n
    square = np.asarray(acts.multiply(acts).sum(0)).ravel() / n
    return mean, np.sqrt(np.maximum(square - mean**2, 0))
