"""What a contender is, and the weights they all start from."""

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_crosscoder.dictionary.crosscoder import Crosscoder

#: Tokens of silence at which the losses call a latent dead.
SILENT = 10_000_000


class Unsupported(Exception):
    """The contender cannot take this step."""


@dataclass(frozen=True, eq=False)
class Start:
    """The weights every contender starts from, and which latents it shall count as dead."""

    W_enc: Float[Tensor, "d_sae model d_in"]
    b_enc: Float[Tensor, "d_sae"]
    W_dec: Float[Tensor, "d_sae model d_in"]
    b_dec: Float[Tensor, "model d_in"]
    dead: Bool[Tensor, "d_sae"]
    k: int

    def to(self, device: torch.device | str) -> "Start":
        """The same on a device."""
        names = "W_enc", "b_enc", "W_dec", "b_dec", "dead"
        return replace(self, **{name: getattr(self, name).to(device) for name in names})

    @property
    def parameter_bytes(self) -> int:
        return 4 * sum(part.numel() for part in (self.W_enc, self.b_enc, self.W_dec, self.b_dec))


@torch.no_grad()
def start_of(crosscoder: Crosscoder, k: int, dead: float, seed: int = 0) -> Start:
    """A crosscoder's weights, with a fraction of the latents made unable to fire.

    Their encoders shrink to a thousandth and their biases to zero: never among the largest scores, yet positive on half the tokens,
    so that an auxiliary loss finds as much to choose from as it would in training.
    """
    d_sae = crosscoder.d_sae
    chosen = torch.randperm(d_sae, generator=torch.Generator().manual_seed(seed))[: round(dead * d_sae)]
    mask = torch.zeros(d_sae, dtype=torch.bool)
    mask[chosen] = True
    parts = [crosscoder.W_enc_rows, crosscoder.b_enc, crosscoder.W_dec, crosscoder.b_dec]
    W_enc, b_enc, W_dec, b_dec = (part.detach().clone() for part in parts)
    W_enc[mask] *= 1e-3
    b_enc[mask] = 0
    return Start(W_enc, b_enc, W_dec, b_dec, mask, k)


class Contender(Protocol):
    """One way to train the dictionary.  ``key``: its name on the command line.  ``title``: its line in the table."""

    key: str
    title: str

    def __init__(self, start: Start, lr: float): ...

    def step(self, x: Float[Tensor, "batch model d_in"]) -> Tensor:
        """The loss before one full training step: forward, losses, backward, clip, Adam, and what else the trainer does."""
        ...

    def l0(self, x: Float[Tensor, "batch model d_in"]) -> float:
        """Mean number of latents a token that the training step decodes from."""
        ...

    def keep_dead(self) -> None:
        """Count the dead latents as dead again, should the step before have revived some; not timed."""

    def close(self) -> None:
        """Let go of the weights."""
