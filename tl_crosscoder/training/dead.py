"""Which latents have fallen silent."""

import torch
from jaxtyping import Int
from torch import Tensor

from tl_crosscoder.dictionary.codes import Codes, DenseCodes


class FiringRecord:
    """Tokens since each latent last fired; all start at 0."""

    def __init__(self, d_sae: int, device: torch.device):
        self.tokens_since_fired: Int[Tensor, d_sae] = torch.zeros(d_sae, dtype=torch.int64, device=device)

    def update(self, codes: Codes | DenseCodes) -> None:
        self.tokens_since_fired += len(codes)
        self.tokens_since_fired.masked_fill_(codes.fired(), 0)

    def dead_fraction(self, dead_after_tokens: int) -> float:
        return (self.tokens_since_fired >= dead_after_tokens).float().mean().item()
