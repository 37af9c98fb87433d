"""How long the search for mirror pairs takes, and the memory beyond the decoder's own.

    python benchmarks/mirror_pairs.py [--d-sae 73728] [--d-in 2304] [--tuned 3176] [--base 1500] [--threads 2]

The defaults are a published size, and classes as large as under L1; the worst case is --tuned 36864 --base 36864.
"""

import argparse
import resource
import time

import torch

from tl_crosscoder.analysis.mirrors import mirrored
from tl_crosscoder.types import BASE, TUNED


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in {
        "d-sae": 73_728,
        "d-in": 2304,
        "tuned": 3176,
        "base": 1500,
        "planted": 109,
        "threads": 2,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    generator = torch.Generator().manual_seed(0)
    rows = torch.empty(options.d_sae, 2, options.d_in)
    for part in rows.split(4096):  # normal_ on the whole would need as much again
        part.normal_(generator=generator)
    tuned, base = torch.arange(options.tuned), torch.arange(options.tuned, options.tuned + options.base)
    rows[base[: options.planted], BASE] = rows[tuned[: options.planted], TUNED]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    wall, processor = time.perf_counter(), time.process_time()
    found = mirrored(rows, tuned, base)
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10
    print(
        f"{options.tuned:,} x {options.base:,} latents of {options.d_sae:,}, d_in {options.d_in:,}: {found.n} pairs"
    )
    print(f"{wall:.1f} s, {processor:.1f} s of processor time, {more:.0f} MB more than the decoder")


if __name__ == "__main__":
    main()
