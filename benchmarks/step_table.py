"""The rows that say how fast a training step is, each against its goals, in about half an hour on one thread.

    python benchmarks/step_table.py [--threads 1] [--json FILE]

One run of step.py a row; with checkouts of the other libraries on PYTHONPATH (see peers.py) the table has them too.  A goal is what
must be reached, then what is aimed at: how many times a contender's time is ours, our memory over the parameters, our exponents.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from step import headline, table


class Row(NamedTuple):
    """A size, who takes part, how step.py measures, and the goals: by contender, or ``memory``, or the size that grows."""

    d_in: int
    d_sae: int
    k: int
    batch: int
    contenders: str
    goals: dict[str, tuple[float, float | None]]
    options: str = "--rounds 2 --untimed 1 --warmup 40 --memory ours"


ROWS = [
    Row(
        576, 8192, 32, 1024,
        "ours,dense,dense-bf16,dense-bf16-guess,dictionary-learning,sae-lens,sae-lens-bf16,sparsify,crosscode,llamascopium",
        {
            "dictionary-learning": (8, 12), "sae-lens": (8.5, 12), "sae-lens-bf16": (4.5, 6), "dense-bf16": (2.5, 4),
            "memory": (4.6, 3.2),
        },
        "--rounds 5 --memory ours,dense-bf16,dictionary-learning",
    ),
    Row(
        576, 8192, 32, 1024, "ours,dense,dictionary-learning", {"dictionary-learning": (4, 5)},
        "--rounds 5 --without-bf16 --memory=",
    ),
    Row(
        576, 32768, 64, 2048, "ours,dense-bf16-guess,dictionary-learning,sae-lens,sae-lens-bf16,sparsify",
        {"dictionary-learning": (11, 16), "sae-lens": (13, 18), "sae-lens-bf16": (6, 9), "memory": (4.6, 3.2)},
    ),
    Row(576, 73728, 100, 1024, "ours,dense-bf16-guess,dictionary-learning", {"dictionary-learning": (10, 15)}),
    Row(2304, 16384, 100, 1024, "ours,dense-bf16-guess,dictionary-learning", {"dictionary-learning": (6, 9)}),
    Row(2304, 8192, 100, 1024, "ours,dense-bf16-guess,dictionary-learning", {"dictionary-learning": (4.5, 7)}),
    Row(
        576, 16384, 64, 2048, "ours,dense-bf16-guess,dictionary-learning", {"dictionary-learning": (7.5, 12)},
        "--dead 0.1 --rounds 3 --untimed 1 --warmup 40 --memory ours",
    ),
    Row(2304, 73728, 100, 1024, "ours", {}, "--rounds 3 --untimed 1 --warmup 2 --memory="),
    Row(
        576, 8192, 32, 1024, "ours", {"d_sae": (0.8, None), "k": (0.5, None), "batch": (0.8, None)},
        "--rounds 7 --warmup 40 --growth",
    ),
]  # fmt: skip


def run(row: Row, threads: int) -> dict[str, Any]:
    size = [
        f"--{name.replace('_', '-')}={getattr(row, name)}"
        for name in ("d_in", "d_sae", "k", "batch", "contenders")
    ]
    step = [sys.executable, str(Path(__file__).with_name("step.py")), *size, *row.options.split()]
    done = subprocess.run(
        [*step, f"--threads={threads}", "--json"], stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def verdicts(row: Row, result: dict[str, Any]) -> list[str]:
    """How the row stands to its goals; goals of contenders that were skipped are left out."""
    if row.options.endswith("--growth"):
        values, at_most = result["exponents"]["ours"], True
    else:
        values, at_most = {each["key"]: each["ratio"] for each in result["rows"]}, False
    lines = []
    for name, (must, aim) in row.goals.items():
        smaller = at_most or name == "memory"
        value = result["rows"][0]["memory"] if name == "memory" else values.get(name)
        if value is not None:
            reached = [
                goal
                for goal in (must, aim)
                if goal is not None and (value <= goal if smaller else value >= goal)
            ]
            state = ["MISSED", "reached", "reached, and what is aimed at"][len(reached)]
            lines.append(f"goal {name}: {value:.2f}; {must:g}, aiming at {aim or must:g}: {state}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write every row's figures there too")
    options = parser.parse_args()
    results, began = [], time.perf_counter()
    for row in ROWS:
        results.append(result := run(row, options.threads))
        if len(results) == 1:
            print(headline(result))
        print("", table(result), *verdicts(row, result), sep="\n", flush=True)
    print(f"\n{time.perf_counter() - began:.0f} s")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
