"""Every positive activation stays; pair it with an L1 loss."""

from jaxtyping import Float
from torch import Tensor

from tl_crosscoder.dictionary.sparsity.base import SPARSITIES, Sparsity


@SPARSITIES.register("relu")
class ReLU(Sparsity):
    """Every positive activation stays (Lindsey et al. 2024)."""

    def forward(
        self,
        pre_acts: Float[Tensor, "batch d_sae"],
        norms: Float[Tensor, "d_sae"],  # noqa: ARG002  (the score's sign is the activation's)
    ) -> Float[Tensor, "batch d_sae"]:
        return pre_acts.relu()
