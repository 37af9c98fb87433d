"""Which latents of the tuned model have a mirror image in the base model: two latents that write one direction."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_crosscoder.analysis.matching import parts, unit
from tl_crosscoder.types import BASE, TUNED


@dataclass(frozen=True)
class Mirrors:
    """``pairs`` (tuned latent, base latent) with the ``cosine`` of each, highest first; ``n``: all there are, kept or not."""

    pairs: Int[Tensor, "pair 2"]
    cosine: Float[Tensor, " pair"]
    n: int


@torch.no_grad()
def mirrored(
    rows: Float[Tensor, "d_sae model d_in"],
    tuned: Int[Tensor, " tuned"],
    base: Int[Tensor, " base"],
    *,
    cosine: float = 0.9,
    most: int = 100_000,
) -> Mirrors:
    """The pairs with ``cos(rows[j, TUNED], rows[i, BASE]) > cosine``, j of ``tuned`` and i of ``base``, never a latent with itself.

    Cosines are made in blocks, so that memory does not grow with the number of latents; of the pairs the ``most`` similar are kept.
    """
    pairs, values, n = torch.zeros(0, 2, dtype=torch.long), torch.zeros(0, dtype=rows.dtype), 0
    for a in parts(len(tuned)):
        left = unit(rows[tuned[a], TUNED])
        for b in parts(len(base)):
            similar = left @ unit(rows[base[b], BASE]).T
            similar[tuned[a][:, None] == base[b]] = -1
            j, i = (similar > cosine).nonzero(as_tuple=True)
            n += len(j)
            here = torch.stack([tuned[a][j], base[b][i]], 1).cpu()
            pairs, values = torch.cat([pairs, here]), torch.cat([values, similar[j, i].cpu()])
            if len(values) > most:
                pairs, values = _highest(pairs, values, most)
    return Mirrors(*_highest(pairs, values, most), n)


def _highest(pairs: Tensor, values: Tensor, most: int) -> tuple[Tensor, Tensor]:
    order = values.argsort(descending=True, stable=True)[:most]
    return pairs[order], values[order]
