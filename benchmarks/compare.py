"""Interleaved rounds: every contender takes one step in turn, in one process, from the same weights and on the same batches."""

import math
import statistics
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from contenders import Contender, Start, Unsupported, start_of
from dense import Dense, DenseBf16, DenseBf16Guess
from machine import free_bytes
from ours import Ours, OursHalved, OursTriton
from peers import PEERS
from planted_batches import planted_batches
from torch import Tensor

from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.dictionary.losses import MSE
from tl_crosscoder.dictionary.sparsity import BatchTopK
from tl_crosscoder.training.config import TrainConfig
from tl_crosscoder.training.train import train

EVERYONE: list[type[Contender]] = [Ours, OursHalved, OursTriton, Dense, DenseBf16, DenseBf16Guess, *PEERS]
CONTENDERS = {contender.key: contender for contender in EVERYONE}
LR = 1e-4
N_BATCHES = 8
#: How many of them are gone through again and again while time is taken.
IN_TURN = 4


@dataclass(frozen=True)
class Size:
    """What is trained: ``k`` of ``d_sae`` latents on each of ``batch`` tokens; a fraction ``dead`` of them cannot fire."""

    d_in: int
    d_sae: int
    k: int
    batch: int
    dead: float = 0.0

    def batches(self) -> list[Tensor]:
        return planted_batches(self.d_in, self.d_sae // 2, self.batch, N_BATCHES)

    def start(self, batches: list[Tensor], warmup: int) -> Start:
        """A dictionary after ``warmup`` steps, when thresholds and densities have become what they are in training."""
        crosscoder = Crosscoder(self.d_in, self.d_sae, BatchTopK(self.k))
        if warmup:
            train(crosscoder, batches, [MSE()], TrainConfig(warmup, warmup_steps=warmup // 5, progress=False))
        return start_of(crosscoder, self.k, self.dead)


def compare(
    size: Size, keys: list[str], *, warmup: int, rounds: int, untimed: int = 2, device: str = "cpu"
) -> dict[str, Any]:
    """The contenders' rows, and why others were skipped.  ``on_core``: the share of the time that the process had its cores.

    Time is taken in ``rounds`` rounds after ``untimed`` ones.
    """
    batches = size.batches()
    start = size.start(batches, warmup).to(device)
    batches = [batch.to(device) for batch in batches]
    contenders, skipped = enter(start, keys, size.batch)
    del start
    began, began_on_core = time.perf_counter(), time.process_time()
    rows = time_steps(contenders, batches, rounds, untimed)
    on_core = (time.process_time() - began_on_core) / (time.perf_counter() - began) / torch.get_num_threads()
    for row in rows:
        row["ratio"], row["cpu_ratio"] = (row[name] / rows[0][name] for name in ("ms", "cpu_ms"))
    return {"size": asdict(size), "rows": rows, "skipped": skipped, "on_core": on_core}


def enter(start: Start, keys: list[str], batch: int) -> tuple[list[Contender], dict[str, str]]:
    """The contenders that can be imported and fit into memory together, and why the others are left out.

    Each will hold its weights, gradients and Adam's two moments; whoever steps, about a dozen times all activations.
    """
    entered: list[Contender] = []
    skipped: dict[str, str] = {}
    passing = 12 * 4 * batch * len(start.W_dec)
    for key in keys:
        needed, free = (4 + 3 * len(entered)) * start.parameter_bytes + passing, free_bytes()
        if needed > 0.9 * free:
            skipped[key] = f"would need {needed / 1e9:.0f} GB beside the others, {free / 1e9:.0f} GB are free"
            continue
        try:
            entered.append(CONTENDERS[key](start, LR))
        except (ImportError, Unsupported) as error:
            skipped[key] = f"{type(error).__name__}: {error}"
    return entered, skipped


def time_steps(
    contenders: list[Contender], batches: list[Tensor], rounds: int, untimed: int
) -> list[dict[str, Any]]:
    """One row a contender; after each round another one goes first.

    A turn is two steps, of which the second counts: in training a step follows one of its own, not another library's.
    """
    seconds: list[list[float]] = [[] for _ in contenders]
    on_core: list[list[float]] = [[] for _ in contenders]
    losses: list[list[float]] = [[] for _ in contenders]
    for n in range(untimed + rounds):
        for i in [(n + i) % len(contenders) for i in range(len(contenders))]:
            contenders[i].keep_dead()
            contenders[i].step(batches[n % IN_TURN - 1])
            contenders[i].keep_dead()
            finish(batches[0])
            began, began_on_core = time.perf_counter(), time.process_time()
            loss = contenders[i].step(batches[n % IN_TURN])
            finish(loss)
            seconds[i].append(time.perf_counter() - began)
            on_core[i].append(time.process_time() - began_on_core)
            losses[i].append(loss.item())
    rows = []
    for contender, all_times, all_on_core, trace in zip(contenders, seconds, on_core, losses, strict=True):
        times, cpu_times = ([1000 * each for each in some[untimed:]] for some in (all_times, all_on_core))
        row = {"key": contender.key, "title": contender.title, "ms": statistics.median(times)}
        row |= {"fastest_ms": min(times), "slowest_ms": max(times), "cpu_ms": statistics.median(cpu_times)}
        row |= {"l0": contender.l0(batches[0])}
        row |= {"loss": trace[-1] / trace[(len(trace) - 1) % IN_TURN] if len(trace) > IN_TURN else None}
        rows.append(row)
        contender.close()
    return rows


def finish(near: Tensor) -> None:
    """Wait until a GPU has done what it was told."""
    if near.is_cuda:
        torch.cuda.synchronize(near.device)


def growth(size: Size, keys: list[str], *, doublings: int = 2, **options: Any) -> dict[str, Any]:
    """For each contender the exponents with which its time grows in d_sae, k and batch, by least squares on log-log.

    ``options``: those of ``compare``.
    """
    times: dict[Size, dict[str, float]] = {}

    def measured(at: Size) -> dict[str, float]:
        if at not in times:
            times[at] = {row["key"]: row["ms"] for row in compare(at, keys, **options)["rows"]}
        return times[at]

    exponents: dict[str, dict[str, float]] = {}
    for name in ("d_sae", "k", "batch"):
        sizes = [replace(size, **{name: getattr(size, name) << n}) for n in range(doublings + 1)]
        x = [math.log(getattr(at, name)) for at in sizes]
        for key in set.intersection(*(set(measured(at)) for at in sizes)):
            y = [math.log(measured(at)[key]) for at in sizes]
            exponents.setdefault(key, {})[name] = statistics.linear_regression(x, y).slope
    measurements = [{**asdict(at), "ms": ms} for at, ms in times.items()]
    return {"size": asdict(size), "exponents": exponents, "measurements": measurements}
