"""What a model reads off a residual stream at its very end, through whatever library it is seen."""

import torch
from jaxtyping import Float
from torch import Tensor

from tl_crosscoder.models.backends.base import Backend
from tl_crosscoder.models.tokens import TokenBatch

ROWS_AT_ONCE = 256


@torch.no_grad()
def unembed(backend: Backend, resid: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_vocab"]:
    """The logits that follow from ``resid`` as the last block's output: final norm, unembedding and soft cap as the model has them.

    The model runs on one token a row and its last residual stream is replaced, so that no backend has to say where its norm is.
    """
    hook = f"blocks.{backend.n_layers - 1}.hook_resid_post"
    parts = []
    for rows in resid.split(ROWS_AT_ONCE):
        batch = TokenBatch.from_ids(torch.zeros(len(rows), 1, dtype=torch.long, device=backend.device))
        replace = lambda acts, hook=None, rows=rows: rows[:, None].to(acts)  # noqa: ARG005
        parts.append(backend.run(batch, {hook: replace})[:, 0].float())
    return torch.cat(parts) if parts else resid.new_zeros(0, 0)
