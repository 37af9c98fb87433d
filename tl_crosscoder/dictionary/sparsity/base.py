"""What every sparsity offers."""

import inspect
from abc import ABC, abstractmethod

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tl_crosscoder.dictionary.scores import Found, GivenScores, Scores
from tl_crosscoder.dictionary.shard import WHOLE, Shard
from tl_crosscoder.registry import Registry

SPARSITIES = Registry("sparsity")


class Sparsity(nn.Module, ABC):
    """Chooses which latents are active.

    The score of latent j is ``relu(pre_act_j) · norm_j`` with the norm of its decoders, so that stretching the encoder against the
    decoder changes no choice; the code itself stays the unscaled activation.  ``train()`` may look at the whole batch, ``eval()``
    looks at one token at a time.
    """

    #: Active latents per token asked for at this step; None where no number is asked for.
    k_now: int | float | None = None
    #: What of the dictionary and of each batch is in this process.
    shard: Shard = WHOLE

    def __init__(self):
        super().__init__()

    def extra_repr(self) -> str:
        known = inspect.signature(type(self)).parameters
        settings = {name: getattr(self, name, None) for name in known}
        return ", ".join(f"{n}={v!r}" for n, v in settings.items() if isinstance(v, int | float))

    @property
    def selects(self) -> bool:
        """The active pairs tell every gradient: 1 to the pre-activation of a kept pair, none to anything else."""
        return True

    @property
    def thresholds(self) -> Float[Tensor, "d_sae"] | None:
        """The pre-activation above which each latent is active, where that is learned by gradient."""
        return None

    @abstractmethod
    def choose(self, scores: Scores) -> Found:
        """The active pairs; ask ``scores`` for as little as decides it (``above``), or for every pre-activation."""

    def forward(
        self, pre_acts: Float[Tensor, "batch d_sae"], norms: Float[Tensor, "d_sae"]
    ) -> Float[Tensor, "batch d_sae"]:
        """The activations, zero where not chosen; no gradient flows through the choice."""
        found = self.choose(GivenScores(pre_acts.detach(), norms.detach()))
        chosen = pre_acts.new_zeros(pre_acts.shape, dtype=torch.bool)
        chosen[found.tokens, found.latents] = True
        return pre_acts.where(chosen, 0)

    def restricted(self, latents: Int[Tensor, "latent"]) -> "Sparsity | None":  # noqa: ARG002
        """What chooses among these latents alone as this one does in ``eval()``; None where the other latents have a say."""
        return None

    @torch.no_grad()
    def divide(self, shard: Shard) -> None:
        """Keep what is of the latents of a shard."""
        for name, tensor in self.state_dict(keep_vars=True).items():
            tensor.data = shard.rows(name, tensor.data).clone()
        for part in self.modules():
            if isinstance(part, Sparsity):
                part.shard = shard

    def advance(self, step: int, steps: int) -> None:
        """Set the schedule for training step ``step`` (from 0) of ``steps``."""

    def check(self, d_sae: int) -> None:
        """Refuse a dictionary this sparsity cannot serve; one with weights for each latent makes them here, once."""


def check_k(k: int | float, d_sae: int) -> None:
    if not 0 < k <= d_sae:
        raise ValueError(f"k is the number of active latents per token: 0 < k <= d_sae={d_sae}, got k={k}")
