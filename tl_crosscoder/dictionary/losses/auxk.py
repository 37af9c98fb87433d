"""Work for latents that have stopped firing."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from tl_crosscoder.dictionary.crosscoder import Crosscoder, CrosscoderOutput
from tl_crosscoder.dictionary.losses.base import LOSSES, Progress
from tl_crosscoder.dictionary.losses.squares import sum_of_squares


@LOSSES.register("auxk")
@dataclass(frozen=True)
class AuxK:
    """Each token's ``k_aux`` best dead latents reconstruct what the living left over; no gradient reaches the living or ``b_dec``.

    Dead: silent for ``dead_after_tokens``.  ``k_aux``: None means d_in // 2; never more than there are dead.  ``relative=False``:
    the squared units of :class:`MSE`.  ``relative=True``: divided by the residual's variance, as the code of Minder et al. 2025,
    arXiv:2504.02922.  0 while nothing is dead.

    Source: Gao et al. 2024, arXiv:2406.04093.
    """

    weight: float = 1 / 32
    k_aux: int | None = None
    dead_after_tokens: int = 10_000_000
    relative: bool = False

    name = "auxk"

    def __post_init__(self):
        if self.k_aux is not None and self.k_aux < 1:
            raise ValueError(
                f"k_aux is a number of latents, 1 or more, or None for d_in // 2; got {self.k_aux}"
            )

    def __call__(
        self, x: Tensor, out: CrosscoderOutput, crosscoder: Crosscoder, progress: Progress
    ) -> Float[Tensor, ""]:
        dead = (progress.tokens_since_fired >= self.dead_after_tokens).nonzero()[:, 0]
        shard = crosscoder.shard
        if not (n_dead := shard.total(len(dead), shard.latents)):
            return out.estimate.new_zeros(())
        k_aux = max(1, crosscoder.d_in // 2) if self.k_aux is None else self.k_aux
        k = min(k_aux, n_dead)
        acts = crosscoder.pre_acts(x, dead).relu()
        if k < n_dead:
            v = acts.detach() * crosscoder.selection_norms().detach()[dead]
            acts = acts.where(v >= shard.kth_of_rows(v, k), 0)
        residual = -out.error.detach().flatten(1)
        rows = crosscoder.decoder_rows(dead).flatten(1)
        error = sum_of_squares(shard.sum(acts @ rows) - residual) / len(residual)
        if self.relative:
            variance = shard.mean((residual - shard.mean(residual.mean(0))).square().sum() / len(residual))
            error = error / variance if variance > 0 else error * 0
        return self.weight * error
