"""A crosscoder's latents beside the activations of a TransformerLens cache."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_crosscoder.models.backends.base import evaluating
from tl_crosscoder.models.tokens import TokenBatch

LATENTS, RECON, ERROR = "crosscoder.hook_latents", "crosscoder.hook_recon", "crosscoder.hook_error"
NamesFilter = str | Sequence[str] | Callable[[str], bool] | None


def wants(names: NamesFilter) -> Callable[[str], bool] | None:
    """Whether a name is asked for, by any of the ways in which TransformerLens lets one ask; None: every name."""
    if names is None or callable(names):
        return names
    chosen = {names} if isinstance(names, str) else set(names)
    return lambda name: name in chosen


@torch.no_grad()
def crosscoder_entries(
    crosscoder: Any,
    acts: Float[Tensor, "seq pos model d_in"],
    batch: TokenBatch,
    wanted: Callable[[str], bool] | None,
) -> dict[str, Tensor]:
    """``hook_latents [seq pos d_sae]``, ``hook_recon`` and ``hook_error [seq pos model d_in]``, raw units; 0 at padding.

    ``crosscoder`` is anything with ``encode`` and ``decode``.  The error is what came minus the reconstruction.
    """
    names = [name for name in (LATENTS, RECON, ERROR) if wanted is None or wanted(name)]
    if not names:
        return {}
    weights = next(crosscoder.parameters())
    where = batch.attention_mask.to(weights.device)
    x = acts.to(weights.device)[where].float()
    with evaluating(crosscoder):
        codes = crosscoder.encode(x)
        recon = crosscoder.decode(codes) if names != [LATENTS] else x
    found = {LATENTS: codes, RECON: recon, ERROR: x - recon}
    return {name: _spread(found[name], where) for name in names}


def _spread(values: Tensor, where: Tensor) -> Tensor:
    """The values of the chosen tokens in their places, 0 elsewhere."""
    out = values.new_zeros(*where.shape, *values.shape[1:])
    out[where] = values
    return out
