"""One language model seen through one library."""

from typing import Any

from tl_crosscoder.models.backends.base import Backend
from tl_crosscoder.models.backends.hooks import HookBackend


def as_backend(model: Any, tokenizer: Any = None) -> Backend:
    """The backend for a model, chosen by its type; a backend is returned as it is.

    transformers and PEFT models go to plain hooks, ``HookedTransformer`` and ``TransformerBridge`` to
    TransformerLens, ``NNsight`` and ``TransformersModel`` to nnsight.  No library is imported that the model does
    not already come from.  ``tokenizer`` is for a model that brings none.
    """
    libraries = {cls.__module__.partition(".")[0] for cls in type(model).__mro__}
    if "transformer_lens" in libraries:
        from tl_crosscoder.models.backends.transformer_lens import TransformerLensBackend

        return TransformerLensBackend(model, tokenizer)
    if "nnsight" in libraries:
        from tl_crosscoder.models.backends.nnsight import NNsightBackend

        return NNsightBackend(model, tokenizer)
    if libraries & {"transformers", "peft"}:
        return HookBackend(model, tokenizer)
    if isinstance(model, Backend):
        return model
    raise TypeError(
        f"no backend for {type(model).__name__}; wanted a transformers or PEFT model, a HookedTransformer or "
        "TransformerBridge, an nnsight model, or a Backend"
    )


__all__ = ["Backend", "HookBackend", "as_backend"]
