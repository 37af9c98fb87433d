"""Do two latents fire on the same tokens?  How strong the one is where the other is how strong, for many pairs in one pass."""

from typing import cast

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy import sparse
from torch import Tensor

from tl_crosscoder.dictionary.codes import Codes

#: Between the five bins of an activation relative to the largest one (arXiv:2504.02922, the authors' code).
EDGES = (1e-6, 0.1, 0.4, 0.7)
BINS = len(EDGES) + 1
LOW, HIGH = slice(0, 2), slice(3, BINS)  # at most .1, above .4


class Coactivation:
    """``histograms``: for each pair the tokens by bin of the first latent and bin of the second, ``[pair, 5, 5]``.

    An activation is divided by its latent's ``scale`` in that pair (:func:`pair_scales`).  Costs go with the activations of the
    paired latents, never with tokens x latents.
    """

    def __init__(self, pairs: Int[Tensor, "pair 2"], scales: Float[Tensor, "pair 2"]):
        self.pairs, self.scales = pairs.numpy(), scales.double().numpy()
        self.counts = np.zeros(len(pairs) * BINS**2, dtype=np.int64)
        self.tokens = 0

    def update(self, codes: Codes, of_second: Codes | None = None) -> None:
        """Look at one batch of codes; ``of_second``: what the second latents' are read off, if not the same."""
        self.tokens += len(codes)
        acts = sparse.csc_matrix(csr(codes))
        others = acts if of_second is None or of_second is codes else sparse.csc_matrix(csr(of_second))
        first, second = self._binned(acts, 0), self._binned(others, 1)
        both = cast(
            sparse.csc_matrix, BINS * first + second
        )  # not 0 where one of the two is in a bin above the first
        pair = np.repeat(np.arange(len(self.pairs)), np.diff(both.indptr))
        self.counts += np.bincount(pair * BINS**2 + both.data.astype(np.int64), minlength=len(self.counts))

    def _binned(self, acts: sparse.csc_matrix, side: int) -> sparse.csc_matrix:
        """The bin of each activation, ``[tokens, pair]``; bin 0 is left out."""
        mine = cast(sparse.csc_matrix, acts[:, self.pairs[:, side]])
        scale = np.repeat(self.scales[:, side], np.diff(mine.indptr))
        binned = sparse.csc_matrix(
            (np.digitize(mine.data / scale, EDGES), mine.indices, mine.indptr), shape=mine.shape
        )
        binned.eliminate_zeros()
        return binned

    @property
    def histograms(self) -> Int[np.ndarray, "pair 5 5"]:
        """Every token is in one bin of each pair."""
        counts = self.counts.reshape(-1, BINS**2).copy()
        counts[:, 0] = self.tokens - counts.sum(1)
        return counts.reshape(-1, BINS, BINS)


def divergence(histograms: Int[np.ndarray, "pair 5 5"]) -> Float[np.ndarray, " pair"]:
    """1: where one of the pair fires strongly (above .4) the other is all but silent (at most .1).  NaN where neither ever does.

    Not one minus :func:`coactivation`: between silent and strong there is a bin of its own.
    """
    apart = histograms[:, HIGH, LOW].sum((1, 2)) + histograms[:, LOW, HIGH].sum((1, 2))
    return _ratio(apart, strong(histograms))


def coactivation(histograms: Int[np.ndarray, "pair 5 5"]) -> Float[np.ndarray, " pair"]:
    """1: where one of the pair fires strongly the other does too.  NaN where neither ever does."""
    return _ratio(histograms[:, HIGH, HIGH].sum((1, 2)), strong(histograms))


def strong(histograms: Int[np.ndarray, "pair 5 5"]) -> Int[np.ndarray, " pair"]:
    """The tokens where one of the pair, or both, fires strongly."""
    one, other, both = histograms[:, HIGH], histograms[:, :, HIGH], histograms[:, HIGH, HIGH]
    return one.sum((1, 2)) + other.sum((1, 2)) - both.sum((1, 2))


def csr(codes: Codes) -> sparse.csr_matrix:
    """The activations as scipy's sparse matrix, ``[tokens, d_sae]``."""
    parts = (codes.values, codes.latents, codes.offsets)
    values, latents, offsets = (part.detach().cpu().numpy() for part in parts)
    return sparse.csr_matrix((values, latents, offsets), shape=(len(codes), codes.d_sae))


def _ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.divide(a, b, out=np.full(len(b), np.nan), where=b > 0)


def pair_scales(
    largest: Float[Tensor, " d_sae"],
    pairs: Int[Tensor, "pair 2"],
    weights: Float[Tensor, " d_sae"] | None = None,
) -> Float[Tensor, "pair 2"]:
    """Each latent's own largest activation; with ``weights`` (decoder norms) where it writes as much as the pair ever does."""
    own = largest.double()[pairs]
    if weights is None:
        return own
    norms = weights.double()[pairs]
    return (own * norms).amax(1, keepdim=True) / torch.where(norms > 0, norms, torch.nan)
