"""Sums over the steps between two rows of the log."""

import math
import time
from typing import Any

import torch
from torch import Tensor

from tl_crosscoder.dictionary.crosscoder import CrosscoderOutput
from tl_crosscoder.dictionary.shard import WHOLE, Shard


class Window:
    """Fraction of variance explained, L0 and mean loss terms, from global sums: never a mean of ratios of batches.

    With a shard: sums over what is in this process, which are added up over the ranks when they are asked for.
    """

    def __init__(self, shard: Shard = WHOLE):
        self.shard = shard
        self.tokens, self.steps, self.start = 0, 0, time.perf_counter()
        self.losses: dict[str, Tensor] = {}
        self.active = 0
        self.moments: list[Tensor] = []

    @torch.no_grad()
    def add(self, out: CrosscoderOutput, losses: dict[str, Tensor]) -> None:
        self.tokens += len(out.codes)
        self.steps += 1
        self.active += out.codes.n_active
        for name, value in losses.items():
            self.losses[name] = self.losses.get(name, 0) + value.detach()
        new = [f(y) for y in (out.error, out.target) for f in (_sum, _sum_of_squares)]
        self.moments = [a + b for a, b in zip(self.moments, new, strict=True)] if self.moments else new

    def state_dict(self) -> dict[str, Any]:
        """The sums so far of all ranks, and how long they took."""
        shard = self.shard
        return {
            "tokens": shard.tokens.size * self.tokens,
            "steps": self.steps,
            "seconds": time.perf_counter() - self.start,
            "active": shard.total(self.active),
            "losses": {name: shard.mean(value) for name, value in self.losses.items()},
            "moments": {str(i): shard.tokens.add_(value.clone()) for i, value in enumerate(self.moments)},
        }

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Go on from these sums, which the first ranks take over."""
        shard = self.shard
        self.tokens, self.steps = state["tokens"] // shard.tokens.size, state["steps"]
        self.active = state["active"] if shard.is_first else 0
        self.start = time.perf_counter() - state["seconds"]
        self.losses = {name: value.to(device) for name, value in state["losses"].items()}
        self.moments = [(shard.tokens.index == 0) * value.to(device) for value in state["moments"].values()]

    def row(self) -> dict[str, Any]:
        """``fve_base = 1 - Σ_k var(e_k) / Σ_k var(x_k)`` over the window; the mean of the error is not penalised.

        None where x does not vary.
        """
        sums = self.state_dict()
        e_sum, e_square, x_sum, x_square = sums["moments"].values()
        left = e_square - e_sum.square().sum(-1) / sums["tokens"]
        total = x_square - x_sum.square().sum(-1) / sums["tokens"]
        fve = (1 - left / total).tolist()
        names = ["base", "tuned", *(str(m) for m in range(2, len(fve)))] if len(fve) > 1 else ["difference"]
        return {
            "loss": sum(value.item() for value in sums["losses"].values()) / self.steps,
            **{name: value.item() / self.steps for name, value in sums["losses"].items()},
            **{
                f"fve_{name}": value if math.isfinite(value) else None
                for name, value in zip(names, fve, strict=False)
            },
            "l0": sums["active"] / sums["tokens"],
            "tokens_per_second": round(sums["tokens"] / sums["seconds"], 1),
        }


def _sum(y: Tensor) -> Tensor:
    return y.sum(0).double()


def _sum_of_squares(y: Tensor) -> Tensor:
    return torch.linalg.vector_norm(y, dim=(0, 2)).double().square()
