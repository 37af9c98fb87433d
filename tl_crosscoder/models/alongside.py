"""The other model reads along while somebody runs the first one by his own means."""

import torch
from torch import Tensor

from tl_crosscoder.models.backends import Backend
from tl_crosscoder.models.follower import Follower
from tl_crosscoder.models.tokens import TokenBatch


class Alongside:
    """``acts``: the residual stream of ``other`` at ``hook``, for the tokens of the forward pass under way."""

    def __init__(self, other: Backend, hook: str):
        self.other, self.hook = other, hook
        self.acts: Tensor | None = None
        self.follower: Follower | None = None
        self.busy = False  # the two models may be one, with its adapter on and off

    def read(self, tokens: TokenBatch, new: int) -> None:
        """``tokens``: all so far, of which the last ``new`` are about to be read."""
        self.busy = True
        try:
            if new == tokens.ids.shape[1]:  # another text
                self.follower = Follower(self.other, tokens, self.hook) if tokens.is_left_padded else None
            if self.follower is not None:
                if self.follower.started and not torch.equal(self.follower.tokens.ids, tokens.ids[:, :-new]):
                    # beam search gave some rows other beginnings: read those anew
                    self.follower = Follower(self.other, tokens, self.hook)
                    self.acts = self.follower.extend(tokens.ids)[:, -new:]
                else:
                    self.acts = self.follower.extend(tokens.ids[:, -new:])
            elif new == tokens.ids.shape[1]:
                self.acts = self.other.capture(tokens, self.hook)
            else:
                raise ValueError("a batch that ends in padding cannot be continued; pad it on the left.")
        finally:
            self.busy = False
