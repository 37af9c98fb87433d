"""What every sparsity offers."""

from abc import ABC, abstractmethod

from jaxtyping import Float
from torch import Tensor, nn

from tl_crosscoder.registry import Registry

SPARSITIES = Registry("sparsity")


class Sparsity(nn.Module, ABC):
    """Chooses which latents are active.

    The score of latent j is ``relu(pre_act_j) · norm_j`` with the norm of its decoders, so that stretching the encoder against the
    decoder changes no choice; the code itself stays the unscaled activation.  ``train()`` may look at the whole batch, ``eval()``
    looks at one token at a time.
    """

    #: The activations are pre-activations, kept or dropped: their gradient is 1 where kept and 0 elsewhere.
    selects = True
    #: Active latents per token asked for at this step; None where no number is asked for.
    k_now: int | None = None

    def __init__(self):
        super().__init__()

    @abstractmethod
    def forward(
        self, pre_acts: Float[Tensor, "batch d_sae"], norms: Float[Tensor, "d_sae"]
    ) -> Float[Tensor, "batch d_sae"]:
        """The activations, zero where not chosen; no gradient flows through the choice."""

    def advance(self, step: int, steps: int) -> None:
        """Set the schedule for training step ``step`` (from 0) of ``steps``."""

    def check(self, d_sae: int) -> None:
        """Refuse a dictionary this sparsity cannot serve."""


def scores(
    pre_acts: Float[Tensor, "batch d_sae"], norms: Float[Tensor, "d_sae"]
) -> Float[Tensor, "batch d_sae"]:
    """``relu(pre_acts) · norms``, outside autograd and with one temporary."""
    return pre_acts.detach().relu().mul_(norms.detach())


def check_k(k: int, d_sae: int) -> None:
    if not 1 <= k <= d_sae:
        raise ValueError(f"k is the number of active latents per token: 1 <= k <= d_sae={d_sae}, got k={k}")
