"""How much of the whole tuned − base difference a latent writes."""

import torch

from tl_crosscoder.analysis.base import Analysis, Columns, EncodedBatch
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

    compares_models = True

    def __init__(self, crosscoder: Crosscoder):
        super().__init__(crosscoder)
        device = crosscoder.W_dec.device
        self.written = torch.zeros(crosscoder.d_sae, dtype=torch.float64, device=device)
        self.largest = torch.zeros(crosscoder.d_sae, device=device)
        self.total = torch.zeros((), dtype=torch.float64, device=device)

    def update(self, batch: EncodedBatch) -> None:
        order = batch.by_latent
        difference = batch.target[:, [TUNED]] - batch.target[:, [BASE]]
        self.written += order.weighted_dots(difference, self._rows())[:, 0]
        self.largest = torch.maximum(self.largest, order.maximum(order.values))
        self.total += difference.double().square().sum()

    def columns(self) -> Columns:
        share = self.written / self.total if self.total > 0 else torch.full_like(self.written, torch.nan)
        peak = self.largest * self._rows().norm(dim=-1)
        return {"difference_share": share, "difference_peak": peak}

    def _rows(self):
        decoder = self.crosscoder.decoder_rows().detach()
        return decoder[:, TUNED] - decoder[:, BASE]
