"""The peak memory of a training step, in a process of its own: contender, d_in, d_sae, k, batch, dead, threads.

MALLOC_MMAP_THRESHOLD_=1048576 python benchmarks/memory.py ours 576 8192 32 1024 0.0 1
"""

import os
import subprocess
import sys
from dataclasses import astuple

import torch
from compare import CONTENDERS, LR, Size
from contenders import Contender
from machine import forget_most_resident, most_resident_bytes, resident_bytes
from torch import Tensor

STEPS = 4


def memory_in_child(size: Size, key: str) -> float:
    """``peak_memory`` in a fresh process, where what is freed goes back at once (glibc would keep some, how much is chance)."""
    command = [sys.executable, __file__, key, *map(str, astuple(size)), str(torch.get_num_threads())]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def peak_memory(size: Size, key: str) -> float:
    """Growth of the resident set while a contender exists and steps, in multiples of its parameters in float32."""
    tiny, batches = Size(8, 16, 2, 4), size.batches()[:2]
    # the contender's imports, and torch's own buffers, do not count
    take_steps(CONTENDERS[key](tiny.start([], 0), LR), tiny.batches()[:2])
    before = resident_bytes()
    start = size.start([], 0)
    parameters, contender = start.parameter_bytes, CONTENDERS[key](start, LR)
    del start
    forget_most_resident()
    take_steps(contender, batches)
    return (most_resident_bytes() - before) / parameters


def take_steps(contender: Contender, batches: list[Tensor]) -> None:
    for n in range(STEPS):
        contender.keep_dead()
        contender.step(batches[n % len(batches)])


if __name__ == "__main__":
    key, *sizes, dead, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    print(peak_memory(Size(*map(int, sizes), dead=float(dead)), key))
