"""What a training step needs on each of many processors, on paper: memory, traffic, and the least time, part by part.

    python benchmarks/scale.py --d-in 8192 --d-sae 1048576 --k 100 --batch 4096 --ranks 16
    python benchmarks/scale.py --d-in 2304 --d-sae 16384 --k 100 --batch 1024 --measure

Each part takes its multiplications at ``--flops`` or its bytes at ``--bandwidth``, and exchanges at ``--link``; nothing overlaps.
The defaults are what the vendor of an NVIDIA H100 SXM states: 989 TFLOP/s of dense bfloat16, 3.35 TB/s of memory, 450 GB/s each way
of NVLink; and, assumed, 20 microseconds for an exchange.  ``--measure``: one core of this machine instead, measured; gradients are
then made in its cache, a block of rows at a time.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

MODELS = 2
#: How often a row of N numbers is gathered for each active pair: to verify it (1.2 candidates a pair), to decode, for the gradient
#: of its value, and for two gradient rows made twice, for the norm and for the step.
GATHERS = 1.2 + 1 + 1 + 2 * 2
#: Exchanges of a few numbers in a step: candidates, three histograms, ties, dead latents, norm, signal.
SMALL_EXCHANGES = 8


@dataclass(frozen=True)
class Rates:
    """``flops`` of a bfloat16 product; ``bandwidth`` of memory and ``link`` to others, bytes a second; ``latency``, seconds."""

    flops: float
    bandwidth: float
    link: float
    latency: float
    gradients_in_cache: bool


@dataclass(frozen=True)
class Step:
    """Numbers are float32, 4 bytes; N = models · d_in numbers make a row, M = d_sae / ranks rows a shard of one matrix."""

    d_in: int
    d_sae: int
    k: float
    batch: int
    ranks: int = 1

    @property
    def row(self) -> int:
        """Bytes."""
        return 4 * MODELS * self.d_in

    @property
    def matrix(self) -> float:
        """Bytes of this rank's rows of the encoder, or of the decoder."""
        return self.row * self.d_sae / self.ranks

    def memory(self, rates: Rates) -> Iterator[tuple[str, float]]:
        """Bytes that stay, or are there at once."""
        yield "weights, W_enc and W_dec", 2 * self.matrix
        yield "two moments of each", 4 * self.matrix
        yield "gradient of one matrix", 0 if rates.gradients_in_cache else self.matrix
        yield "activations and reconstructions, 6 of [batch, model, d_in]", 6 * self.batch * self.row

    def parts(self, rates: Rates) -> Iterator[tuple[str, float]]:
        """Seconds of each part of a step."""
        product = 2 * self.batch * MODELS * self.d_in * self.d_sae / self.ranks
        pairs = self.k * self.batch / self.ranks
        adam = (
            2 * (6 if rates.gradients_in_cache else 10) * self.matrix
        )  # weight and moments read and written; gradient twice
        yield "screening product", product / rates.flops
        yield "its rows in bfloat16: read, written, read", 2 * self.matrix / rates.bandwidth
        yield "norms of encoder and decoder rows", 2 * self.matrix / rates.bandwidth
        yield "rows gathered for active pairs", GATHERS * pairs * self.row / rates.bandwidth
        yield "Adam", adam / rates.bandwidth
        yield "exchange of the reconstruction", self.exchanged(self.batch * self.row) / rates.link
        yield "small exchanges", (self.ranks > 1) * SMALL_EXCHANGES * rates.latency

    def exchanged(self, size: float) -> float:
        """Bytes that each rank sends for a sum of ``size`` bytes along a ring."""
        return 2 * (self.ranks - 1) / self.ranks * size


def measured(link: float) -> Rates:
    """One core of this machine."""
    torch.set_num_threads(1)
    x, w = (torch.randn(n, 1184).bfloat16() for n in (4096, 1024))
    a, b = (torch.zeros(40_000_000) for _ in range(2))
    flops = 2 * 4096 * 1024 * 1184 / seconds(lambda: x @ w.T)
    return Rates(flops, 3 * a.nbytes / seconds(lambda: a.add_(b)), link, 2e-4, gradients_in_cache=True)


def seconds(work: Callable[[], object], times: int = 30) -> float:
    """The fastest of some runs."""
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return min(taken)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in [("d-in", 8192), ("d-sae", 1 << 20), ("k", 100), ("batch", 4096), ("ranks", 16)]:
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--tokens", type=float, default=1e9, help="of the whole training")
    for name, default in [("flops", 989e12), ("bandwidth", 3.35e12), ("link", 450e9), ("latency", 20e-6)]:
        parser.add_argument(f"--{name}", type=float, default=default)
    parser.add_argument("--measure", action="store_true")
    asked = parser.parse_args()
    rates = Rates(asked.flops, asked.bandwidth, asked.link, asked.latency, gradients_in_cache=False)
    rates = measured(asked.link) if asked.measure else rates
    step = Step(asked.d_in, asked.d_sae, asked.k, asked.batch, 1 if asked.measure else asked.ranks)
    print(f"{rates.flops / 1e12:.3g} TFLOP/s, {rates.bandwidth / 1e9:.4g} GB/s of memory")
    print(f"{'each rank holds':60} {'GB':>8}")
    memory = dict(step.memory(rates))
    for name, size in [*memory.items(), ("together", sum(memory.values()))]:
        print(f"  {name:58} {size / 1e9:8.2f}")
    print(f"{'a step takes at least':60} {'ms':>8}")
    parts = dict(step.parts(rates))
    for name, time_of in [*parts.items(), ("together", sum(parts.values()))]:
        print(f"  {name:58} {1000 * time_of:8.2f}")
    hours = sum(parts.values()) * asked.tokens / asked.batch / 3600
    print(f"{asked.tokens:.0e} tokens take at least {hours:.1f} hours")
    dense = step.exchanged(2 * step.row * step.d_sae) / rates.link
    print(f"exchanging the gradients of all latents instead, as data ranks do: {1000 * dense:.0f} ms a step")


if __name__ == "__main__":
    main()
