"""inspect: every convention in words, without torch and without the weights."""

import json
import subprocess
import sys

import format_writers as writers
import pytest

from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.dictionary.sparsity import BatchTopK
from tl_crosscoder.hub.inspect import inspect
from tl_crosscoder.hub.save import save

WRITTEN = {
    "dictionary_learning": (
        writers.dictionary_learning,
        ["f · Σ_m ‖d_m‖", "2.5", "activation_mean", "k=3", "not subtracted"],
    ),
    "ckkissane": (
        writers.kissane,
        ["needs scale=", "lost", "blocks.13.hook_resid_post", "gemma-2-2b", "a pickle"],
    ),
    "OpenInterpretability": (
        writers.papergrade,
        ["subtracted before encoding", "0.4, 0.6", "one a latent", "blocks.13", "l0 4"],
    ),
    "Antebe DFC": (writers.antebe, ["tuned, base; swapped", "z-scored", "k=3", "last token"]),
    "crosscode": (writers.crosscode, ["jumprelu", "folded into the weights", "without decoder norms"]),
    "Llamascopium": (
        writers.llamascopium,
        ["apart for each head", "base.13, tuned.13", "√d_in / average norm"],
    ),
    "heterogeneous": (writers.heterogeneous, ["padded with zeros to 5", "k=5"]),
    "SAE-Lens layers": (
        writers.sae_lens_layers,
        ["3 layers of one model", "prepend_bos True", "subtracted before encoding"],
    ),
}


@pytest.mark.parametrize("case", WRITTEN)
def test_the_conventions_of_a_format_are_told(tmp_path, case):
    make, words = WRITTEN[case]
    shown = str(inspect(make(tmp_path / "c").path))
    assert case.split()[0] in shown
    assert [word for word in words if word not in shown] == []


def test_a_crosscoder_of_ours_is_told_with_its_models_and_threshold(tmp_path):
    made = Crosscoder(5, 9, BatchTopK(2), code_norm="l2")
    made.sparsity.threshold.fill_(0.75)
    extra = {"pair": {"base": {"name": "a"}, "tuned": {"name": "b"}, "hook": "blocks.1.hook_resid_post"}}
    shown = str(inspect(save(made, tmp_path / "c", extra=extra)))
    for words in (
        "score > 0.75",
        "blocks.1.hook_resid_post",
        "a, b",
        "loads as it is",
        "2 models x 5 d_in, 9 latents",
    ):
        assert words in shown


def test_torch_is_not_imported_for_any_format(tmp_path):
    folders = [str(make(tmp_path / str(i)).path) for i, (make, _) in enumerate(WRITTEN.values())]
    code = f"""
import json, sys
from tl_crosscoder.hub.inspect import inspect
for folder in {folders!r}:
    json.dumps(inspect(folder).as_dict(), allow_nan=False)
assert not {{"torch", "numpy", "pandas", "transformers"}} & set(sys.modules), sorted(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_verb_prints_what_a_program_can_read(tmp_path):
    folder = writers.papergrade(tmp_path / "c").path
    ran = subprocess.run(
        [sys.executable, "-m", "tl_crosscoder", "inspect", str(folder), "--json"],
        check=True,
        capture_output=True,
        text=True,
    )
    found = json.loads(ran.stdout)
    assert found["format"] == "OpenInterpretability"
    assert found["tensors"]["W_dec"] == ["F64", [12, 2, 5]]
    assert found["wants"] == {}
