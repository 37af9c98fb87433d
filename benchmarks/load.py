"""How long a large crosscoder takes to load, and how much memory, beside reading its bytes.

    python benchmarks/load.py [--d-sae 73728] [--folder DIR]

Writes a crosscoder of Gemma-2-2B's shape (2 x 2304 x 73,728 twice, fp32: 2.7 GB), then, each in a process of its own and with the
file in the system's cache: reads the bytes of the file into fresh memory, loads it, loads it as bfloat16, and inspects it.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

#: Each prints seconds, and the peak of its memory in bytes with what Python and torch take before.
PROGRAMS = {
    "read its bytes": """
import numpy as np
size = os.path.getsize(path + "/model.safetensors")
start = time.perf_counter()
held = np.empty(size, dtype=np.uint8)
with open(path + "/model.safetensors", "rb", buffering=0) as file:
    view, done = memoryview(held), 0
    while done < size:
        done += file.readinto(view[done : done + (1 << 24)])
""",
    "load": """
import tl_crosscoder as tlc, torch
tlc.load, torch.zeros(1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.perf_counter()
held = tlc.load(path)
""",
    "load as bfloat16": """
import tl_crosscoder as tlc, torch
tlc.load, torch.zeros(1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.perf_counter()
held = tlc.load(path, dtype=torch.bfloat16)
""",
    "inspect (the whole process)": """
start = born
from tl_crosscoder.hub.inspect import inspect
str(inspect(path))
assert "torch" not in sys.modules
""",
}
HEAD = "import os, resource, sys, time\nborn = time.perf_counter()\npath, before = sys.argv[1], 0\n"
TAIL = "\nprint(time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, before * 1024)"


def write(folder: Path, d_sae: int) -> int:
    """Random weights, a piece at a time; the size of the file."""
    import numpy as np

    from tl_crosscoder.hub.save import AXES

    rows = {
        "W_enc": (d_sae, 2, 2304),
        "b_enc": (d_sae,),
        "W_dec": (d_sae, 2, 2304),
        "b_dec": (2, 2304),
        "mean": (2, 2304),
    }
    shapes = {**rows, "scale": (2,), "sparsity.threshold": ()}
    header, end = {}, 0
    for name, shape in shapes.items():
        n = 4 * int(np.prod(shape, dtype=np.int64))
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [end, end + n]}
        end += n
    text = json.dumps(header).encode()
    generator = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        left = end // 4 - 3
        while left:
            n = min(left, 1 << 22)
            generator.standard_normal(n, dtype=np.float32).tofile(file)
            left -= n
        np.ones(3, dtype=np.float32).tofile(file)
    from dataclasses import asdict

    from tl_crosscoder.dictionary.init import Init
    from tl_crosscoder.dictionary.partition import Partition

    sparsity = {
        "name": "batch_topk",
        "k": 100,
        "k_max": None,
        "k_anneal_steps": 0,
        "threshold_start": 0.5,
        "threshold_decay": 0.99,
    }
    crosscoder = {
        "d_in": 2304,
        "d_sae": d_sae,
        "n_models": 2,
        "sparsity": sparsity,
        "code_norm": "sum",
        "encoder": "sum",
    }
    crosscoder |= {"partition": asdict(Partition()), "init": asdict(Init()), "folded": False}
    config = {
        "format_version": 3,
        "library_version": "0",
        "axes": AXES,
        "models": ["base", "tuned"],
        "crosscoder": crosscoder,
        "extra": {},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return end


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--d-sae", type=int, default=73_728)
    parser.add_argument("--folder", type=Path, help="where to write it; by default a temporary folder")
    parser.add_argument("--times", type=int, default=2)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder = arguments.folder or Path(made)
        size = write(folder, arguments.d_sae)
        print(f"{size / 1e9:.2f} GB, {arguments.times} times each, the fastest")
        for name, program in PROGRAMS.items():
            runs = [
                subprocess.run(
                    [sys.executable, "-c", HEAD + program + TAIL, str(folder)],
                    check=True,
                    capture_output=True,
                    text=True,
                )
                for _ in range(arguments.times)
            ]
            seconds, peak, before = min(tuple(map(float, run.stdout.split())) for run in runs)
            print(
                f"{name:28} {seconds:6.2f} s   peak {peak / size:5.2f} x the file, {(peak - before) / size:5.2f} without torch"
            )


if __name__ == "__main__":
    main()
