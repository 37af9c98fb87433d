"""Codes: which latents are active on which token, and how strongly.

Two forms with the same methods: :class:`Codes` lists the active pairs; :class:`DenseCodes` writes every activation out, for
batches in which so many latents are active that listing them would cost more.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_crosscoder.dictionary import sparse_ops


@dataclass(frozen=True, eq=False)
class Codes:
    """The active (token, latent) pairs of a batch, in token order: token i owns ``offsets[i]:offsets[i + 1]``.

    ``values`` are unscaled activations f > 0; memory is in proportion to the active pairs, not to ``d_sae``.  ``gates``: the models
    into which each pair writes, where each model chooses for itself (``code_norm="decoupled"``); None: into all.
    """

    values: Float[Tensor, "nnz"]
    latents: Int[Tensor, "nnz"]
    offsets: Int[Tensor, "_"]
    d_sae: int
    gates: Bool[Tensor, "nnz model"] | None = None

    @classmethod
    def from_dense(cls, acts: Float[Tensor, "batch d_sae"]) -> "Codes":
        """The non-zero entries of ``acts``; gradients flow to them."""
        flat = sparse_ops.flat_nonzero(acts.detach() != 0)
        return cls._of(acts.flatten()[flat], flat // acts.shape[1], flat % acts.shape[1], acts.shape)

    @classmethod
    def at(
        cls,
        pairs: sparse_ops.Pairs,
        values: Float[Tensor, "nnz"],
        gates: Bool[Tensor, "nnz model"] | None = None,
    ) -> "Codes":
        """Strengths of pairs that are known already."""
        codes = cls(values, pairs.latents, pairs.offsets, pairs.d_sae, gates)
        vars(codes)["pairs"] = pairs
        return codes

    @classmethod
    def _of(
        cls,
        values: Tensor,
        tokens: Tensor,
        latents: Tensor,
        shape: torch.Size | tuple[int, int],
        gates: Tensor | None = None,
    ) -> "Codes":
        return cls(values, latents, sparse_ops.starts(tokens, shape[0]), shape[1], gates)

    def __len__(self) -> int:
        """The number of tokens."""
        return len(self.offsets) - 1

    @property
    def n_active(self) -> int:
        """The number of active pairs."""
        return len(self.values)

    @property
    def l0(self) -> float:
        """Mean number of active latents per token."""
        return self.n_active / max(1, len(self))

    def tokens(self) -> Int[Tensor, "nnz"]:
        """The token index of each pair."""
        rows = torch.arange(len(self), device=self.offsets.device)
        return torch.repeat_interleave(rows, self.offsets.diff(), output_size=len(self.values))

    def fired(self) -> Bool[Tensor, "d_sae"]:
        """The latents that are active on some token."""
        fired = torch.zeros(self.d_sae, dtype=torch.bool, device=self.latents.device)
        fired[self.latents] = True
        return fired

    def dense(self) -> Float[Tensor, "batch d_sae"]:
        """The matrix of activations, zero where no pair is."""
        acts = self.values.new_zeros(len(self), self.d_sae)
        return acts.index_put((self.pairs.tokens, self.latents), self.values)

    def scaled(self, weights: Float[Tensor, "d_sae"]) -> Float[Tensor, "nnz"]:
        """Each activation times its latent's weight; where a latent is not active the product would be 0."""
        return self.values * self.of_latents(weights)

    def of_latents(self, numbers: Float[Tensor, "d_sae"]) -> Float[Tensor, "nnz"]:
        """The number of each activation's latent, in the place that the activation has in ``scaled``."""
        return numbers[self.latents]

    def only(self, latents: Int[Tensor, "latent"] | slice) -> "Codes":
        """The pairs of these latents; the tokens and ``d_sae`` stay."""
        chosen = torch.zeros(self.d_sae, dtype=torch.bool, device=self.latents.device)
        chosen[latents] = True
        keep = chosen[self.latents]
        gates = None if self.gates is None else self.gates[keep]
        return self._of(
            self.values[keep], self.pairs.tokens[keep], self.latents[keep], (len(self), self.d_sae), gates
        )

    def of_model(self, model: int) -> "Codes":
        """What is written into one model: the same pairs, 0 where the model does not have them."""
        if self.gates is None:
            return self
        return replace(self, values=self.values * self.gates[:, model], gates=None)

    def with_values(self, values: Float[Tensor, "nnz"]) -> "Codes":
        """The same pairs with other strengths."""
        return replace(self, values=values)

    @cached_property
    def pairs(self) -> sparse_ops.Pairs:
        """The active pairs without their strengths."""
        return sparse_ops.Pairs(self.tokens(), self.latents, self.offsets, self.d_sae)

    def decode(self, rows: Float[Tensor, "d_sae *rest"]) -> Float[Tensor, "batch *rest"]:
        """``Σ_j f_j · rows[j]`` for each token; with gates, rows [d_sae, model, ...], each model's from what is on there."""
        if self.gates is None:
            return sparse_ops.decode_pairs(self.values, rows, self.pairs)
        n_models = self.gates.shape[1]
        if rows.shape[1:2] != (n_models,):
            raise ValueError(
                f"these codes write into each of {n_models} models apart, so they decode rows [d_sae, model={n_models}, ...]; got "
                f"rows {list(rows.shape)}"
            )
        written = (
            sparse_ops.decode_pairs(self.of_model(m).values, rows[:, m], self.pairs) for m in range(n_models)
        )
        return torch.stack(list(written), 1)

    def decode_prefixes(
        self, rows: Float[Tensor, "d_sae *rest"], ends: Sequence[int]
    ) -> Float[Tensor, "prefix batch *rest"]:
        """``Σ_{j < end} f_j · rows[j]`` for each of the ascending ``ends``; each pair is decoded once."""
        inside = self.latents < ends[-1]
        values, tokens, latents = self.values[inside], self.pairs.tokens[inside], self.latents[inside]
        part = torch.bucketize(latents, torch.tensor(ends, device=latents.device), right=True)
        order = sparse_ops.sorting_order(part, len(ends))
        # one code with a token for each part of each token, which decodes to what that part adds
        shape = (len(ends) * len(self), self.d_sae)
        gates = None if self.gates is None else self.gates[inside][order]
        parts = self._of(values[order], (part * len(self) + tokens)[order], latents[order], shape, gates)
        return parts.decode(rows).unflatten(0, (len(ends), len(self))).cumsum(0)


