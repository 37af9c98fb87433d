"""What a reconstruction starts from, before any latent."""

from jaxtyping import Float
from torch import Tensor

from tl_crosscoder.dictionary.crosscoder import Crosscoder


def decoder_bias(crosscoder: Crosscoder) -> Float[Tensor, "model d_in"]:
    """``b_dec`` in normalised units; folding does not change it."""
    units = crosscoder.units
    return crosscoder.b_dec if units is None else units.normalise(crosscoder.b_dec[None])[0]
