"""The difference between the models, reconstructed by the latents that are not shared."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from tl_crosscoder.dictionary.crosscoder import Crosscoder, CrosscoderOutput
from tl_crosscoder.dictionary.losses.base import LOSSES, Progress
from tl_crosscoder.dictionary.losses.partial import decoder_bias
from tl_crosscoder.dictionary.losses.squares import sum_of_squares
from tl_crosscoder.dictionary.prefix import first_latents
from tl_crosscoder.types import BASE, TUNED
from tl_crosscoder.widths import refuse_unlike


@LOSSES.register("delta")
@dataclass(frozen=True)
class Delta:
    """``weight · mean_n ‖x^tuned - x^base - Σ_{j not shared} f_j (d_j^tuned - d_j^base) - (b^tuned - b^base)‖²``, summed over d_in.

    Normalised units, the scale of :class:`MSE`: at ``weight=1`` the difference counts as much as one model's error.  The published
    weight, .005, whose scale is not stated, does nothing measurable in these units.  The first ``shared`` latents (int: a number,
    float: a share of them) get no gradient.  The biases belong to it, so that no latent is asked for a constant shift; with
    ``shared=0`` this is ``‖e^tuned - e^base‖²``, the errors' difference.  Where both models start from the same directions
    (``Init(same=True)``), the difference of their decoders starts at 0: start them apart.

    Meant for matched pairs: both models' activations on the same token, which is what this library's batches are.

    Source: Kassem et al. 2026, arXiv:2603.04426 (which writes no biases); :class:`Split` has its two sparsities.
    """

    weight: float
    shared: int | float = 0.2

    name = "delta"

    def __call__(
        self, x: Tensor, out: CrosscoderOutput, crosscoder: Crosscoder, progress: Progress
    ) -> Float[Tensor, ""]:
        del x, progress
        if crosscoder.n_models != 2:
            raise ValueError(f"Delta compares two models, base and tuned, got n_models={crosscoder.n_models}")
        refuse_unlike(crosscoder, "Delta")
        error = out.target - self._estimate(out, crosscoder)
        return self.weight * sum_of_squares(error[:, TUNED] - error[:, BASE]) / len(error)

    def _estimate(self, out: CrosscoderOutput, crosscoder: Crosscoder) -> Float[Tensor, "batch model d_in"]:
        """What the latents that are not shared reconstruct, normalised units."""
        n = crosscoder.shard.n_held(first_latents(self.shared, crosscoder.d_sae))
        if n == 0:
            return out.estimate
        decoded = out.codes.only(slice(n, None)).decode(crosscoder.decoder_rows())
        return crosscoder.shard.sum(decoded) + decoder_bias(crosscoder)
