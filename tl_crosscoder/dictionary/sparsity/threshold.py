"""A fixed threshold for each latent."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_crosscoder.dictionary.scores import Found, Scores
from tl_crosscoder.dictionary.sparsity.base import SPARSITIES, Sparsity


@SPARSITIES.register("threshold")
class Threshold(Sparsity):
    """A latent is active where its pre-activation is positive and above ``threshold[j]``, in units of the pre-activation.

    The same in training and in evaluation; nothing learns the thresholds.  It is what other tools leave of a trained BatchTopK or
    JumpReLU: unlike the exponentials of :class:`JumpReLU`, the numbers are kept as they are, 0 among them.  A latent that
    writes to no model is never active.
    """

    threshold: Tensor | None

    def __init__(self):
        super().__init__()
        self.register_buffer("threshold", None)

    @classmethod
    def of(cls, threshold: Float[Tensor, "d_sae"]) -> "Threshold":
        """With these thresholds."""
        made = cls()
        made.threshold = threshold.detach().clone()
        return made

    def check(self, d_sae: int) -> None:
        """Make room for one threshold a latent; NaN until they are set."""
        if self.threshold is None:
            self.threshold = torch.full((d_sae,), float("nan"))
        elif len(self.threshold) != d_sae:
            raise ValueError(f"these are thresholds for {len(self.threshold)} latents, not for d_sae={d_sae}")

    def restricted(self, latents: Int[Tensor, "latent"]) -> "Threshold | None":
        return None if self.threshold is None else Threshold.of(self.threshold[latents])

    def choose(self, scores: Scores) -> Found:
        if self.threshold is None or self.threshold.isnan().any():
            raise RuntimeError("Threshold has no thresholds yet: set sparsity.threshold, one number a latent")
        return scores.above(self.threshold.clamp_min(0) * scores.norms)
