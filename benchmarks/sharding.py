"""Training steps by several processes of one thread against one process of one thread, on this machine, and what they exchange.

    python benchmarks/sharding.py --d-in 576 --d-sae 8192 --k 32 --batch 1024 [--processes 2] [--data 1] [--rounds 9] [--json]

The one and the several train the same dictionary on the same planted activations, by :func:`train`; the rounds alternate, and the
median counts.  One team computes while the other sleeps.  ``exchange`` is the time of one sum over the processes, by gloo through
this machine's loopback: of a reconstruction [batch, model, d_in], and of one number.

It wants as many free cores as processes: beside other work every exchange waits for the scheduler, a few milliseconds each.
``chrt -r 1 python benchmarks/sharding.py`` (as root) puts the other work off for so long.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

import torch
from machine import machine
from planted_batches import planted_batches
from torch import Tensor
from torch.distributed import TCPStore

from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.dictionary.losses import MSE, AuxK
from tl_crosscoder.dictionary.sparsity import BatchTopK
from tl_crosscoder.ranks import Axis
from tl_crosscoder.training.config import TrainConfig
from tl_crosscoder.training.sharding import divide, joined
from tl_crosscoder.training.train import train

N_BATCHES, UNTIMED = 4, 10


class OnCommand:
    """Batches that are given when the parent says so, and tell it that the step before is done."""

    def __init__(self, batches: list[Tensor], pipe: Connection):
        self.batches, self.pipe = batches, pipe

    def __iter__(self) -> Iterator[Tensor]:
        for x in self.batches:
            self.pipe.send("done")
            self.pipe.recv()
            yield x


class Team:
    """Processes that train together."""

    def __init__(self, size: int, asked: argparse.Namespace):
        context = multiprocessing.get_context("spawn")
        self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.pipes = []
        for rank in range(size):
            here, there = context.Pipe()
            environment = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": size,
                "MASTER_PORT": self.store.port,
            }
            context.Process(target=member, args=(environment, asked, there), daemon=True).start()
            self.pipes.append(here)
        self.exchange: dict[str, float] = self.hear()[0]
        self.hear()

    def hear(self) -> list[Any]:
        return [pipe.recv() for pipe in self.pipes]

    def step(self) -> float:
        """Milliseconds from the command to the last one's answer."""
        began = time.perf_counter()
        for pipe in self.pipes:
            pipe.send("step")
        self.hear()
        return 1000 * (time.perf_counter() - began)


def member(environment: dict[str, int], asked: argparse.Namespace, pipe: Connection) -> None:
    """One process of a team."""
    os.environ |= {name: str(value) for name, value in environment.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    torch.set_num_threads(1)
    steps = UNTIMED + asked.rounds
    with joined(asked.data if environment["WORLD_SIZE"] > 1 else 1) as shard:
        x = torch.zeros(asked.batch, 2, asked.d_in)
        pipe.send(
            {"reconstruction": milliseconds(shard.every, x), "number": milliseconds(shard.every, x[0, 0, :1])}
        )
        crosscoder = Crosscoder(asked.d_in, asked.d_sae, BatchTopK(asked.k))
        divide(crosscoder, shard)
        batches = OnCommand(planted_batches(asked.d_in, asked.d_sae // 2, asked.batch, N_BATCHES), pipe)
        train(crosscoder, batches, [MSE(), AuxK()], TrainConfig(steps, log_every=steps, progress=False))
        pipe.send("done")


def milliseconds(axis: Axis, values: Tensor, times: int = 20) -> float:
    """The median time of a sum over the processes."""
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        axis.add_(values)
        taken.append(time.perf_counter() - began)
    return 1000 * statistics.median(taken)


def compare(asked: argparse.Namespace) -> dict[str, Any]:
    """The median step of one process and of several, and their ratio."""
    teams = {1: Team(1, asked), asked.processes: Team(asked.processes, asked)}
    taken: dict[int, list[float]] = {size: [] for size in teams}
    for _ in range(UNTIMED + asked.rounds):
        for size, team in teams.items():
            taken[size].append(team.step())
    rows = {size: statistics.median(times[UNTIMED:]) for size, times in taken.items()}
    return {
        "size": {name: getattr(asked, name) for name in ("d_in", "d_sae", "k", "batch", "data")},
        "ms": rows,
        "ratio": rows[1] / rows[asked.processes],
        "exchange_ms": teams[asked.processes].exchange,
        "machine": machine(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in [("d-in", 576), ("d-sae", 8192), ("k", 32), ("batch", 1024), ("processes", 2)]:
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--data", type=int, default=1, help="parts that each batch is read in")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    result = compare(asked)
    if asked.json:
        print(json.dumps(result))
        return
    print(", ".join(f"{name} {value}" for name, value in result["size"].items()))
    for size, ms in result["ms"].items():
        print(f"{size} process{'es' if size > 1 else ''}: {ms:.1f} ms a step")
    print(f"ratio {result['ratio']:.2f}x")
    for what, ms in result["exchange_ms"].items():
        print(f"summing a {what}: {ms:.2f} ms")


if __name__ == "__main__":
    main()
