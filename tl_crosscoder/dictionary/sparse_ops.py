"""The two products of a sparse dictionary, on active (token, latent) pairs only.  Both differentiate through plain torch ops."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

#: Elements gathered at once by :func:`encode_at`: 64 MiB of float32 for each of its two operands.
CHUNK = 1 << 24


def decode_pairs(
    values: Float[Tensor, "nnz"],
    latents: Int[Tensor, "nnz"],
    offsets: Int[Tensor, "_"],
    rows: Float[Tensor, "d_sae *rest"],
) -> Float[Tensor, "batch *rest"]:
    """``Σ values · rows[latents]`` for each token: ``acts @ rows`` in proportion to the active pairs."""
    flat = F.embedding_bag(
        latents,
        rows.flatten(1),
        offsets,
        mode="sum",
        per_sample_weights=values.to(rows.dtype),
        include_last_offset=True,
    )
    return flat.unflatten(1, rows.shape[1:])


def encode_at(
    x: Float[Tensor, "batch *rest"],
    rows: Float[Tensor, "d_sae *rest"],
    bias: Float[Tensor, "d_sae"],
    tokens: Int[Tensor, "nnz"],
    latents: Int[Tensor, "nnz"],
) -> Float[Tensor, "nnz"]:
    """The pre-activation ``⟨x[token], rows[latent]⟩ + bias[latent]`` of each pair, without those of the others."""
    x, rows = x.flatten(1), rows.flatten(1)
    size = max(1, CHUNK // x.shape[1])
    dots = [
        torch.linalg.vecdot(x.index_select(0, t), rows.index_select(0, j))
        for t, j in zip(tokens.split(size), latents.split(size), strict=True)
    ]
    return torch.cat(dots) + bias[latents]
