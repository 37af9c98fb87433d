"""One full training step (forward, losses, backward, clip, Adam): this library against dense steps and other libraries.

    python benchmarks/step.py --d-in 576 --d-sae 8192 --k 32 --batch 1024 [--dead 0.1] [--threads 1] [--rounds 7]
    [--contenders ours,dense-bf16,sae-lens] [--memory ours] [--without-bf16] [--growth] [--device cuda] [--json]

Everyone starts from the same dictionary, trained for ``--warmup`` steps on the same planted activations, and gets the same batches;
the rounds are interleaved in one process, each turn is two steps of which the second is timed, and the median counts.  ``cpu``: the
time in which the process had a core, the steadier measure where other programs run.  ``memory``: growth of the resident set over
the steps, in a process of its own, in multiples of the parameters in float32.  ``l0``: mean number of latents that a step decodes
from.  ``loss``: the last loss over the first one on the same batch, by each contender's own measure.  Other libraries: peers.py.

``--device cuda``: weights and batches are there, for ours... and dense...; a step is over when the GPU is done, and ``cpu`` is what
it cost the processor.  Memory is not measured there.

``--growth`` instead doubles d_sae, k and batch in turn, twice, and prints the exponents of the time."""

import argparse
import json
from typing import Any

import torch
from compare import CONTENDERS, Size, compare, growth
from machine import machine, without_bf16
from memory import memory_in_child


def headline(result: dict[str, Any]) -> str:
    """The machine."""
    return ", ".join(f"{name} {value}" for name, value in result["machine"].items() if name != "limited to")


def table(result: dict[str, Any]) -> str:
    """The rows, aligned."""
    limit = result.get("machine", {}).get("limited to")
    size = {**result["size"], **({"limited to": limit} if limit else {})}
    lines = [", ".join(f"{name} {value}" for name, value in size.items())]
    if "exponents" in result:
        for key, exponents in result["exponents"].items():
            grows = ", ".join(f"{name}^{slope:.2f}" for name, slope in exponents.items())
            lines.append(f"{CONTENDERS[key].title:42} grows as {grows}")
        return "\n".join(lines)
    columns = (
        ("ms", 8),
        ("ratio", 7),
        ("least ms", 9),
        ("cpu ms", 8),
        ("ratio", 7),
        ("memory", 7),
        ("l0", 7),
        ("loss", 6),
    )
    lines.append(f"{'':42} " + " ".join(f"{name:>{width}}" for name, width in columns))
    for row in result["rows"]:
        times = f"{row['ms']:8.1f} {row['ratio']:6.2f}x {row['fastest_ms']:9.1f} {row['cpu_ms']:8.1f} {row['cpu_ratio']:6.2f}x"
        memory = f"{row['memory']:6.2f}x" if "memory" in row else f"{'':7}"
        loss = f"{row['loss']:6.3f}" if row["loss"] is not None else ""
        lines.append(f"{row['title']:42} {times} {memory} {row['l0']:7.2f} {loss}".rstrip())
    if result["on_core"] < 0.95:
        lines.append(f"disturbed: the process had its cores for {result['on_core']:.0%} of the time")
    lines += [f"skipped: {CONTENDERS[key].title} ({why})" for key, why in result["skipped"].items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, value in {"d-in": 576, "d-sae": 8192, "k": 32, "batch": 1024}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--dead", type=float, default=0.0, help="share of latents that are dead and stay so")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--untimed", type=int, default=2, help="rounds before those of which time is taken")
    parser.add_argument("--warmup", type=int, default=60, help="steps of training that make the start")
    parser.add_argument("--contenders", default=",".join(CONTENDERS), help="ratios refer to the first")
    parser.add_argument("--memory", help="whose memory is measured; '' nobody's (everybody's)")
    parser.add_argument("--without-bf16", action="store_true", help="as on a processor without AMX")
    parser.add_argument("--device", default="cpu", help="where weights and batches are")
    parser.add_argument("--growth", action="store_true")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    keys = options.contenders.split(",")
    if unknown := [key for key in keys if key not in CONTENDERS]:
        parser.error(f"no contender named {unknown[0]!r}; known: {', '.join(CONTENDERS)}")
    torch.set_num_threads(options.threads)
    if options.without_bf16:
        without_bf16()
    size = Size(options.d_in, options.d_sae, options.k, options.batch, options.dead)
    measure = growth if options.growth else compare
    how = {name: getattr(options, name) for name in ("warmup", "rounds", "untimed", "device")}
    result = measure(size, keys, **how)
    result = {"machine": machine(), **result}
    for row in result.get("rows", []) if options.device == "cpu" else []:
        if options.memory is None or row["key"] in options.memory.split(","):
            row["memory"] = memory_in_child(size, row["key"])
    if options.json:
        print(json.dumps(result))
    else:
        print(headline(result), table(result), sep="\n")


if __name__ == "__main__":
    main()
