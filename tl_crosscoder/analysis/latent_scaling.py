"""Latent Scaling: is a latent that only the tuned decoder writes really absent from the base model?"""

import torch
from einops import rearrange
from torch import Tensor

from tl_crosscoder.analysis.base import Analysis, Columns, EncodedBatch, run
from tl_crosscoder.analysis.decoder_norms import NO_DIRECTION
from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.types import BASE, TUNED

SIDES = {"base": BASE, "tuned": TUNED}


class LatentScaling(Analysis):
    """``nu_error`` near 0: truly tuned-only.  Near 1: the base model's error holds the latent just as strongly.

    ``nu_recon`` near 1: other latents already write the direction into the base reconstruction where this latent fires.

    For each latent j, ``beta[m] = argmin_b Σ_i ‖y_i^m − b·f_ij·d_j‖²`` with ``d_j`` the *tuned* decoder
    direction for both models, and

    ============================ ===============================================================================
    column                       target ``y^m`` (normalised units)
    ============================ ===============================================================================
    ``beta_error_{m}``           model m's error with latent j's own contribution put back
    ``beta_recon_{m}``           model m's reconstruction, decoder bias included (as the authors compute it)
    ``beta_recon_no_bias_{m}``   the same without the decoder bias, which otherwise inflates weak latents
    ============================ ===============================================================================

    ``nu_error``, ``nu_recon`` and ``nu_recon_no_bias`` are the ratios base / tuned.  NaN where j never fired,
    ``‖d_j‖`` is about 0 or the tuned beta is 0.  A latent is called tuned-specific by the paper where nu_recon
    < .5 and nu_error < .2; other work uses ν for the opposite orientation, which is why no column here is a
    bare ``nu``.

    All latents and targets come out of one pass: with ``C_j = Σ f²`` the normal equations need only ``Σ_i f_ij
    ⟨d_j, e_i⟩`` and ``Σ_i f_ij ⟨d_j, x̂_i⟩``, since ``⟨d_j, e_i + f_ij d_j^m⟩ = ⟨d_j, e_i⟩ + f_ij ⟨d_j,
    d_j^m⟩``.

    Source: Minder et al. 2025, arXiv:2504.02922, Latent Scaling.
    """

    compares_models = True

    def __init__(self, crosscoder: Crosscoder):
        super().__init__(crosscoder)
        zeros = lambda *shape: torch.zeros(*shape, dtype=torch.float64, device=crosscoder.W_dec.device)
        self.square, self.mass = zeros(crosscoder.d_sae), zeros(crosscoder.d_sae)
        self.with_error, self.with_estimate = zeros(crosscoder.d_sae, 2), zeros(crosscoder.d_sae, 2)

    def update(self, batch: EncodedBatch) -> None:
        order = batch.by_latent
        self.square += order.total(order.values.double() ** 2)
        self.mass += order.total(order.values)
        targets = torch.cat([batch.error[:, [BASE, TUNED]], batch.estimate[:, [BASE, TUNED]]], 1)
        dots = order.weighted_dots(targets, self.crosscoder.decoder_rows()[:, TUNED])
        self.with_error += dots[:, :2]
        self.with_estimate += dots[:, 2:]

    def columns(self) -> Columns:
        decoder = self.crosscoder.decoder_rows().detach().double()
        direction = decoder[:, TUNED]
        own = torch.einsum("smd,sd->sm", decoder[:, [BASE, TUNED]], direction)
        bias = torch.einsum("md,sd->sm", self._bias().double()[[BASE, TUNED]], direction)
        square = rearrange(self.square, "s -> s 1")
        length = rearrange(direction.square().sum(-1), "s -> s 1")
        scale = torch.where((length > NO_DIRECTION**2) & (square > 0), length * square, torch.nan)
        betas = {
            "error": (self.with_error + square * own) / scale,
            "recon": self.with_estimate / scale,
            "recon_no_bias": (self.with_estimate - rearrange(self.mass, "s -> s 1") * bias) / scale,
        }
        columns = {
            f"beta_{target}_{side}": b[:, m] for target, b in betas.items() for side, m in SIDES.items()
        }
        ratios = {
            f"nu_{target}": torch.where(b[:, TUNED] != 0, b[:, BASE] / b[:, TUNED], torch.nan)
            for target, b in betas.items()
        }
        return columns | ratios

    def _bias(self) -> Tensor:
        """What is reconstructed when nothing fires, in normalised units."""
        units, nothing = (
            self.crosscoder.units or self.crosscoder.normalizer,
            self.square.new_zeros(1, self.crosscoder.d_sae),
        )
        return units.normalise(self.crosscoder.decode(nothing.to(self.crosscoder.W_dec.dtype)).detach())[0]


def latent_scaling(crosscoder: Crosscoder, batches) -> Columns:
    """The columns of :class:`LatentScaling` in one pass over the batches."""
    analysis = LatentScaling(crosscoder)
    run(crosscoder, batches, [analysis])
    return analysis.columns()
