"""Reconstructions from the first latents alone."""

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from tl_crosscoder.dictionary.crosscoder import Crosscoder, CrosscoderOutput
from tl_crosscoder.dictionary.losses.base import LOSSES, Progress
from tl_crosscoder.dictionary.losses.partial import decoder_bias
from tl_crosscoder.dictionary.losses.squares import sum_of_squares
from tl_crosscoder.dictionary.prefix import first_latents


@LOSSES.register("matryoshka")
@dataclass(frozen=True)
class Matryoshka:
    """``Σ_l weights_l · mean_n Σ_m ‖x^m - recon^m from the first prefixes_l latents‖²``, one choice of active latents for all.

    The general concepts settle in the first latents, the special ones after them.  ``prefixes`` ascend: ints count latents, floats
    are shares of them.  ``weights=None``: 1 / len(prefixes) each, so that the sum has the scale of :class:`MSE`.  Use it in place
    of MSE where the last prefix is the whole dictionary (1.0), beside MSE where it is not.  Each active pair is decoded once,
    however many prefixes there are.

    Source: Bussmann et al. 2025, arXiv:2503.17547, for SAEs.
    """

    prefixes: Sequence[int | float]
    weights: Sequence[float] | None = None

    name = "matryoshka"

    def __post_init__(self):
        object.__setattr__(self, "prefixes", tuple(self.prefixes))
        if not self.prefixes:
            raise ValueError("Matryoshka wants one prefix or more, got none")
        if self.weights is not None:
            object.__setattr__(self, "weights", tuple(self.weights))
            if len(self.weights) != len(self.prefixes):
                raise ValueError(
                    f"Matryoshka wants a weight for each of {len(self.prefixes)} prefixes, got {len(self.weights)}"
                )

    def __call__(
        self, x: Tensor, out: CrosscoderOutput, crosscoder: Crosscoder, progress: Progress
    ) -> Float[Tensor, ""]:
        del x, progress
        estimates = self._estimates(out, crosscoder)
        weights = self.weights or [1 / len(self.prefixes)] * len(self.prefixes)
        total = out.estimate.new_zeros(())
        for weight, estimate in zip(weights, estimates, strict=True):
            total = total + weight * sum_of_squares(estimate - out.target)
        return total / len(out.target)

    def _estimates(
        self, out: CrosscoderOutput, crosscoder: Crosscoder
    ) -> list[Float[Tensor, "batch model d_in"]]:
        """The estimate from each prefix; that of the whole dictionary is there already."""
        ends = [first_latents(prefix, crosscoder.d_sae) for prefix in self.prefixes]
        if ends != sorted(set(ends)) or ends[0] == 0:
            raise ValueError(
                f"Matryoshka's prefixes hold ever more latents, got {list(self.prefixes)}: {ends} of d_sae={crosscoder.d_sae}"
            )
        whole = [out.estimate] if ends[-1] == crosscoder.d_sae else []
        parts = ends[: len(ends) - len(whole)]
        if not parts:
            return whole
        held = [crosscoder.shard.n_held(end) for end in parts]
        decoded = crosscoder.shard.sum(out.codes.decode_prefixes(crosscoder.decoder_rows(), held))
        return [*(decoded + decoder_bias(crosscoder)), *whole]
