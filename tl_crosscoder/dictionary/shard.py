"""Which latents and tokens of a training are in this process, and what it agrees on with the processes that hold the others.

A rank holds every n-th latent and reads a part of each batch: the ranks form a grid of two axes.  Ranks along ``latents`` hold
different latents and read the same tokens, ranks along ``tokens`` the other way round.  How numbers travel is the business of an
:class:`~tl_crosscoder.ranks.Axis`; one process has axes of length 1 and agrees with itself at no cost.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor

from tl_crosscoder.dictionary.scores import Found, Scores
from tl_crosscoder.ranks import ALONE, Axis, total

#: Numbers >= 0 of a width have the order of their bits, read as an integer of that width.
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
#: Bits that one round of counting decides, of one long list and of many rows.
LIST_BITS, ROW_BITS = 11, 8
#: Numbers a row that counting exchanges, about: where the k largest of each rank are fewer, those are exchanged.
COUNTED = 4 << ROW_BITS
#: Names of tensors with a row for each latent.  All others are the same on every rank.
BY_LATENT = {"W_enc_rows", "W_dec", "b_enc", "log_threshold", "tokens_since_fired"}


def by_latent(path: str) -> bool:
    """Whether a name, or one of the names in a dotted path, is that of a tensor with a row for each latent."""
    return not BY_LATENT.isdisjoint(path.split("."))


@dataclass(frozen=True, eq=False)
class Shard:
    """``latents``: the ranks with other latents; ``tokens``: the ranks with other tokens; ``every``: all of them."""

    latents: Axis = ALONE
    tokens: Axis = ALONE
    every: Axis = ALONE

    @property
    def is_first(self) -> bool:
        """The rank that speaks for all."""
        return self.every.index == 0

    @property
    def held(self) -> slice:
        """The latents that are here.  Every n-th: the first latents of a dictionary, often its busiest, are then spread evenly."""
        return slice(self.latents.index, None, self.latents.size)

    def rows(self, path: str, tensor: Tensor) -> Tensor:
        """Of a named tensor the rows of the latents that are here; all of one that has none by latent."""
        return tensor[self.held] if tensor.dim() and by_latent(path) else tensor

    def n_held(self, n: int, what: str = "the first") -> int:
        """How many of the first n latents, or of n neighbours, are here; ValueError where not every rank holds as many."""
        return _share(n, self.latents, f"{what} {n} latents")

    def n_read(self, n: int) -> int:
        """How many tokens of a batch of n are read here; ValueError where not every rank reads as many."""
        return _share(n, self.tokens, f"a batch of {n} tokens")

    def read(self, x: Float[Tensor, "batch model d_in"]) -> Float[Tensor, "part model d_in"]:
        """The tokens of a batch that are read here."""
        n = self.n_read(len(x))
        return x[self.tokens.index * n : (self.tokens.index + 1) * n]

    def sum(self, partial: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """What all latents give together, from what those here give; its gradient is that of each part."""
        return partial if self.latents.size == 1 else _Sum.apply(partial, self.latents)

    def mean(self, value: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """The mean over the batch, from the mean over the tokens here; without a gradient."""
        return value if self.tokens.size == 1 else self.tokens.add_(value.detach().clone()) / self.tokens.size

    def total(self, n: int, axis: Axis | None = None) -> int:
        """The sum of a number over all ranks, or along an axis."""
        return total(self.every if axis is None else axis, n)

    def above(self, scores: Scores, bar: float, limit: int | None = None) -> tuple[Found, int]:
        """The pairs here whose score is above ``bar``, and the number of such pairs on all ranks."""
        found = scores.above(bar, limit)
        return found, self.total(len(found))

    def places(self, found: Found, scores: Scores) -> Int[Tensor, "nnz"]:
        """A number for each pair that grows with the token, then the latent, over all ranks."""
        tokens = self.tokens.index * scores.n_tokens + found.tokens
        latents = self.latents.size * found.latents + self.latents.index
        return tokens * (self.latents.size * scores.d_sae) + latents

    def kth_largest(self, values: Num[Tensor, "nnz"], *k: int) -> tuple[Num[Tensor, ""], ...]:
        """For each k the k-th largest of the lists of all ranks; there are at least k values, none below 0."""
        if self.every.size == 1:
            return tuple(values.kthvalue(len(values) - each + 1).values for each in k)
        left = torch.tensor(k, device=values.device)[:, None]
        return _kth_largest(values.expand(len(k), -1), left, self.every, LIST_BITS)[:, 0].unbind()

    def kth_of_rows(self, values: Float[Tensor, "rows latent"], k: int) -> Float[Tensor, "rows 1"]:
        """The k-th largest of each row over the latents of all ranks; there are at least k, none below 0."""
        n = self.latents.size
        if n > 1 and n * k > COUNTED:
            left = torch.full((len(values), 1), k, device=values.device)
            return _kth_largest(values, left, self.latents, ROW_BITS)
        best = values.topk(min(k, values.shape[1]), dim=-1, sorted=False).values
        if n > 1:  # ranks may hold fewer than k, and not equally many
            table = values.new_zeros(n, len(values), k)
            table[self.latents.index, :, : best.shape[1]] = best
            best = self.latents.add_(table).transpose(0, 1).flatten(1).topk(k, dim=-1, sorted=False).values
        return best.amin(-1, keepdim=True)

    def largest_of_rows(self, values: Float[Tensor, "rows latent"], k: int) -> Bool[Tensor, "rows latent"]:
        """The k largest positive entries of each row over the latents of all ranks; of equal ones the lowest latents."""
        smallest = self.kth_of_rows(values, k)
        chosen = (values >= smallest) & (values > 0)
        crowded = (self.latents.add_(chosen.sum(-1)) > k).nonzero()[:, 0]
        if len(crowded):
            kept = values[crowded] > smallest[crowded]
            room = k - self.latents.add_(kept.sum(-1, keepdim=True))
            chosen[crowded] = kept | self._first(chosen[crowded] & ~kept, room)
        return chosen

    def _first(
        self, marked: Bool[Tensor, "rows latent"], n: Int[Tensor, "rows 1"]
    ) -> Bool[Tensor, "rows latent"]:
        """The first n >= 1 marked entries of each row, which has more, in the order of the latents of all ranks."""
        if self.latents.size == 1:
            return marked & (marked.cumsum(-1) <= n)
        left = torch.arange(marked.shape[1], 0, -1, device=marked.device)
        places = (left * self.latents.size - self.latents.index).where(marked, 0).int()
        return marked & (places >= _kth_largest(places, n, self.latents, ROW_BITS))


WHOLE = Shard()


def _share(n: int, axis: Axis, what: str) -> int:
    if n % axis.size:
        raise ValueError(
            f"{what} cannot be divided evenly among {axis.size} ranks; choose a multiple of {axis.size}"
        )
    return n // axis.size


def _kth_largest(
    values: Num[Tensor, "rows n"], k: Int[Tensor, "rows 1"], axis: Axis, bits: int
) -> Num[Tensor, "rows 1"]:
    """Found from its highest bits down: in each round the ranks count the values that continue what is known with each digit."""
    integer, unknown = INTEGERS[values.element_size()], 8 * values.element_size() - 1
    keys = values.view(integer).long() & ((1 << unknown) - 1)  # without the sign of -0.0
    known = torch.zeros_like(k)
    while unknown:
        width = min(bits, unknown)
        unknown -= width
        digits, mask = keys >> unknown, (1 << width) - 1
        counts = axis.add_(_counted(digits & mask, digits >> width == known, mask + 1))
        at_least = counts.flip(-1).cumsum(-1).flip(-1)  # values with this digit or a higher one
        digit = (at_least >= k).sum(-1, keepdim=True) - 1
        k = k - (at_least - counts).gather(-1, digit)
        known = known << width | digit
    return known.to(integer).view(values.dtype)


def _counted(
    digits: Int[Tensor, "rows n"], open_: Bool[Tensor, "rows n"], size: int
) -> Int[Tensor, "rows size"]:
    counts = torch.zeros(len(digits), size, dtype=torch.int32, device=digits.device)
    return counts.scatter_add_(1, digits, open_.int())


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, partial: Tensor, axis: Axis) -> Tensor:
        del ctx
        return axis.add_(partial.clone(memory_format=torch.contiguous_format))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        del ctx
        return grads[0], None