@dataclass(frozen=True, eq=False)
class DenseCodes:
    """Every activation of a batch, zeros written out."""

    acts: Float[Tensor, "batch d_sae"]

    def __len__(self) -> int:
        """The number of tokens."""
        return len(self.acts)

    @property
    def n_active(self) -> int:
        """The number of active pairs."""
        return int(self.acts.count_nonzero())

    @property
    def l0(self) -> float:
        """Mean number of active latents per token."""
        return self.n_active / max(1, len(self))

    def fired(self) -> Bool[Tensor, "d_sae"]:
        """The latents that are active on some token."""
        return (self.acts != 0).any(0)

    def dense(self) -> Float[Tensor, "batch d_sae"]:
        """The matrix of activations."""
        return self.acts

    def scaled(self, weights: Float[Tensor, "d_sae"]) -> Float[Tensor, "batch d_sae"]:
        """Each activation times its latent's weight."""
        return self.acts * weights

    def of_latents(self, numbers: Float[Tensor, "d_sae"]) -> Float[Tensor, "d_sae"]:
        """The number of each activation's latent; broadcasts to the shape of ``scaled``."""
        return numbers

    def only(self, latents: Int[Tensor, "latent"] | slice) -> "DenseCodes":
        """The activations of these latents; the others are 0."""
        chosen = torch.zeros(self.acts.shape[1], dtype=self.acts.dtype, device=self.acts.device)
        chosen[latents] = 1
        return DenseCodes(self.acts * chosen)

    def decode(self, rows: Float[Tensor, "d_sae *rest"]) -> Float[Tensor, "batch *rest"]:
        """``Σ_j f_j · rows[j]`` for each token."""
        return (self.acts @ rows.flatten(1)).unflatten(1, rows.shape[1:])

    def decode_prefixes(
        self, rows: Float[Tensor, "d_sae *rest"], ends: Sequence[int]
    ) -> Float[Tensor, "prefix batch *rest"]:
        """``Σ_{j < end} f_j · rows[j]`` for each of the ascending ``ends``."""
        parts = zip((0, *ends), ends, strict=False)
        added = torch.stack([self.acts[:, a:b] @ rows[a:b].flatten(1) for a, b in parts])
        return added.unflatten(-1, rows.shape[1:]).cumsum(0)
