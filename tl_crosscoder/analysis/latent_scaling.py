"""Latent Scaling: is a latent that only the tuned decoder writes really absent from the base model?"""

from typing import Literal

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from tl_crosscoder.analysis.base import Analysis, Columns, EncodedBatch, run
from tl_crosscoder.analysis.decoder_norms import NO_DIRECTION
from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.types import BASE, TUNED

SIDES = {"base": BASE, "tuned": TUNED}
TARGETS = ("error", "recon", "recon_no_bias", "act", "act_no_bias")
Probe = Literal["tuned", "base", "either"]


class LatentScaling(Analysis):
    """``nu_error`` near 0: truly tuned-only.  Near 1: the base model's error holds the latent just as strongly.

    ``nu_recon`` near 1: other latents already write the direction into the base reconstruction where this latent fires.

    For each latent j, ``beta[m] = argmin_b Σ_i ‖y_i^m − b·f_ij·d_j‖²`` with ``d_j`` the *probe*, one direction
    for both models (the tuned decoder's, unless said otherwise), and

    ============================ ===============================================================================
    column                       target ``y^m`` (normalised units)
    ============================ ===============================================================================
    ``beta_error_{m}``           model m's error with latent j's own contribution put back
    ``beta_recon_{m}``           model m's reconstruction, decoder bias included (as the authors compute it)
    ``beta_recon_no_bias_{m}``   the same without the decoder bias, which otherwise inflates weak latents
    ``beta_act_{m}``             model m's activation
    ``beta_act_no_bias_{m}``     the same without the decoder bias
    ============================ ===============================================================================

    ``nu_error``, ``nu_recon`` and so on are the ratios base / tuned.  NaN where j never fired, ``‖d_j‖`` is
    about 0 or the tuned beta is 0.  A latent is called tuned-specific by the paper where nu_recon < .5 and
    nu_error < .2; other work uses ν for the opposite orientation, which is why no column here is a bare ``nu``.

    ``probe="base"`` asks the mirrored question: d_j is the base decoder's and the ratios are tuned / base, near 0
    for what is truly base-only.  ``probe="either"`` takes each latent's longer decoder (:meth:`probed` says
    whose).  ``directions`` are probes of one's own in the place of the decoder's: controls.

    All latents and targets come out of one pass: with ``C_j = Σ f²`` the normal equations need only ``Σ_i f_ij
    ⟨d_j, e_i⟩`` and ``Σ_i f_ij ⟨d_j, x̂_i⟩``, since ``⟨d_j, e_i + f_ij d_j^m⟩ = ⟨d_j, e_i⟩ + f_ij ⟨d_j,
    d_j^m⟩`` and ``x = x̂ + e``.

    Source: Minder et al. 2025, arXiv:2504.02922, Latent Scaling.
    """

    compares_models = one_space = True

    def __init__(
        self,
        crosscoder: Crosscoder,
        probe: Probe = "tuned",
        directions: Float[Tensor, "d_sae d_in"] | None = None,
    ):
        super().__init__(crosscoder)
        if probe not in ("tuned", "base", "either"):
            raise ValueError(f"no probe {probe!r}; known: tuned, base, either")
        self.probe, self.directions = probe, directions
        zeros = lambda *shape: torch.zeros(*shape, dtype=torch.float64, device=crosscoder.W_dec.device)
        self.square, self.mass = zeros(crosscoder.d_sae), zeros(crosscoder.d_sae)
        self.own = zeros(crosscoder.d_sae, 2)  # Σ f² where the model has the latent
        self.with_error, self.with_estimate = zeros(crosscoder.d_sae, 2), zeros(crosscoder.d_sae, 2)

    def update(self, batch: EncodedBatch) -> None:
        order = batch.by_latent
        square = order.total(order.values.double() ** 2)
        self.square += square
        for m in (BASE, TUNED):
            apart = order.gates is not None
            self.own[:, m] += order.total(order.of_model(m).values.double() ** 2) if apart else square
        self.mass += order.total(order.values)
        targets = torch.cat([batch.error[:, [BASE, TUNED]], batch.estimate[:, [BASE, TUNED]]], 1)
        dots = order.weighted_dots(targets, self._directions())
        self.with_error += dots[:, :2]
        self.with_estimate += dots[:, 2:]

    def columns(self) -> Columns:
        decoder = self.crosscoder.decoder_rows().detach().double()
        direction = self._directions().double()
        own = torch.einsum("smd,sd->sm", decoder[:, [BASE, TUNED]], direction)
        bias = torch.einsum("md,sd->sm", self._bias().double()[[BASE, TUNED]], direction)
        square, mass = rearrange(self.square, "s -> s 1"), rearrange(self.mass, "s -> s 1")
        length = rearrange(direction.square().sum(-1), "s -> s 1")
        scale = torch.where((length > NO_DIRECTION**2) & (square > 0), length * square, torch.nan)
        with_act = self.with_error + self.with_estimate
        sums = {
            "error": self.with_error + self.own * own,
            "recon": self.with_estimate,
            "recon_no_bias": self.with_estimate - mass * bias,
            "act": with_act,
            "act_no_bias": with_act - mass * bias,
        }
        betas = {target: total / scale for target, total in sums.items()}
        columns = {
            f"beta_{target}_{side}": b[:, m] for target, b in betas.items() for side, m in SIDES.items()
        }
        side = rearrange(self.probed(), "s -> s 1")
        ratios = {}
        for target, b in betas.items():
            probed, other = (b.gather(1, m)[:, 0] for m in (side, 1 - side))
            ratios[f"nu_{target}"] = torch.where(probed != 0, other / probed, torch.nan)
        return columns | ratios

    def probed(self) -> Int[Tensor, " d_sae"]:
        """Whose decoder each latent's probe is, 0 base or 1 tuned; of two equally long ones the tuned."""
        if self.probe == "either":
            norms = self.crosscoder.decoder_norms().detach()
            return torch.where(norms[:, BASE] > norms[:, TUNED], BASE, TUNED)
        side = SIDES[self.probe]
        return torch.full((self.crosscoder.d_sae,), side, device=self.crosscoder.W_dec.device)

    def _directions(self) -> Float[Tensor, "d_sae d_in"]:
        if self.directions is not None:
            return self.directions
        rows = self.crosscoder.decoder_rows().detach()
        return rows[:, SIDES[self.probe]] if self.probe in SIDES else rows[range(len(rows)), self.probed()]

    def _bias(self) -> Tensor:
        """What is reconstructed when nothing fires, in normalised units."""
        units, nothing = (
            self.crosscoder.units or self.crosscoder.normalizer,
            self.square.new_zeros(1, self.crosscoder.d_sae),
        )
        return units.normalise(self.crosscoder.decode(nothing.to(self.crosscoder.W_dec.dtype)).detach())[0]


def latent_scaling(crosscoder: Crosscoder, batches, probe: Probe = "tuned") -> Columns:
    """The columns of :class:`LatentScaling` in one pass over the batches."""
    analysis = LatentScaling(crosscoder, probe)
    run(crosscoder, batches, [analysis])
    return analysis.columns()
