"""Where a dictionary starts."""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from tl_crosscoder.dictionary.prefix import first_latents

DIRECTIONS = ("gaussian", "uniform")
#: Rows drawn at once.  A multiple of 16: torch makes Gaussian numbers by the 16.
AT_ONCE = 4096


@dataclass(frozen=True)
class Init:
    """Decoder rows of length ``norm`` in random directions, the encoder their transpose, biases 0.

    ``same``: whether a latent's direction is the same in all models, or for how many of the first latents it is: a number (int) or
    a share (float).  The same start suits concepts that every model has; on planted data, rare concepts of one model are found
    more often from independent ones.  ``directions``: ``"gaussian"``, or ``"uniform"`` in a cube (Kaiming's, brought to ``norm``).
    ``transposed=False``: encoder rows of the same length in directions of their own.
    """

    norm: float = 1.0
    same: bool | int | float = True
    directions: Literal["gaussian", "uniform"] = "gaussian"
    transposed: bool = True
    seed: int = 0

    def __post_init__(self):
        if not (self.norm > 0 and math.isfinite(self.norm)):
            raise ValueError(f"the rows' norm is a finite number above 0, got {self.norm}")
        if self.directions not in DIRECTIONS:
            raise ValueError(f"no directions named {self.directions!r}; known: {', '.join(DIRECTIONS)}")

    def rows(
        self, d_sae: int, n_models: int, d_in: int, *, tied: int = 0, held: slice = slice(None)
    ) -> tuple[Float[Tensor, "held model d_in"], Float[Tensor, "held model d_in"]]:
        """Encoder and decoder on the CPU; the first ``tied`` latents have the same decoder in all models in any case.

        ``held``: only these latents, with the numbers that they have among all.
        """
        generator = torch.Generator("cpu").manual_seed(self.seed)
        alike = float(self.same) if isinstance(self.same, bool) else self.same
        same = first_latents(alike, d_sae)
        starts = held.start or 0, held.step or 1
        decoder = self._rows(d_sae, (n_models, d_in), max(tied, same), generator, *starts)
        if self.transposed:
            return decoder.clone(), decoder
        return self._rows(d_sae, (n_models, d_in), same, generator, *starts), decoder

    def _rows(
        self, d_sae: int, row: tuple[int, int], same: int, generator: torch.Generator, start: int, step: int
    ) -> Tensor:
        """Every ``step``-th latent from ``start`` on."""
        alike = self._draw(same, (1, row[1]), generator, start, step).expand(-1, *row)
        rows = torch.cat([alike, self._draw(d_sae - same, row, generator, start - same, step)])
        return rows.mul_(self.norm / rows.norm(dim=-1, keepdim=True))

    def _draw(
        self, n: int, row: tuple[int, int], generator: torch.Generator, start: int, step: int
    ) -> Tensor:
        """Every ``step``-th of n rows; drawn some at a time, they are those of one long draw."""
        held = []
        for first, stop in pairwise([*range(0, max(1, n - AT_ONCE + 1), AT_ONCE), n]):
            drawn = self._directions((stop - first, *row), generator)
            held.append(drawn[(start - first) % step :: step].clone())
        return torch.cat(held)

    def _directions(self, shape: tuple[int, int, int], generator: torch.Generator) -> Tensor:
        if self.directions == "gaussian":
            return torch.randn(shape, generator=generator, device="cpu")
        return 2 * torch.rand(shape, generator=generator, device="cpu") - 1
