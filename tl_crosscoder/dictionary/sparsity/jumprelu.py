"""A learned threshold for each latent."""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tl_crosscoder.dictionary.scores import Found, Scores
from tl_crosscoder.dictionary.sparsity.base import SPARSITIES, Sparsity


@SPARSITIES.register("jumprelu")
class JumpReLU(Sparsity):
    """A latent is active where its pre-activation p exceeds ``θ = exp(log_threshold)``, learned for each latent.

    The jump has no gradient; ``d f/d log θ`` is taken to be ``-θ / bandwidth`` where ``|p - θ| < bandwidth / 2`` and 0 elsewhere,
    also on tokens where the latent is not active.  Training is therefore dense; evaluation looks at active pairs only.
    ``init_threshold`` and ``bandwidth`` are in units of p: the defaults are for activations of mean norm √d_in, as
    :class:`Normalizer` makes them.  Pair it with :class:`TanhPenalty` and :class:`PreAct`.

    Source: Rajamanoharan et al. 2024, arXiv:2407.14435; this gradient after Conerly et al., Circuits Updates, January 2025.
    """

    log_threshold: Tensor

    def __init__(self, init_threshold: float = 0.1, bandwidth: float = 2.0):
        super().__init__()
        if init_threshold <= 0 or bandwidth <= 0:
            raise ValueError(
                f"JumpReLU wants a threshold and a bandwidth above 0, got init_threshold={init_threshold}, bandwidth={bandwidth}"
            )
        self.init_threshold, self.bandwidth = init_threshold, bandwidth
        self.register_parameter("log_threshold", None)

    def check(self, d_sae: int) -> None:
        """Make the thresholds, one a latent."""
        if self.log_threshold is None:
            self.log_threshold = nn.Parameter(torch.full((d_sae,), self.init_threshold).log())
        elif len(self.log_threshold) != d_sae:
            raise ValueError(
                f"this JumpReLU has thresholds for {len(self.log_threshold)} latents, not for d_sae={d_sae}; "
                "give each crosscoder a JumpReLU of its own"
            )

    def restricted(self, latents: Int[Tensor, "latent"]) -> "JumpReLU":
        made = JumpReLU(self.init_threshold, self.bandwidth)
        made.log_threshold = nn.Parameter(self.log_threshold.detach()[latents].clone())
        return made

    @property
    def selects(self) -> bool:
        return not self.training

    @property
    def thresholds(self) -> Float[Tensor, "d_sae"]:
        return self.log_threshold.exp()

    def choose(self, scores: Scores) -> Found:
        return scores.above(self.thresholds.detach() * scores.norms)

    def forward(
        self, pre_acts: Float[Tensor, "batch d_sae"], norms: Float[Tensor, "d_sae"]
    ) -> Float[Tensor, "batch d_sae"]:
        """The activations; gradients flow to kept pre-activations and to the thresholds."""
        self.check(pre_acts.shape[1])
        norms = norms.detach()  # as in choose(): a latent of norm 0 is never active
        chosen = pre_acts.detach() * norms > self.thresholds.detach() * norms
        return _Jump.apply(pre_acts, self.log_threshold, chosen, self.bandwidth)


class _Jump(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        pre_acts: Tensor,
        log_threshold: Tensor,
        chosen: Bool[Tensor, "batch d_sae"],
        bandwidth: float,
    ) -> Tensor:
        ctx.save_for_backward(pre_acts, log_threshold, chosen)
        ctx.bandwidth = bandwidth
        return pre_acts.where(chosen, 0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (pre_acts, log_threshold, chosen) = grads, ctx.saved_tensors
        threshold = log_threshold.exp()
        near = (pre_acts - threshold).abs() < ctx.bandwidth / 2
        to_threshold = -(threshold / ctx.bandwidth) * grad.where(near, 0).sum(0)
        return grad.where(chosen, 0), to_threshold, None, None
