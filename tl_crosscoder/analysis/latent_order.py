"""The active pairs of a batch grouped by latent, and the sums over tokens that every analysis is made of.

Costs go with the number of active pairs, never with batch x d_sae.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import embedding_bag

from tl_crosscoder.dictionary.codes import Codes

FLOATS_AT_ONCE = 1 << 24  # bounds the temporaries at 64 MB, whatever d_sae is


@dataclass(frozen=True)
class LatentOrder:
    """Pairs sorted by latent: ``fired[i]`` owns ``tokens[offsets[i] : offsets[i + 1]]`` and the values beside them.

    ``gates``: the models each pair writes into; None: all.
    """

    tokens: Int[Tensor, " nnz"]
    values: Float[Tensor, " nnz"]
    fired: Int[Tensor, " fired"]
    offsets: Int[Tensor, " fired_plus_1"]
    d_sae: int
    gates: Bool[Tensor, " nnz model"] | None = None

    @classmethod
    def of(cls, codes: Codes, tokens: Int[Tensor, " nnz"]) -> "LatentOrder":
        order = torch.argsort(codes.latents, stable=True)
        fired, counts = torch.unique_consecutive(codes.latents[order], return_counts=True)
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        gates = None if codes.gates is None else codes.gates[order]
        return cls(tokens[order], codes.values[order], fired, offsets, codes.d_sae, gates)

    def of_model(self, model: int) -> "LatentOrder":
        """With what is written into one model alone: 0 where it does not have the latent."""
        if self.gates is None:
            return self
        return replace(self, values=self.values * self.gates[:, model], gates=None)

    def total(self, per_pair: Float[Tensor, " nnz"]) -> Float[Tensor, " d_sae"]:
        """Sum a value of each pair (in this order) over each latent's tokens, in float64."""
        out = torch.zeros(self.d_sae, dtype=torch.float64, device=per_pair.device)
        lengths = self.offsets.diff()
        owner = torch.repeat_interleave(self.fired, lengths)
        return out.index_add_(0, owner, per_pair.double())

    def maximum(self, per_pair: Float[Tensor, " nnz"]) -> Float[Tensor, " d_sae"]:
        """The largest value of each latent's pairs; 0 where it did not fire (values are taken to be positive)."""
        out = torch.zeros(self.d_sae, dtype=per_pair.dtype, device=per_pair.device)
        owner = torch.repeat_interleave(self.fired, self.offsets.diff())
        return out.scatter_reduce_(0, owner, per_pair, "amax")

    def weighted_dots(
        self, a: Float[Tensor, "batch target d_in"], rows: Float[Tensor, "d_sae d_in"]
    ) -> Float[Tensor, "d_sae target"]:
        """``Σ_i f_ij ⟨rows_j, a_i⟩`` for each latent and each target; float64, to add up over batches.

        The sum over tokens comes first (``Σ_i f_ij a_i``, one gather per active pair), the dot product once per latent.
        """
        out = torch.zeros(self.d_sae, a.shape[1], dtype=torch.float64, device=a.device)
        for latents, sums in self._sums(a.reshape(len(a), -1)):
            part = sums.unflatten(1, a.shape[1:])
            out[latents] = (part @ rows[latents][:, :, None])[:, :, 0].double()
        return out

    def _sums(self, flat: Float[Tensor, "batch width"]) -> Iterator[tuple[Tensor, Tensor]]:
        """``Σ_i f_ij a_i`` for blocks of the latents that fired."""
        block = max(1, FLOATS_AT_ONCE // max(1, flat.shape[1]))
        for start in range(0, len(self.fired), block):
            stop = min(start + block, len(self.fired))
            lo, hi = int(self.offsets[start]), int(self.offsets[stop])
            bags = self.offsets[start:stop] - lo
            weights = self.values[lo:hi].to(flat.dtype)
            yield (
                self.fired[start:stop],
                embedding_bag(self.tokens[lo:hi], flat, bags, mode="sum", per_sample_weights=weights),
            )
