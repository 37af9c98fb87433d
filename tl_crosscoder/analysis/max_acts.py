"""The tokens that excite each latent most, and the way back to their text."""

import torch

from tl_crosscoder.analysis.base import Analysis, Columns, EncodedBatch
from tl_crosscoder.dictionary.crosscoder import Crosscoder


class MaxActs(Analysis):
    """For each latent its ``n`` highest activations, at most one a sequence, with sequence and position.

    ``top_values, top_sequences, top_positions [d_sae, n]`` after the pass; unused places have value 0 and
    sequence -1.  Ties keep the token that was seen first."""

    def __init__(self, crosscoder: Crosscoder, n: int = 12):
        super().__init__(crosscoder)
        shape, device = (crosscoder.d_sae, n), crosscoder.W_dec.device
        self.top_values = torch.zeros(shape, device=device)
        self.top_sequences = torch.full(shape, -1, device=device)
        self.top_positions = torch.full(shape, -1, device=device)

    def update(self, batch: EncodedBatch) -> None:
        values, latents = batch.codes.values.float(), batch.codes.latents
        good = values > self.top_values[latents, -1]  # only these can enter the table
        values, latents, tokens = values[good], latents[good], batch.tokens[good]
        if not len(values):
            return
        touched, rank = torch.unique(latents, return_inverse=True)
        n = self.top_values.shape[1]
        old = torch.arange(len(touched), device=values.device).repeat_interleave(n)
        owner = torch.cat([old, rank])
        value = torch.cat([self.top_values[touched].flatten(), values])
        sequence = torch.cat(
            [self.top_sequences[touched].flatten(), batch.sequence.to(values.device)[tokens].long()]
        )
        position = torch.cat(
            [self.top_positions[touched].flatten(), batch.position.to(values.device)[tokens].long()]
        )

        order = torch.argsort(value, descending=True, stable=True)
        owner, value, sequence, position = owner[order], value[order], sequence[order], position[order]
        keep = _first_of_each(owner, sequence) & (value > 0)
        owner, value, sequence, position = owner[keep], value[keep], sequence[keep], position[keep]
        order = torch.argsort(owner, stable=True)
        owner, value, sequence, position = owner[order], value[order], sequence[order], position[order]
        starts = torch.searchsorted(owner, torch.arange(len(touched), device=owner.device))
        place = torch.arange(len(owner), device=owner.device) - starts[owner]
        keep = place < n

        self.top_values[touched], self.top_sequences[touched], self.top_positions[touched] = 0, -1, -1
        row, place = touched[owner[keep]], place[keep]
        self.top_values[row, place] = value[keep]
        self.top_sequences[row, place] = sequence[keep]
        self.top_positions[row, place] = position[keep]

    def columns(self) -> Columns:
        return {"top_sequence": self.top_sequences[:, 0], "top_position": self.top_positions[:, 0]}


def _first_of_each(owner: torch.Tensor, sequence: torch.Tensor) -> torch.Tensor:
    """True at the first occurrence of each (owner, sequence); bare tensors (sequence -1) are never duplicates."""
    nowhere = sequence < 0
    distinct = torch.where(
        nowhere,
        sequence.max().clamp(min=0) + 1 + torch.arange(len(sequence), device=sequence.device),
        sequence,
    )
    key = owner * (distinct.max() + 1) + distinct
    order = torch.argsort(key, stable=True)
    first = torch.ones_like(key, dtype=torch.bool)
    first[1:] = key[order][1:] != key[order][:-1]
    out = torch.empty_like(first)
    out[order] = first
    return out
