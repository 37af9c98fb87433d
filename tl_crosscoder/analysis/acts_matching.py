"""Which latent of one dictionary is which of another, by when and how strongly they fire on the same tokens."""

from collections.abc import Iterable
from typing import NamedTuple, cast

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy import sparse
from torch import Tensor

from tl_crosscoder.analysis.base import evaluating, located
from tl_crosscoder.analysis.coactivation import csr
from tl_crosscoder.analysis.matching import Matching, Method, match
from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.errors import EmptyData


class SharedActs(NamedTuple):
    """The activations of two dictionaries on the same tokens, sparse ``[tokens, d_sae]``, and the document of each token."""

    a: sparse.csc_matrix
    b: sparse.csc_matrix
    document: Int[np.ndarray, " token"]


def acts_of(crosscoders: tuple[Crosscoder, Crosscoder], batches: Iterable, most: int = 100_000) -> SharedActs:
    """The activations of both on the first ``most`` tokens, as large as the active pairs; bare tensors are one document."""
    parts: tuple[list, list] = ([], [])
    documents, tokens = [], 0
    for x, sequence, _ in located(batches):
        if tokens >= most:
            break
        tokens += len(x)
        documents.append(sequence.cpu().numpy())
        for crosscoder, kept in zip(crosscoders, parts, strict=True):
            with evaluating(crosscoder):
                codes = crosscoder.encode_sparse(x.to(crosscoder.W_dec.device, crosscoder.W_dec.dtype))
            kept.append(csr(codes))
    if not tokens:
        raise EmptyData("no tokens on which two crosscoders could be compared; was the iterator used up?")
    a, b = (sparse.csc_matrix(sparse.vstack(kept), dtype=np.float64) for kept in parts)
    return SharedActs(a, b, np.concatenate(documents))


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


def shifted(acts: sparse.csc_matrix, document: Int[np.ndarray, " token"], seed: int) -> sparse.csc_matrix:
    """The activations after a turn of each document's tokens by a random number of places: what runs off the end begins it.

    Which documents a latent fires in, how often, how strongly and in what runs stays; on which tokens is forgotten.  A document
    is a run of tokens with one number; one of a single token stays.
    """
    rng, n = np.random.default_rng(seed), len(document)
    starts = np.flatnonzero(np.r_[True, document[1:] != document[:-1]]) if n else np.zeros(0, dtype=int)
    lengths = np.diff(np.r_[starts, n])
    turns = np.where(lengths > 1, 1 + (rng.random(len(lengths)) * (lengths - 1)).astype(int), 0)
    start, length, turn = (np.repeat(each, lengths) for each in (starts, lengths, turns))
    order = start + (np.arange(n) - start + turn) % length
    return sparse.csc_matrix(sparse.csr_matrix(acts)[order])
