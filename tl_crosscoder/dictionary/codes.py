"""Sparse codes: which latents are active on which token, and how strongly."""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_crosscoder.dictionary import sparse_ops


@dataclass(frozen=True, eq=False)
class Codes:
    """The active (token, latent) pairs of a batch, in token order: token i owns ``offsets[i]:offsets[i + 1]``.

    ``values`` are unscaled activations f > 0; memory is in proportion to the active pairs, not to ``d_sae``.
    """

    values: Float[Tensor, "nnz"]
    latents: Int[Tensor, "nnz"]
    offsets: Int[Tensor, "_"]
    d_sae: int

    @classmethod
    def from_dense(cls, acts: Float[Tensor, "batch d_sae"]) -> "Codes":
        """The non-zero entries of ``acts``; gradients flow to them."""
        flat = sparse_ops.flat_nonzero(acts.detach() != 0)
        return cls._of(acts.flatten()[flat], flat // acts.shape[1], flat % acts.shape[1], acts.shape)

    @classmethod
    def _of(
        cls, values: Tensor, tokens: Tensor, latents: Tensor, shape: torch.Size | tuple[int, int]
    ) -> "Codes":
        return cls(values, latents, sparse_ops.starts(tokens, shape[0]), shape[1])

    def __len__(self) -> int:
        """The number of tokens."""
        return len(self.offsets) - 1

    @property
    def l0(self) -> float:
        """Mean number of active latents per token."""
        return len(self.values) / max(1, len(self))

    def tokens(self) -> Int[Tensor, "nnz"]:
        """The token index of each pair."""
        rows = torch.arange(len(self), device=self.offsets.device)
        return torch.repeat_interleave(rows, self.offsets.diff(), output_size=len(self.values))

    def dense(self) -> Float[Tensor, "batch d_sae"]:
        """The matrix of activations, zero where no pair is."""
        acts = self.values.new_zeros(len(self), self.d_sae)
        return acts.index_put((self.tokens(), self.latents), self.values)

    def only(self, latents: Int[Tensor, "latent"]) -> "Codes":
        """The pairs of these latents; the tokens and ``d_sae`` stay."""
        chosen = torch.zeros(self.d_sae, dtype=torch.bool, device=self.latents.device)
        chosen[latents] = True
        keep = chosen[self.latents]
        return self._of(self.values[keep], self.tokens()[keep], self.latents[keep], (len(self), self.d_sae))

    def with_values(self, values: Float[Tensor, "nnz"]) -> "Codes":
        """The same pairs with other strengths."""
        return replace(self, values=values)

    @cached_property
    def pairs(self) -> sparse_ops.Pairs:
        """The active pairs without their strengths."""
        return sparse_ops.Pairs(self.tokens(), self.latents, self.offsets, self.d_sae)

    def decode(self, rows: Float[Tensor, "d_sae *rest"]) -> Float[Tensor, "batch *rest"]:
        """``Σ_j f_j · rows[j]`` for each token."""
        return sparse_ops.decode_pairs(self.values, rows, self.pairs)
