"""The metadata of an SAE of two models, which no single model may take for one of its own."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from sae_lens.saes.sae import SAEMetadata

_both: ContextVar[bool] = ContextVar("both models are run as one", default=False)


@contextmanager
def attaching_to_both() -> Iterator[None]:
    """Inside, an SAE of two models may be attached."""
    token = _both.set(True)
    try:
        yield
    finally:
        _both.reset(token)


class JointMetadata(SAEMetadata):
    """SAE-Lens' metadata, except that attaching to a model raises.

    Where a hook is missing or misspelt, ``add_sae`` logs a line and goes on: the run returns the plain model's logits.  It asks
    every SAE for ``hook_name_out`` before anything else, and an SAE that writes where it reads has none.
    """

    @property
    def hook_name_out(self) -> None:
        if _both.get():
            return
        raise ValueError(
            "this SAE reads the activations of two models side by side, so that it cannot be attached to one.  Attach its exact "
            "half, tl_crosscoder.paired(crosscoder, model, hook=...), or an approximation that needs no second model, "
            "tl_crosscoder.as_sae(...), or run both models as one, tl_crosscoder.joint(pair)"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> "JointMetadata":
        return JointMetadata(**super().__deepcopy__(memo).to_dict())
