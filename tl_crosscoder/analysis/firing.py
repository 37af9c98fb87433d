"""When and how strongly a latent fires."""

import torch

from tl_crosscoder.analysis.base import Analysis, Columns, EncodedBatch, Metrics
from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.types import TUNED


class Firing(Analysis):
    """``n_fired, frequency, mean_act, max_act``: counts over tokens and the activations where it fires (not
    scaled by norms).

    ``mean_act`` is NaN for a latent that never fired; its ``max_act`` and ``frequency`` are 0.  Where each model chooses for itself
    (``code_norm="decoupled"``) a latent fires where any model has it, and ``tuned_mass`` is the mean over all tokens of what is
    written into the tuned model; else that is ``mean_act · frequency``, and no column.
    """

    def __init__(self, crosscoder: Crosscoder):
        super().__init__(crosscoder)
        shape, device = crosscoder.d_sae, crosscoder.W_dec.device
        self.tokens = 0
        self.count = torch.zeros(shape, dtype=torch.float64, device=device)
        self.total = torch.zeros(shape, dtype=torch.float64, device=device)
        self.largest = torch.zeros(shape, device=device)
        self.tuned_total: torch.Tensor | None = None

    def update(self, batch: EncodedBatch) -> None:
        order = batch.by_latent
        self.tokens += len(batch.codes)
        self.count += order.total(torch.ones_like(order.values))
        self.total += order.total(order.values)
        self.largest = torch.maximum(self.largest, order.maximum(order.values))
        if order.gates is not None:
            tuned = order.total(order.of_model(TUNED).values)
            self.tuned_total = tuned if self.tuned_total is None else self.tuned_total + tuned

    def columns(self) -> Columns:
        apart = {} if self.tuned_total is None else {"tuned_mass": self.tuned_total / self.tokens}
        return apart | {
            "n_fired": self.count,
            "frequency": self.count / self.tokens,
            "mean_act": torch.where(self.count > 0, self.total / self.count, torch.nan),
            "max_act": self.largest,
        }

    def metrics(self) -> Metrics:
        return {
            "tokens": self.tokens,
            "l0": (self.count.sum() / self.tokens).item(),
            "dead_fraction": (self.count == 0).double().mean().item(),
        }
