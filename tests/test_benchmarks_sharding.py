"""The paper budget is the arithmetic it claims to be, and the timing of processes runs."""

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
scale = import_module("scale")
sys.path.remove(str(BENCHMARKS))


def test_a_budget_worked_out_by_hand():
    """d_in 10, two models: rows of 20 numbers, 80 bytes; 6 latents on 2 ranks: 3 rows, 240 bytes of a matrix here."""
    step = scale.Step(d_in=10, d_sae=6, k=2, batch=5, ranks=2)
    rates = scale.Rates(flops=1, bandwidth=1, link=1, latency=3, gradients_in_cache=False)
    # weights 2 · 240, moments 4 · 240, gradient 240; 6 · 5 tokens · 80 bytes
    assert [size for _, size in step.memory(rates)] == [480, 960, 240, 2400]
    # 2 · 5 · 20 · 3 flops; 8 bytes a number of 60; the same; 7.2 · 5 pairs · 80 bytes; 40 bytes a weight of 120
    # 2 · ½ of 5 · 80 bytes; 8 exchanges of 3 s
    times = [time for _, time in step.parts(rates)]
    assert times == pytest.approx([600, 480, 480, 2880, 4800, 400, 24])


@pytest.mark.slow
def test_two_processes_are_timed_against_one():
    sizes = ["--d-in", "8", "--d-sae", "64", "--k", "4", "--batch", "32", "--rounds", "2"]
    command = [sys.executable, str(BENCHMARKS / "sharding.py"), *sizes]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "ratio" in done.stdout
    assert done.stderr == ""
