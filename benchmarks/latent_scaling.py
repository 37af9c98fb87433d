"""Latent Scaling of all latents and targets: one streaming pass over sparse codes against the dense closed form.

    python benchmarks/latent_scaling.py [--d-in 576] [--d-sae 8192] [--k 32] [--batch 2048] [--rounds 5]
    [--threads 1] [--json]

Both get the same codes, error and reconstruction of a batch; the dense form computes ``acts.T @ (target @
W_dec.T)``-style sums by matrix products over all [batch, d_sae] entries.  Interleaved rounds in one process,
medians.  Also prints the peak memory of a whole ``latent_table`` over few and over many tokens, and how long the whole study
(three sets of probes, encoding included) takes for ``d_sae`` latents over 100k tokens as wide as the tiny pair's."""

import argparse
import json
import statistics
import subprocess
import sys
import time

import torch

from tl_crosscoder.analysis.base import EncodedBatch
from tl_crosscoder.analysis.latent_scaling import LatentScaling
from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.dictionary.sparsity import BatchTopK, TopK
from tl_crosscoder.studies.scaling import latent_scaling_study

TINY_D_IN, TINY_K, TOKENS = 128, 16, 102_400


def dense_update(totals: dict, acts, error, estimate, direction) -> None:
    """What the normal equations need, over every latent and token."""
    totals["square"] = totals.get("square", 0) + acts.square().sum(0)
    totals["mass"] = totals.get("mass", 0) + acts.sum(0)
    for name, target in (("error", error), ("estimate", estimate)):
        for m in (0, 1):
            projected = target[:, m] @ direction.T
            totals[name, m] = totals.get((name, m), 0) + (acts * projected).sum(0)


def timed(function) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def peak_memory(tokens: int) -> float:
    """Peak resident MB of a latent table over ``tokens`` tokens, in a process of its own."""
    code = (
        "import torch\n"
        "from tl_crosscoder.analysis.table import latent_table\n"
        "from tl_crosscoder.dictionary.crosscoder import Crosscoder\n"
        "from tl_crosscoder.dictionary.sparsity import TopK\n"
        "torch.set_num_threads(1)\n"
        "cc = Crosscoder(64, 2048, TopK(16))\n"
        "g = torch.Generator().manual_seed(0)\n"
        f"latent_table(cc, (torch.randn(2048, 2, 64, generator=g) for _ in range({tokens} // 2048)))\n"
        "status = open('/proc/self/status').read()\n"  # ru_maxrss would be inherited from this process
        "print(int(status.split('VmHWM:')[1].split()[0]) / 1024)\n"
    )
    return float(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    )


def whole_study(d_sae: int) -> tuple[float, float]:
    """Seconds by the clock and of the processor for the study of a random dictionary, sixteen latents a token."""
    crosscoder = Crosscoder(TINY_D_IN, d_sae, BatchTopK(TINY_K))
    g = torch.Generator().manual_seed(2)
    x = torch.randn(4096, 2, TINY_D_IN, generator=g)
    with torch.no_grad():
        crosscoder.train()
        scores = crosscoder.encode_sparse(x).scaled(crosscoder.selection_norms())
    crosscoder.sparsity.threshold.fill_(scores.min())  # as training would leave it: sixteen a token
    crosscoder.eval()
    batches = (torch.randn(2048, 2, TINY_D_IN, generator=g) for _ in range(TOKENS // 2048))
    clock, processor = time.perf_counter(), time.process_time()
    latent_scaling_study(crosscoder, batches, progress=False)
    return time.perf_counter() - clock, time.process_time() - processor


def main(d_in: int, d_sae: int, k: int, batch: int, rounds: int, threads: int) -> dict:
    torch.set_num_threads(threads)
    crosscoder = Crosscoder(d_in, d_sae, TopK(k)).eval()
    x = torch.randn(batch, 2, d_in, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        codes = crosscoder.encode_sparse(x)
        acts, estimate = codes.dense(), crosscoder.decode(codes)
        direction, nowhere = crosscoder.W_dec[:, 1].contiguous(), torch.full((batch,), -1)
        sparse, dense = [], []
        for _ in range(rounds + 1):
            ours, totals = LatentScaling(crosscoder), {}
            sparse.append(
                timed(lambda ours=ours: ours.update(EncodedBatch(codes, x, estimate, nowhere, nowhere)))
            )
            dense.append(timed(lambda t=totals: dense_update(t, acts, x - estimate, estimate, direction)))
        gap = (ours.with_error[:, 0] - totals["error", 0].double()).abs().max() / totals[
            "error", 0
        ].abs().max()
    sparse_ms, dense_ms = (1000 * statistics.median(times[1:]) for times in (sparse, dense))
    clock, processor = whole_study(d_sae)
    few, many = peak_memory(8_192), peak_memory(131_072)
    return {
        "sparse_ms": sparse_ms, "dense_ms": dense_ms, "ratio": dense_ms / sparse_ms, "largest_relative_gap": gap.item(),
        "table_peak_mb_8k_tokens": few, "table_peak_mb_131k_tokens": many,
        "study_100k_tokens_s": clock, "study_100k_tokens_processor_s": processor,
    }  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, value in {
        "d-in": 576,
        "d-sae": 8192,
        "k": 32,
        "batch": 2048,
        "rounds": 5,
        "threads": 1,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--json", action="store_true")
    arguments = vars(parser.parse_args())
    as_json = arguments.pop("json")
    result = main(**arguments)
    print(
        json.dumps(result)
        if as_json
        else "\n".join(f"{name:28} {value:10.4g}" for name, value in result.items())
    )
