"""TokenBatch: a padded batch of token sequences, and the one place that decides masks and positions.

The mask comes from ``attention_mask``, never from the ids: padding is often the end-of-turn token.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, Union

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tl_crosscoder.errors import EmptyData, ShapeMismatch
from tl_crosscoder.models.tokenizer import special_ids

Side = Literal["left", "right"]

#: A batch, or ids [seq, pos] of which every one is a real token.  Texts are refused, with the remedy.
Tokens = Union["TokenBatch", Tensor, Sequence[Any]]


@dataclass(frozen=True, eq=False)
class TokenBatch:
    """Padded sequences with one flag tensor for each thing that is known about a token.

    ``attention_mask``: real tokens.  ``special``: the tokenizer's special tokens.  ``template``: what the
    chat template wrote and no message said (role headers, end of turn, BOS).  ``assistant``: words of an
    assistant turn.  ``preamble``: the prefix that all chats of the corpus share.  Padding has no flags.
    """

    ids: Int[Tensor, "seq pos"]
    attention_mask: Bool[Tensor, "seq pos"]
    special: Bool[Tensor, "seq pos"]
    template: Bool[Tensor, "seq pos"]
    assistant: Bool[Tensor, "seq pos"]
    preamble: Bool[Tensor, "seq pos"]

    @classmethod
    def from_ids(
        cls,
        ids: Int[Tensor, "seq pos"],
        attention_mask: Tensor | None = None,
        special_ids: Iterable[int] = (),
    ) -> "TokenBatch":
        """A batch of plain text; without a mask every token is real, whatever its id.

        Raises ShapeMismatch for a mask of another shape and EmptyData for a row without a real token.
        """
        mask = torch.ones_like(ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        if mask.shape != ids.shape:
            raise ShapeMismatch(
                f"TokenBatch wants a mask value per id; ids are {list(ids.shape)}, the mask {list(mask.shape)}."
            )
        if ids.numel() == 0 or not mask.any(dim=1).all():
            empty = "the batch" if ids.numel() == 0 else f"row {int((~mask.any(dim=1)).nonzero()[0, 0])}"
            raise EmptyData(f"{empty} has no real token; leave empty texts out.")
        special = (
            torch.isin(ids, torch.tensor(sorted(special_ids), dtype=ids.dtype, device=ids.device)) & mask
        )
        no = torch.zeros_like(mask)
        return cls(ids, mask, special, no, no, no)

    @property
    def position_ids(self) -> Int[Tensor, "seq pos"]:
        """0 at the first real token of each row and counting up; padding gets 0."""
        return (self.attention_mask.long().cumsum(dim=1) - 1).masked_fill(~self.attention_mask, 0)

    @property
    def first(self) -> Bool[Tensor, "seq pos"]:
        """The first real token of each row, which is not column 0 under left padding."""
        return self.attention_mask & (self.attention_mask.long().cumsum(dim=1) == 1)

    @property
    def is_left_padded(self) -> bool:
        """Whether every row ends with a real token."""
        return torch.equal(self.attention_mask, self.attention_mask.sort(dim=1, stable=True).values)

    @property
    def lengths(self) -> Int[Tensor, "seq"]:
        """Real tokens of each row."""
        return self.attention_mask.sum(dim=1)

    @property
    def device(self) -> torch.device:
        return self.ids.device

    def __len__(self) -> int:
        return self.ids.shape[0]

    def to(self, device: torch.device | str) -> "TokenBatch":
        return type(self)(*(field.to(device) for field in self._tensors()))

    def rows(self, index: slice | Sequence[int] | Tensor) -> "TokenBatch":
        """The chosen rows, in the chosen order, at the same width."""
        chosen = index if isinstance(index, slice | Tensor) else torch.tensor(index, dtype=torch.long)
        return type(self)(*(field[chosen] for field in self._tensors()))

    def padded(self, side: Side) -> "TokenBatch":
        """The same tokens with all padding on one side: right for harvesting, left for generation."""
        last = self.attention_mask if side == "left" else ~self.attention_mask
        order = last.long().argsort(dim=1, stable=True)
        return type(self)(*(field.gather(1, order) for field in self._tensors()))

    def _tensors(self) -> list[Tensor]:
        return [getattr(self, field.name) for field in fields(self)]


def as_batch(tokens: Tokens, tokenizer: Any = None) -> TokenBatch:
    """A batch as it is; integer ids [seq, pos] as one in which every token is real, with the tokenizer's special ids marked.

    Raises TypeError for texts and anything else, ShapeMismatch for ids of another shape.
    """
    if isinstance(tokens, TokenBatch):
        return tokens
    if not isinstance(tokens, Tensor):
        texts = isinstance(tokens, str) or (
            isinstance(tokens, Sequence) and isinstance(next(iter(tokens), None), str)
        )
        remedy = "corpus = Corpus.from_texts(texts, tokenizer), then corpus.batch(indices)"
        what = f"texts, as {tokens!r:.60}" if texts else f"a {type(tokens).__name__}"
        raise TypeError(
            f"wanted a TokenBatch or integer ids [seq, pos], got {what}; {remedy}, or capture(pair, corpus)."
        )
    if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise TypeError(f"wanted integer ids [seq, pos], got a tensor of {tokens.dtype}.")
    if tokens.ndim != 2:
        raise ShapeMismatch(f"wanted ids [seq, pos], got {list(tokens.shape)}; one text's ids are ids[None].")
    return TokenBatch.from_ids(tokens.long(), special_ids=() if tokenizer is None else special_ids(tokenizer))
