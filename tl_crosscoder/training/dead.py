"""Which latents have fallen silent."""

import torch
from jaxtyping import Int
from torch import Tensor

from tl_crosscoder.dictionary.codes import Codes, DenseCodes
from tl_crosscoder.dictionary.shard import WHOLE, Shard


class FiringRecord:
    """Tokens since each latent last fired; all start at 0.  With a shard: of its latents, on all tokens."""

    def __init__(self, d_sae: int, device: torch.device, shard: Shard = WHOLE):
        self.shard = shard
        self.tokens_since_fired: Int[Tensor, d_sae] = torch.zeros(d_sae, dtype=torch.int64, device=device)

    def update(self, codes: Codes | DenseCodes) -> None:
        fired = self.shard.tokens.add_(codes.fired().int()) > 0
        self.tokens_since_fired += self.shard.tokens.size * len(codes)
        self.tokens_since_fired.masked_fill_(fired, 0)

    def dead_fraction(self, dead_after_tokens: int) -> float:
        dead, shard = int((self.tokens_since_fired >= dead_after_tokens).sum()), self.shard
        return shard.total(dead, shard.latents) / (shard.latents.size * len(self.tokens_since_fired))
