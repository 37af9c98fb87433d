"""What a matching would find if nothing were shared: after a random rotation of one side, among random latents, or with the
activations of one side turned within each document."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_crosscoder.analysis.acts_matching import SharedActs, match_acts, shifted
from tl_crosscoder.analysis.matching import Matching, Method, match_latents


def rotation_null(
    rows_a: Float[Tensor, "a *dims d_in"],
    rows_b: Float[Tensor, "b *dims d_in"],
    *,
    n_draws: int = 20,
    seed: int = 0,
    method: Method | None = None,
) -> list[Matching]:
    """The matching after each of ``n_draws`` random rotations of side b.

    The rotation acts on ``d_in``, the same for both models of a latent: norms, Δnorm and the cosine between a latent's two
    directions stay as they are, as do all angles within b; only where b points in the space is forgotten.
    """
    generator = torch.Generator().manual_seed(seed)
    return [
        match_latents(rows_a, rows_b @ random_rotation(rows_b.shape[-1], generator).to(rows_b), method=method)
        for _ in range(n_draws)
    ]


def random_null(
    rows_a: Float[Tensor, "a *dims"],
    rows_b: Float[Tensor, "b *dims"],
    alive_a: Int[Tensor, " latent_a"],
    alive_b: Int[Tensor, " latent_b"],
    sizes: tuple[int, int],
    *,
    n_draws: int = 20,
    seed: int = 0,
    method: Method | None = None,
) -> list[Matching]:
    """The matching of as many latents of each side, ``sizes``, drawn from the ``alive`` ones instead of chosen."""
    draws = random_latents(alive_a, alive_b, sizes, n_draws=n_draws, seed=seed)
    return [match_latents(rows_a[one], rows_b[other], method=method) for one, other in draws]


def shift_null(
    acts: SharedActs,
    latents_a: Int[Tensor, " a"],
    latents_b: Int[Tensor, " b"],
    *,
    n_draws: int = 20,
    seed: int = 0,
    method: Method | None = None,
) -> list[Matching]:
    """The matching by activations after each of ``n_draws`` turns of side b's tokens (see :func:`shifted`)."""
    seeds = np.random.SeedSequence(seed).generate_state(n_draws).tolist()
    return [
        match_acts(acts.a, shifted(acts.b, acts.document, s), latents_a, latents_b, method=method)
        for s in seeds
    ]


def random_acts_null(
    acts: SharedActs,
    alive_a: Int[Tensor, " latent_a"],
    alive_b: Int[Tensor, " latent_b"],
    sizes: tuple[int, int],
    *,
    n_draws: int = 20,
    seed: int = 0,
    method: Method | None = None,
) -> list[Matching]:
    """The matching by activations of as many random living latents of each side."""
    draws = random_latents(alive_a, alive_b, sizes, n_draws=n_draws, seed=seed)
    return [match_acts(acts.a, acts.b, one, other, method=method) for one, other in draws]


def random_latents(
    alive_a: Int[Tensor, " latent_a"],
    alive_b: Int[Tensor, " latent_b"],
    sizes: tuple[int, int],
    *,
    n_draws: int,
    seed: int,
) -> list[tuple[Tensor, Tensor]]:
    """``n_draws`` times ``sizes`` of the ``alive`` latents of each side, at random."""
    for side, size, alive in zip("ab", sizes, (alive_a, alive_b), strict=True):
        if size > len(alive):
            raise ValueError(f"{size} random latents wanted of side {side}, which has {len(alive)} alive.")
    generator = torch.Generator().manual_seed(seed)

    def drawn(alive: Tensor, size: int) -> Tensor:
        return alive[torch.randperm(len(alive), generator=generator)[:size].to(alive.device)]

    return [(drawn(alive_a, sizes[0]), drawn(alive_b, sizes[1])) for _ in range(n_draws)]


def random_rotation(d: int, generator: torch.Generator) -> Float[Tensor, "d d"]:
    """An orthogonal matrix, uniform (Haar), in float64."""
    q, r = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64, generator=generator))
    return q * r.diagonal().sign()  # the signs make QR of a Gaussian uniform


def p_value(observed: float, null: Sequence[float]) -> float:
    """``(1 + #{null >= observed}) / (n + 1)``: how often chance does as well; NaN where the observed value is."""
    if observed != observed:
        return float("nan")
    return (1 + sum(value >= observed for value in null)) / (len(null) + 1)
