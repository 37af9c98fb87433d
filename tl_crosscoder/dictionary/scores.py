"""The scores of a batch, looked at only where they can matter.

The score of a (token, latent) pair is ``relu(pre_act) · norm`` with the norm of the latent's decoders.  A sparsity asks for the
pairs above a bar and gets all of them, with their exact pre-activations; how they are found is decided here.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_crosscoder.dictionary.sparse_ops import flat_nonzero

#: Bytes of pre-activations computed at once: they stay in a processor's cache.
BLOCK_BYTES = 1 << 22
#: The same on a GPU: few large products.
GPU_BLOCK_BYTES = 1 << 29


class Crowded(Exception):
    """More pairs are above the bar than pairwise work is worth: take the dense path."""


@dataclass(frozen=True, eq=False)
class Found:
    """Some pairs of a batch, sorted by latent, then token.  ``gates``: in which models each is on; None: in all."""

    tokens: Int[Tensor, "nnz"]
    latents: Int[Tensor, "nnz"]
    pre_acts: Float[Tensor, "nnz"]
    scores: Float[Tensor, "nnz"]
    gates: Bool[Tensor, "nnz model"] | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, chosen: Tensor) -> "Found":
        """The pairs of a mask, or of ascending positions."""
        gates = None if self.gates is None else self.gates[chosen]
        return Found(
            self.tokens[chosen], self.latents[chosen], self.pre_acts[chosen], self.scores[chosen], gates
        )


class Scores(ABC):
    """Where a sparsity looks.  ``norms`` weigh the latents, for each model apart where they are [d_sae, model]; ``limit`` pairs
    are the most it will list."""

    norms: Float[Tensor, "d_sae *model"]
    n_tokens: int
    limit: int | None = None

    @property
    def d_sae(self) -> int:
        return len(self.norms)

    @abstractmethod
    def pre_acts(self) -> Float[Tensor, "batch d_sae"]:
        """Every pre-activation, for a sparsity that must see them all."""

    @abstractmethod
    def sample(self, n_tokens: int) -> "GivenScores":
        """The scores of about ``n_tokens`` tokens spread over the batch."""

    @abstractmethod
    def blocks(self, floor: Float[Tensor, "d_sae"]) -> Iterator["Block"]:
        """Every pair whose pre-activation is above its latent's floor, some others perhaps, in latent order."""

    @abstractmethod
    def part(self, latents: slice) -> "Scores":
        """The scores of neighbouring latents alone, counted from 0; nothing is computed yet."""

    def of_model(self, model: int) -> "Scores":
        """The scores by one model's norms; nothing is computed yet."""
        scores = copy(self)
        scores.norms = self.norms[:, model]
        return scores

    def above(self, bar: float | Float[Tensor, "d_sae"] = 0.0, limit: int | None = None) -> Found:
        """Every pair whose score is above ``bar`` >= 0, and no other.

        Raises Crowded where there are more than ``limit``, by default the one of these scores.
        """
        limit = self.limit if limit is None else limit
        parts, listed = [], 0
        # a little below, so that rounding in the division loses no pair; 0/0 is NaN and lets none pass
        for block in self.blocks(bar / self.norms * (1 - 1e-5)):
            scores = block.pre_acts * self.norms[block.latents]
            keep = flat_nonzero(scores > (bar[block.latents] if isinstance(bar, Tensor) else bar))
            parts.append(Found(*block, scores)[keep])
            listed += len(parts[-1])
            if limit is not None and listed > limit:
                raise Crowded
        columns = zip(*((p.tokens, p.latents, p.pre_acts, p.scores) for p in parts), strict=True)
        return Found(*map(torch.cat, columns))

    def weighed(self) -> Float[Tensor, "batch d_sae"]:
        """Every score, in full."""
        return self.pre_acts().relu().mul_(self.norms)

    def at(self, mask: Bool[Tensor, "batch d_sae"], pre_acts: Float[Tensor, "batch d_sae"]) -> Found:
        """The pairs of a mask over all pre-activations."""
        flat = flat_nonzero(mask.T.contiguous())
        tokens, latents = flat % self.n_tokens, flat // self.n_tokens
        values = pre_acts[tokens, latents]
        return Found(tokens, latents, values, values * self.norms[latents])


def stride(n: int, wanted: int) -> int:
    return max(1, n // wanted)


class Block(NamedTuple):
    """Pairs of some neighbouring latents, in latent order, with exact pre-activations."""

    tokens: Int[Tensor, "nnz"]
    latents: Int[Tensor, "nnz"]
    pre_acts: Float[Tensor, "nnz"]


class GivenScores(Scores):
    """Scores of pre-activations that are there already."""

    def __init__(self, pre_acts: Float[Tensor, "batch d_sae"], norms: Float[Tensor, "d_sae *model"]):
        self._pre_acts, self.norms, self.n_tokens = pre_acts, norms, len(pre_acts)

    def pre_acts(self) -> Float[Tensor, "batch d_sae"]:
        return self._pre_acts

    def sample(self, n_tokens: int) -> "GivenScores":
        return GivenScores(self._pre_acts[:: stride(self.n_tokens, n_tokens)], self.norms)

    def part(self, latents: slice) -> "GivenScores":
        return GivenScores(self._pre_acts[:, latents], self.norms[latents])

    def blocks(self, floor: Float[Tensor, "d_sae"]) -> Iterator[Block]:
        turned = self._pre_acts.T.contiguous()
        flat = flat_nonzero(turned > floor[:, None])
        yield Block(flat % self.n_tokens, flat // self.n_tokens, turned.flatten()[flat])


class ExactScores(Scores):
    """Pre-activations ``x @ rows.T + bias`` computed a block of latents at a time, in the precision of the weights."""

    def __init__(
        self,
        x: Float[Tensor, "batch n"],
        rows: Float[Tensor, "d_sae n"],
        bias: Float[Tensor, "d_sae"],
        norms: Float[Tensor, "d_sae *model"],
        limit: int | None = None,
    ):
        self.x, self.rows, self.bias, self.norms = x, rows, bias, norms
        self.n_tokens, self.limit = len(x), limit

    def pre_acts(self) -> Float[Tensor, "batch d_sae"]:
        return F.linear(self.x, self.rows, self.bias)

    def sample(self, n_tokens: int) -> "GivenScores":
        x = self.x[:: stride(self.n_tokens, n_tokens)]
        return GivenScores(F.linear(x, self.rows, self.bias), self.norms)

    def part(self, latents: slice) -> "ExactScores":
        return type(self)(self.x, self.rows[latents], self.bias[latents], self.norms[latents], self.limit)

    def blocks(self, floor: Float[Tensor, "d_sae"]) -> Iterator[Block]:
        for block in self.slices(self.x.element_size()):
            pre_acts = torch.addmm(self.bias[block, None], self.rows[block], self.x.T)
            flat = flat_nonzero(pre_acts > floor[block, None])
            latents = flat // self.n_tokens
            yield Block(flat - latents * self.n_tokens, latents + block.start, pre_acts.flatten()[flat])

    def slices(self, element_size: int) -> Iterator[slice]:
        """Neighbouring latents whose pre-activations fill a block."""
        room = BLOCK_BYTES if self.norms.device.type == "cpu" else GPU_BLOCK_BYTES
        size = max(64, room // (element_size * max(1, self.n_tokens)))
        for start in range(0, self.d_sae, size):
            yield slice(start, min(start + size, self.d_sae))
