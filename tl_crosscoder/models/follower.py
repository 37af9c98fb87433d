"""A second model that reads along while the first one generates."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_crosscoder.models.backends import Backend, HookBackend
from tl_crosscoder.models.backends.generation import extended
from tl_crosscoder.models.backends.sites import Site, parse_hook
from tl_crosscoder.models.tokens import TokenBatch


class Follower:
    """The residual stream at one hook of a text that grows: ``extend`` returns the activations of the new tokens.

    Over plain hooks the earlier tokens stay in a key-value cache; over other backends the whole text is read
    again each time, which is exact and slower.
    """

    def __init__(self, backend: Backend, batch: TokenBatch, hook: str):
        self.backend, self.hook = backend, hook
        self.tokens = batch.padded("left").to(backend.device)
        self.started = False
        # Nothing attends before layer 0, so nothing would fill a cache there.
        self.site = parse_hook(hook, backend.n_layers)
        self.cache: Any = None
        if isinstance(backend, HookBackend) and self.site != Site(0, "pre"):
            self.cache = backend.new_cache()

    @torch.no_grad()
    def extend(self, ids: Int[Tensor, "seq new"]) -> Float[Tensor, "seq new d_in"]:
        """Activations at ``ids``; the first block is the whole left-padded prompt."""
        ids, new = ids.to(self.tokens.ids), ids.shape[1]
        if self.started:
            self.tokens = extended(self.tokens, ids)
        elif not torch.equal(ids, self.tokens.ids):
            raise ValueError("the first block is not the left-padded prompt that this follower was made for")
        self.started = True
        if self.cache is not None and isinstance(self.backend, HookBackend):
            return self.backend.capture_step(self.tokens, new, self.site, self.cache)
        return self.backend.capture(self.tokens, self.hook)[:, -new:]
