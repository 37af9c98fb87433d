"""Which latents have fallen silent."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


class FiringRecord:
    """Tokens since each latent last fired; all start at 0."""

    def __init__(self, d_sae: int, device: torch.device):
        self.tokens_since_fired: Int[Tensor, d_sae] = torch.zeros(d_sae, dtype=torch.int64, device=device)

    def update(self, acts: Float[Tensor, "batch d_sae"]) -> None:
        fired = acts.amax(0) > 0
        self.tokens_since_fired += len(acts)
        self.tokens_since_fired.masked_fill_(fired, 0)

    def dead_fraction(self, dead_after_tokens: int) -> float:
        return (self.tokens_since_fired >= dead_after_tokens).float().mean().item()
