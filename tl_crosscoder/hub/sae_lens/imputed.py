"""A guess of the other model's activations from one model's, folded into that model's encoder, and how good it is."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tl_crosscoder.hub.sae_lens.flat import Flat

#: ``other ≈ own @ A + c``; A None: no part of own.
Guess = tuple[Tensor | None, Tensor]


@dataclass(frozen=True)
class Fidelity:
    """On ``tokens`` held-out tokens: ‖f' − f‖ / ‖f‖ of the codes, the Jaccard index of the active pairs, mean active latents,
    and the share of the model's variance that is explained, by the view and by the crosscoder."""

    tokens: int
    relative_error: float
    jaccard: float
    l0: float
    l0_crosscoder: float
    fve: float
    fve_crosscoder: float


def linear(own: Float[Tensor, "batch d_in"], other: Float[Tensor, "batch _"]) -> Guess:
    """The least squares fit, in float64."""
    n, d_in = own.shape
    if n <= d_in:
        raise ValueError(
            f"a linear guess from {d_in} numbers wants more tokens than that to fit, got {n} (half of those given); pass more "
            "batches, or encoder='copy'"
        )
    x, y = own.double(), other.double()
    mean_x, mean_y = x.mean(0), y.mean(0)
    A = torch.linalg.lstsq((x - mean_x).cpu(), (y - mean_y).cpu(), driver="gelsd").solution.to(x.device)
    return A, mean_y - mean_x @ A


def copy(own: Float[Tensor, "batch d_in"], other: Float[Tensor, "batch _"]) -> Guess:  # noqa: ARG001
    """Own."""
    d_in = own.shape[1]
    return torch.eye(d_in, dtype=torch.float64), torch.zeros(d_in, dtype=torch.float64)


def mean(own: Float[Tensor, "batch d_in"], other: Float[Tensor, "batch _"]) -> Guess:  # noqa: ARG001
    """The other's mean, whatever own is."""
    return None, other.double().mean(0)


ENCODERS = {"linear": linear, "copy": copy, "mean": mean}


def imputed(half: Flat, other_encoder: Float[Tensor, "d_in d_sae"], guess: Guess) -> Flat:
    """The half with the guess in the other model's place."""
    A, c = guess
    other = other_encoder.double()
    b_enc = (half.b_enc.double() + c.to(other.device) @ other).to(half.b_enc.dtype)
    W_enc = (
        half.W_enc if A is None else (half.W_enc.double() + A.to(other.device) @ other).to(half.W_enc.dtype)
    )
    return Flat(W_enc, b_enc, half.W_dec, half.b_dec, half.threshold, half.k)


@torch.no_grad()
def fidelity(joint: Flat, half: Flat, x: Float[Tensor, "batch model d_in"], model: int) -> Fidelity:
    """The view beside the whole crosscoder, on raw activations of both models."""
    width = len(half.b_dec)
    own = x[:, model, :width].double()
    counts, errors = torch.zeros(5, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for part in x.split(1024):
        part = part.to(joint.W_dec)
        exact, codes = joint.encode(part.flatten(1)), half.encode(part[:, model, :width])
        recon = joint.decode(exact).unflatten(1, part.shape[1:])[:, model, :width]
        a, b = codes > 0, exact > 0
        terms = ((codes - exact).square().sum(), exact.square().sum(), (a | b).sum(), a.sum(), b.sum())
        counts += torch.stack([term.double().cpu() for term in terms])
        pair = torch.stack([half.decode(codes), recon])
        errors += (pair - part[:, model, :width]).double().square().sum((1, 2)).cpu()
    error, size, either, active, active_exact = counts.tolist()
    if not size:
        raise ValueError(
            f"no latent is active on {len(x)} held-out tokens, so that there is nothing to measure"
        )
    fve, fve_crosscoder = (1 - errors / (own - own.mean(0)).square().sum().cpu()).tolist()
    return Fidelity(
        tokens=len(x),
        relative_error=(error / size) ** 0.5,
        jaccard=(active + active_exact - either) / either,
        l0=active / len(x),
        l0_crosscoder=active_exact / len(x),
        fve=fve,
        fve_crosscoder=fve_crosscoder,
    )
