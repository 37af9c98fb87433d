"""A small crosscoder with all that a run leaves beside it, to publish in tests."""

import json

import numpy as np
import pandas as pd
import torch

from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.dictionary.normalizer import Normalizer
from tl_crosscoder.dictionary.sparsity import BatchTopK
from tl_crosscoder.files import sha256
from tl_crosscoder.hub.save import save

PAIR = {
    "base": {"name": "google/gemma-2-2b", "revision": "c" * 40, "class": "Gemma2ForCausalLM"},
    "tuned": {"name": "google/gemma-2-2b-it", "revision": None, "class": "Gemma2ForCausalLM"},
    "hook": "blocks.13.hook_resid_post",
}
EXTRA = {"pair": PAIR, "config": {"steps": 100, "seed": 3}}
FIGURES = {
    "tokens": 4096,
    "l0": 2.125,
    "fve_base": 0.75,
    "fve_tuned": 0.5,
    "fve_difference": 0.25,
    "dead_fraction": 0.125,
}
METRICS = {
    "title": "A tiny pair",
    "verdict": ["Undoing 1 of 16 latents takes the behaviour away.", "1 latent is tuned-only."],
    "store": {"tokens": 9000, "dropped": {"first": 12}},
    "substitution": {
        "held-out text": {
            "table": [
                {
                    "condition": "all",
                    "tokens": "all",
                    "kl": 0.25,
                    "ci_low": 0.125,
                    "ci_high": 0.5,
                    "recovered": 0.875,
                },
                {
                    "condition": "random 3",
                    "tokens": "all",
                    "kl": 2.0,
                    "ci_low": 1.5,
                    "ci_high": 2.5,
                    "recovered": 0.0,
                },
            ]
        }
    },
}


def small_crosscoder(seed=0, d_sae=16):
    generator = torch.Generator().manual_seed(seed)
    normalizer = Normalizer(torch.randn(2, 6, generator=generator), torch.tensor([0.5, 2.0]))
    made = Crosscoder(6, d_sae, BatchTopK(2), normalizer=normalizer)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    made.sparsity.threshold.fill_(0.5)
    return made.eval()


def small_table(n=16):
    classes = ["tuned_only", "base_only"] + ["shared"] * (n - 4) + ["dead", "dead"]
    table = pd.DataFrame(
        {"class": classes, "delta_norm": np.linspace(0, 1, n), "nu_error": 0.1, "nu_recon": 0.1}
    )
    table["n_fired"] = [200.0] * 3 + [5.0] * (n - 3)  # three latents pass the gates
    table.index.name = "latent"
    table.attrs["metrics"] = FIGURES
    return table


def run_folder(root, *, seed=0, extra=None, report=True):
    """A finished run, as the steps of a job leave it."""
    save(small_crosscoder(seed), root / "crosscoder", extra=EXTRA if extra is None else extra)
    small_table().to_parquet(root / "latents.parquet")
    metrics = METRICS | {"table_sha256": sha256(root / "latents.parquet")}
    (root / "metrics.json").write_text(json.dumps(metrics))
    if report:
        (root / "report" / "latents").mkdir(parents=True)
        (root / "report" / "index.html").write_text("<!doctype html><title>report</title>")
        (root / "report" / "latents" / "0.html").write_text("<!doctype html><title>latent 0</title>")
    return root
