"""One language model seen through one library, and what all backends share."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tl_crosscoder.errors import ShapeMismatch
from tl_crosscoder.models.backends.watching import OnTokens
from tl_crosscoder.models.tokens import TokenBatch
from tl_crosscoder.types import Edit

#: ``before_forward(ids, step)``: called with the block of tokens about to be fed: the whole prompt at step 0,
#: then one token a row.
BeforeForward = Callable[[Tensor, int], None]


class Stop(Exception):
    """Ends a forward pass where nothing later is wanted."""


@runtime_checkable
class Backend(Protocol):
    """A language model whose residual stream can be read and edited.

    Implementations agree to 1e-5 on real positions.
    """

    @property
    def model(self) -> Any: ...
    @property
    def d_in(self) -> int: ...
    @property
    def n_layers(self) -> int: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def tokenizer(self) -> Any: ...

    def capture(self, batch: TokenBatch, hook: str) -> Float[Tensor, "seq pos d_in"]:
        """The residual stream at ``hook``; no later layer runs.  Values at padding mean nothing."""
        ...

    def run(self, batch: TokenBatch, edits: Mapping[str, Edit] = {}) -> Float[Tensor, "seq pos d_vocab"]:
        """Logits, with each edit applied at its hook."""
        ...

    def generate(
        self,
        batch: TokenBatch,
        max_new_tokens: int,
        edits: Mapping[str, Edit] = {},
        *,
        temperature: float = 0.0,
        seed: int = 0,
        before_forward: BeforeForward | None = None,
        stop_ids: Iterable[int] | None = None,
    ) -> Int[Tensor, "seq new"]:
        """New token ids; edits see the left-padded prompt, then each new token.  Temperature 0 is greedy."""
        ...


@runtime_checkable
class LiveBackend(Backend, Protocol):
    """A backend whose model can also be run by its owner, edits and all; each of this library's is one."""

    def attached(self, edits: Mapping[str, Edit], on_tokens: OnTokens) -> AbstractContextManager[None]:
        """Inside, every forward of the model, whoever starts it, has the edits applied, and tells first what it will read."""
        ...

    def run_with_cache(
        self, batch: TokenBatch, wanted: Callable[[str], bool] | None
    ) -> tuple[Float[Tensor, "seq pos d_vocab"], dict[str, Tensor]]:
        """Logits, and by TransformerLens' names the activations that are ``wanted`` (None: all).

        Gradients are as the caller has them.
        """
        ...


def apply_edit(edit: Edit, acts: Tensor, hook: Any = None) -> Tensor:
    """``edit(acts, hook=hook)``, of the same shape and dtype as ``acts``; ``None`` keeps ``acts``."""
    edited = edit(acts, hook=hook)
    if edited is None:
        return acts
    if edited.shape != acts.shape:
        raise ShapeMismatch(
            f"an edit got {list(acts.shape)} and returned {list(edited.shape)}; it must keep the shape"
        )
    return edited.to(acts.dtype)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout off inside; every module's own mode afterwards."""
    training = [module for module in model.modules() if module.training] if model.training else []
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
