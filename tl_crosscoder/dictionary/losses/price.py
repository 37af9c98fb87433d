"""What a unit of activation of each latent weighs in a penalty."""

from typing import Literal

from jaxtyping import Float
from torch import Tensor

from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.dictionary.prefix import first_latents

Price = Literal["sum", "joint", "mixed"]


def check_price(loss: str, norm: str) -> None:
    if norm not in ("sum", "joint", "mixed"):
        raise ValueError(f"{loss}'s norm is 'sum', 'joint' or 'mixed', got {norm!r}")


def prices(crosscoder: Crosscoder, norm: Price, mix: float = 0.1) -> Float[Tensor, "d_sae"]:
    """A latent's decoder norms as one number: ``sum`` Σ_m ‖d_j^m‖, ``joint`` √Σ_m ‖d_j^m‖², ``mixed`` joint + mix · sum."""
    norms = crosscoder.decoder_norms()
    if norm == "sum":
        return norms.sum(-1)
    joint = norms.norm(dim=-1)
    return joint if norm == "joint" else joint + mix * norms.sum(-1)


def discounts(crosscoder: Crosscoder, shared: int | float, factor: float) -> Float[Tensor, "d_sae"]:
    """``factor`` for the first ``shared`` latents (a number or a share of them), 1 for the others."""
    weights = crosscoder.W_dec.new_ones(len(crosscoder.W_dec))
    weights[: crosscoder.shard.n_held(first_latents(shared, crosscoder.d_sae))] = factor
    return weights
