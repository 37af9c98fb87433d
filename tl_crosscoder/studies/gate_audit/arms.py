"""What the gate is shown: the pair, and three pairs about which the answer is known.

========== ============================================== =====================================================================
arm        the tuned side                                 what latents that pass the gate mean there
========== ============================================== =====================================================================
target     the tuned model                                the question
identity   the base model, bit for bit                    the gate is broken: there is no difference to find
disjoint   the base model on other tokens                 what two sides that merely differ give; calibrates the size of a count
noise      base + Gaussian noise of the difference's size what a difference without content gives
========== ============================================== =====================================================================

Each arm is a view of the captured activations, made as it is read; nothing is stored."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_crosscoder.errors import EmptyData
from tl_crosscoder.models.activations import PairedActivations
from tl_crosscoder.models.shards import Shard
from tl_crosscoder.types import BASE, TUNED

ArmName = Literal["target", "identity", "disjoint", "noise"]
Noise = Literal["scale", "covariance"]
ARMS: tuple[ArmName, ...] = ("target", "identity", "disjoint", "noise")
BLOCK = 256
#: ``side(start, stop, base)``: the tuned side of these rows of one shard
Side = Callable[[int, int, Float[Tensor, "batch d_in"]], Float[Tensor, "batch d_in"]]


def arm(
    store: PairedActivations,
    name: ArmName,
    *,
    seed: int = 0,
    noise: Noise = "scale",
) -> PairedActivations:
    """The arm's activations.  ``disjoint`` has about half of the rows: each is of a token of one half and one of the other.

    ``noise``: "scale" is white, of the same mean square as the difference; "covariance" has its covariance too, so that it points
    where the difference points: the harder null, which a difference of few directions cannot exceed in number.
    """
    if name == "target":
        return store
    if name == "identity":
        return _with_side(store, [lambda _start, _stop, base: base] * len(store.shards))
    if name == "disjoint":
        return _disjoint(store, seed)
    if name == "noise":
        root = noise_root(store, noise)
        return _with_side(store, [_noisy(number, seed, root) for number in range(len(store.shards))])
    raise KeyError(f"no arm named {name!r}; known: {', '.join(ARMS)}")


def noise_root(store: PairedActivations, noise: Noise) -> Float[Tensor, "d_in d_in"]:
    """A matrix that makes white noise into noise of the difference's scale or covariance, about its mean; raw units."""
    total, moment = torch.zeros(store.d_in, dtype=torch.float64), 0.0
    for x in store.batches():
        difference = (x[:, TUNED] - x[:, BASE]).double()
        total += difference.sum(0)
        moment = moment + difference.T @ difference
    mean = total / len(store)
    covariance = moment / len(store) - torch.outer(mean, mean)
    if noise == "scale":
        size = (covariance.trace().clamp(min=0) / store.d_in).sqrt()
        return (size * torch.eye(store.d_in, dtype=torch.float64)).float()
    if noise == "covariance":
        values, vectors = torch.linalg.eigh(covariance)
        return (vectors * values.clamp(min=0).sqrt() @ vectors.T).float()
    raise KeyError(f"no noise named {noise!r}; known: scale, covariance")


@dataclass(frozen=True, eq=False)
class OtherSide:
    """A shard whose tuned side is made from its base side."""

    inner: Shard
    side: Side

    def __len__(self) -> int:
        return len(self.inner)

    def acts(self, start: int, stop: int) -> Float[Tensor, "batch model d_in"]:
        base = self.inner.acts(start, stop)[:, BASE].float()
        return torch.stack([base, self.side(start, stop, base)], 1)

    def places(self, start: int, stop: int) -> tuple[Int[Tensor, "batch"], Int[Tensor, "batch"]]:
        return self.inner.places(start, stop)


def _with_side(store: PairedActivations, sides: list[Side]) -> PairedActivations:
    shards = [OtherSide(shard, side) for shard, side in zip(store.shards, sides, strict=True)]
    return PairedActivations(shards, store.manifest, store.corpus, runs=store.runs)


def _noisy(number: int, seed: int, root: Tensor) -> Side:
    """The same noise for the same row, however the rows are read: drawn block by block."""

    @lru_cache(maxsize=8)
    def block(at: int) -> Tensor:
        state = int(np.random.SeedSequence([seed, number, at]).generate_state(1, np.uint64)[0]) >> 1
        return torch.randn(BLOCK, len(root), generator=torch.Generator().manual_seed(state)) @ root

    def side(start: int, stop: int, base: Tensor) -> Tensor:
        first, last = start // BLOCK, -(-stop // BLOCK)
        drawn = torch.cat([block(at) for at in range(first, last)])
        return base + drawn[start - first * BLOCK : stop - first * BLOCK]

    return side


def _disjoint(store: PairedActivations, seed: int) -> PairedActivations:
    """Half of the conversations as base, the other half's rows, in random blocks and shuffled within, as tuned."""
    first, second = store.split(0.5, seed)
    n_blocks = len(second) // BLOCK
    if not n_blocks:
        raise EmptyData(f"the disjoint arm wants {BLOCK} tokens in each half, got {len(second)} in one.")
    rng = np.random.default_rng(seed)
    order = rng.permutation(n_blocks)
    starts = np.cumsum([0, *(stop - start for _, start, stop in second.runs)])

    @lru_cache(maxsize=8)
    def block(at: int) -> Tensor:
        place = int(order[at % n_blocks]) * BLOCK
        mixed = torch.from_numpy(np.random.default_rng([seed, at]).permutation(BLOCK))
        return _rows(second, starts, place, place + BLOCK)[:, BASE].float()[mixed]

    def side_of(number: int) -> Side:
        ordinals, runs, at = [], [], 0
        for shard, start, stop in first.runs:
            if shard == number:
                runs.append((start, stop))
                ordinals.append(at)
            at += stop - start

        def side(start: int, stop: int, _base: Tensor) -> Tensor:
            run = next(i for i, (low, high) in enumerate(runs) if low <= start < high)
            low = ordinals[run] + start - runs[run][0]
            high = low + stop - start
            parts = torch.cat([block(at) for at in range(low // BLOCK, -(-high // BLOCK))])
            return parts[low % BLOCK : low % BLOCK + stop - start]

        return side

    return _with_side(first, [side_of(number) for number in range(len(first.shards))])


def _rows(store: PairedActivations, starts: np.ndarray, low: int, high: int) -> Tensor:
    """Rows ``low`` to ``high`` of a store in its own order."""
    parts = []
    run = int(np.searchsorted(starts, low, side="right")) - 1
    while low < high:
        shard, start, stop = store.runs[run]
        inside = low - int(starts[run])
        take = min(high - low, stop - start - inside)
        parts.append(store.shards[shard].acts(start + inside, start + inside + take))
        low, run = low + take, run + 1
    return torch.cat(parts)
