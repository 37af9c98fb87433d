"""How much of the whole tuned − base difference a latent writes."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_crosscoder.analysis.base import Analysis, Columns, EncodedBatch
from tl_crosscoder.analysis.latent_order import LatentOrder
from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.types import BASE, TUNED


class DifferenceShare(Analysis):
    """``difference_share``: the signed share of the tuned − base difference that latent j writes; all latents
    sum to about the FVE.

    ``difference_share_j = Σ f_j ⟨d_j^tuned − d_j^base, x^tuned − x^base⟩ / Σ ‖x^tuned − x^base‖²`` (normalised
    units, so a mean shift between centred models is outside).  ``difference_peak_j = max f_j ‖d_j^tuned −
    d_j^base‖``: the largest single write, which finds narrow behaviours that carry little of the total.  Narrow
    fine-tunes change a part of a shared latent's direction: ``delta_norm`` barely moves and these two still
    find it.  Identical models give NaN shares and zero peaks."""

    compares_models = one_space = True

    def __init__(self, crosscoder: Crosscoder):
        super().__init__(crosscoder)
        device = crosscoder.W_dec.device
        self.written = torch.zeros(crosscoder.d_sae, dtype=torch.float64, device=device)
        self.largest = torch.zeros(crosscoder.d_sae, device=device)
        self.peak = torch.zeros(crosscoder.d_sae, device=device)  # where each model chooses for itself
        self.total = torch.zeros((), dtype=torch.float64, device=device)

    def update(self, batch: EncodedBatch) -> None:
        order = batch.by_latent
        difference = batch.target[:, [TUNED]] - batch.target[:, [BASE]]
        if order.gates is None:
            self.written += order.weighted_dots(difference, self._rows())[:, 0]
            self.largest = torch.maximum(self.largest, order.maximum(order.values))
        else:
            self._add_gated(order, order.gates, difference)
        self.total += difference.double().square().sum()

    def columns(self) -> Columns:
        share = self.written / self.total if self.total > 0 else torch.full_like(self.written, torch.nan)
        peak = torch.maximum(self.peak, self.largest * self._rows().norm(dim=-1))
        return {"difference_share": share, "difference_peak": peak}

    def _add_gated(
        self,
        order: LatentOrder,
        gates: Bool[Tensor, " nnz model"],
        difference: Float[Tensor, "batch 1 d_in"],
    ) -> None:
        """Each model's row is written only where that model has the latent."""
        decoder = self.crosscoder.decoder_rows().detach()
        base, tuned = gates[:, BASE], gates[:, TUNED]
        for sign, m in ((1, TUNED), (-1, BASE)):
            self.written += sign * order.of_model(m).weighted_dots(difference, decoder[:, m])[:, 0]
        cases = (
            (tuned & base, self._rows()),
            (tuned & ~base, decoder[:, TUNED]),
            (base & ~tuned, decoder[:, BASE]),
        )
        for where, rows in cases:
            size = order.maximum(order.values * where) * rows.norm(dim=-1)
            self.peak = torch.maximum(self.peak, size)

    def _rows(self) -> Float[Tensor, "d_sae d_in"]:
        decoder = self.crosscoder.decoder_rows().detach()
        return decoder[:, TUNED] - decoder[:, BASE]
