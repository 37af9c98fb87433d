"""Which tokens a crosscoder may be asked about: those it could have been trained on."""

from jaxtyping import Bool, Float
from torch import Tensor

from tl_crosscoder.models.drop import Drop
from tl_crosscoder.models.tokens import TokenBatch


def kept_tokens(
    batch: TokenBatch, acts: Float[Tensor, "seq pos model d_in"], drop: Drop
) -> Bool[Tensor, "seq pos"]:
    """The tokens that a capture with ``drop`` keeps, on the device of ``acts``; sinks by this batch's own medians.

    Elsewhere (the first token, attention sinks) the activations are a hundred times larger than anything the crosscoder saw, and
    its codes mean nothing there.
    """
    batch = batch.to(acts.device)
    keep = batch.attention_mask.clone()
    if drop.first:
        keep &= ~batch.first
    if drop.special:
        keep &= ~(batch.special & ~batch.template)
    if drop.preamble:
        keep &= ~batch.preamble
    if drop.template:
        keep &= ~batch.template
    if drop.sinks is not None and keep.any():
        norms = acts.float().norm(dim=-1)
        medians = norms[keep].median(dim=0).values
        keep &= (norms <= drop.sinks * medians).all(-1)
    return keep
