"""Batches of paired activations that look like a language model's, made without one."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def planted_batches(
    d_in: int, n_concepts: int, batch: int, n: int, *, active: int = 40, seed: int = 0
) -> list[Float[Tensor, "batch model d_in"]]:
    """``n`` batches of mean norm √d_in: about ``active`` of the planted concepts on each token, a loud common part, and noise.

    A concept's frequency falls with its rank as 1 / (rank + 50), as words' do.  The tuned model's directions are the base model's,
    turned a little; one concept in twenty is missing from tuned, another from base.  The common part, a mean and four directions
    that carry a third of the variance, is what makes real residual streams far from white.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    base = F.normalize(normal(n_concepts, d_in), dim=1)
    tuned = F.normalize(base + 0.3 * d_in**-0.5 * normal(n_concepts, d_in), dim=1)
    kind = torch.rand(n_concepts, generator=generator)
    tuned[kind < 0.05] = 0
    base[kind > 0.95] = 0
    frequency = 1 / (torch.arange(n_concepts) + 50.0)
    mean, loud = F.normalize(normal(2, d_in), dim=1), F.normalize(normal(4, d_in), dim=1)
    strength_of_loud = 0.5 * active**0.5

    batches = []
    for _ in range(n):
        concepts = frequency.multinomial(batch * active, replacement=True, generator=generator)
        strengths = 0.5 + torch.rand(batch, active, generator=generator)
        concepts, common = concepts.view(batch, active), strength_of_loud * normal(batch, 4) @ loud
        sums = [
            F.embedding_bag(concepts, rows, per_sample_weights=strengths, mode="sum")
            for rows in (base, tuned)
        ]
        noise = 0.3 * active**0.5 * d_in**-0.5 * normal(batch, 2, d_in)
        x = torch.stack(sums, 1) + common[:, None] + 2 * mean + noise
        batches.append(x * (d_in**0.5 / x.norm(dim=-1).mean()))
    return batches
