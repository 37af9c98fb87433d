"""An edit that adds a vector to the residual stream: the plainest one, which needs no dictionary."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_crosscoder.errors import ShapeMismatch
from tl_crosscoder.types import Edit


def shift(vectors: Float[Tensor, "*seq d_in"], mask: Bool[Tensor, "seq pos"] | None = None) -> Edit:
    """Adds ``vectors``, one for all sequences or one for each, where ``mask`` is True; raw units.

    In a generation step with a key-value cache (one position, a longer mask) every new token is shifted.
    """
    added = vectors.detach().float()

    def edit(acts: Tensor, hook: object = None) -> Tensor:  # noqa: ARG001
        if added.shape[-1] != acts.shape[-1] or (added.ndim == 2 and len(added) != len(acts)):
            raise ShapeMismatch(
                f"shift has vectors {list(added.shape)}, the activations are {list(acts.shape)}."
            )
        rows = added.to(acts.device)
        moved = (acts.float() + (rows if added.ndim == 1 else rows[:, None])).to(acts.dtype)
        if mask is None or (acts.shape[:2] != mask.shape and acts.shape[1] == 1 and len(acts) == len(mask)):
            return moved
        if acts.shape[:2] != mask.shape:
            raise ShapeMismatch(
                f"the edit's mask is [seq, pos] = {list(mask.shape)}, the activations are {list(acts.shape)}."
            )
        return torch.where(mask.to(acts.device)[..., None], moved, acts)

    return edit
