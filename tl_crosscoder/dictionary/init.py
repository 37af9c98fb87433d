"""Where a dictionary starts."""

import torch
from jaxtyping import Float
from torch import Tensor


def decoder_rows(
    d_sae: int, n_models: int, d_in: int, *, norm: float, same: bool, seed: int
) -> Float[Tensor, "d_sae model d_in"]:
    """Gaussian directions on the CPU, each model's row of length ``norm``; ``same``: one direction for all models.

    The same start suits concepts that both models have; on planted data, rare concepts of one model are found more often from
    independent starts.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    rows = torch.randn(d_sae, 1 if same else n_models, d_in, generator=generator, device="cpu")
    rows *= norm / rows.norm(dim=-1, keepdim=True)
    return rows.expand(d_sae, n_models, d_in).contiguous()
