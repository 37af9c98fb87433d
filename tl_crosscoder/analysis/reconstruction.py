"""How much of each model's activations, and of their difference, the dictionary explains."""

import torch

from tl_crosscoder.analysis.base import Analysis, Columns, EncodedBatch, Metrics
from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.types import BASE, TUNED
from tl_crosscoder.widths import alike


class Moments:
    """Running sum of squares about the running mean (Chan et al. 1983), over rows, in float64."""

    def __init__(self):
        self.n, self.mean, self.spread = 0, torch.zeros(()), torch.zeros(())

    def update(self, rows: torch.Tensor) -> None:
        rows = rows.double()
        n, mean = len(rows), rows.mean(0)
        shift = mean - self.mean
        self.spread = (
            self.spread + (rows - mean).square().sum(0) + shift.square() * (self.n * n / (self.n + n))
        )
        self.mean = self.mean + shift * (n / (self.n + n))
        self.n += n


class Reconstruction(Analysis):
    """``fve_base, fve_tuned, fve_difference, fve``: 1 = perfect, 0 = no better than the mean.

    ``1 − Σ_k var(e_k) / Σ_k var(x_k)`` with the variances over *all* tokens, never a mean of per-batch ratios;
    ``fve`` pools both models. ``fve_difference`` is that of tuned − base: on a narrow fine-tune each model can
    be explained well and the change not at all. NaN where there is no variance (identical models have no
    difference to explain, or models of unlike width).  A crosscoder of one model has ``fve`` alone.

    Source: the global form of the FVE of Minder et al. 2025, arXiv:2504.02922.
    """

    def __init__(self, crosscoder: Crosscoder):
        super().__init__(crosscoder)
        self.target, self.error = Moments(), Moments()
        self.target_difference, self.error_difference = Moments(), Moments()

    def update(self, batch: EncodedBatch) -> None:
        self.target.update(batch.target)
        self.error.update(batch.error)
        if self.crosscoder.n_models == 1 or not alike(self.crosscoder):
            return
        self.target_difference.update(batch.target[:, TUNED] - batch.target[:, BASE])
        self.error_difference.update(batch.error[:, TUNED] - batch.error[:, BASE])

    def columns(self) -> Columns:
        return {}

    def metrics(self) -> Metrics:
        error, target = self.error.spread.sum(-1), self.target.spread.sum(-1)
        if self.crosscoder.n_models == 1:
            return {"fve": _fve(error.sum(), target.sum())}
        return {
            "fve_base": _fve(error[BASE], target[BASE]),
            "fve_tuned": _fve(error[TUNED], target[TUNED]),
            "fve_difference": _fve(self.error_difference.spread.sum(), self.target_difference.spread.sum()),
            "fve": _fve(error.sum(), target.sum()),
        }


def _fve(error: torch.Tensor, target: torch.Tensor) -> float:
    return (1 - error / target).item() if target > 0 else float("nan")
