"""Adam's moments: one number of the weights' precision each, or of half the size for the large weights.

A second moment moves by a thousandth of itself a step, less than bfloat16 can tell apart: rounded to the nearest number it would
stand still.  Here a number is rounded up or down by chance, so that it is right on average: a uniform 16-bit number is added to the
bits that bfloat16 cuts off.  The chance is the same for every model's row of a latent, so that tied rows stay equal, and a function
of the step alone, so that a training that goes on has the same bytes.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from jaxtyping import Float, Int32
from torch import Tensor

#: The bits of a float32 that bfloat16 has too.
KEPT = -1 << 16


class Moments:
    """Both moments of every parameter; ``halved``: those of the weights [d_sae, model, d_in] are bfloat16."""

    def __init__(self, parameters: Mapping[str, Tensor], *, halved: bool):
        def zeros(p: Tensor) -> Tensor:
            return torch.zeros_like(p, dtype=torch.bfloat16 if halved and p.dim() == 3 else None)

        self.exp_avg = {name: zeros(p) for name, p in parameters.items()}
        self.exp_avg_sq = {name: zeros(p) for name, p in parameters.items()}
        self._chance: torch.Generator | None = None

    def start(self, step: int) -> None:
        """The chances of this step."""
        device = next(iter(self.exp_avg.values())).device
        self._chance = torch.Generator(device).manual_seed(step)

    @contextmanager
    def of(self, name: str, rows: slice, like: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Both moments of some rows in the precision of ``like``, to be changed in place within the block."""
        kept = self.exp_avg[name][rows], self.exp_avg_sq[name][rows]
        if kept[0].dtype == like.dtype:
            yield kept
            return
        first, second = (moment.to(like.dtype) for moment in kept)
        yield first, second
        noise = self._noise(first)
        for moment, changed in zip(kept, (first, second), strict=True):
            moment.copy_(round_(changed.float(), noise))

    def _noise(self, like: Tensor) -> Int32[Tensor, "latent 1 d_in"]:
        """16 random bits for each number: one for the latent plus one for the column, which are even and pairwise independent."""
        latents, _, columns = like.shape
        size, how = 1 << 16, {"generator": self._chance, "device": like.device, "dtype": torch.int32}
        of_latent, of_column = (torch.randint(size, (n,), **how) for n in (latents, columns))
        return (of_latent[:, None] + of_column).bitwise_and_(size - 1)[:, None]


def round_(x: Float[Tensor, "*shape"], noise: Int32[Tensor, "..."]) -> Float[Tensor, "*shape"]:
    """Make float32 numbers ones that bfloat16 can hold: each of the two neighbours by its nearness where the noise is uniform."""
    x.view(torch.int32).add_(noise).bitwise_and_(KEPT)
    return x
