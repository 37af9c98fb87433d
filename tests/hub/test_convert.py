"""One crosscoder in the files of three tools: the function stays, and so do the bits where there is a place for them."""

import subprocess
import sys

import format_writers as writers
import pytest
import torch
from safetensors.torch import load_file

from tests.hub.sae_lens_cases import HOOK, NEEDS_SAE_LENS, sae_lens
from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.dictionary.normalizer import Normalizer
from tl_crosscoder.dictionary.sparsity import BatchTopK, PerModel, ReLU, TopK
from tl_crosscoder.errors import UnreadableFormat
from tl_crosscoder.hub.convert import convert
from tl_crosscoder.hub.load import load, origin
from tl_crosscoder.hub.sae_lens.convert import from_sae_lens, to_sae_lens


def crosscoder(sparsity=None, code_norm="sum", normalised=True):
    generator = torch.Generator().manual_seed(0)
    normalizer = (
        Normalizer(torch.randn(2, 5, generator=generator), torch.tensor([0.5, 2.0])) if normalised else None
    )
    made = Crosscoder(5, 9, sparsity or BatchTopK(2), normalizer=normalizer, code_norm=code_norm)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    if isinstance(made.sparsity, BatchTopK):
        made.sparsity.threshold.fill_(0.7)
    return made.eval()


@pytest.mark.parametrize("code_norm", ["sum", "l2", "none"])
@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("make", [lambda: BatchTopK(2), ReLU])
def test_to_dictionary_learning_and_back_every_bit_stays(tmp_path, code_norm, normalised, make):
    made = crosscoder(make(), code_norm, normalised)
    back = load(
        convert(made, "dictionary_learning", tmp_path / "dl", extra={"hook": "blocks.7.hook_resid_post"})
    )
    assert back.config["sparsity"] == made.config["sparsity"]
    assert back.code_norm == code_norm
    assert "blocks.7.hook_resid_post" in origin(back).conventions.hook
    for name, tensor in made.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name
    again = load(convert(back, "tl-crosscoder", tmp_path / "ours"))
    for name, tensor in made.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def decoupled(*ks, **settings):
    """A choice for each model: float32 weights and a threshold each."""
    made = crosscoder(PerModel(tuple(BatchTopK(k) for k in ks)), "decoupled", **settings)
    for m, part in enumerate(made.sparsity.parts):
        part.threshold.fill_(0.7 + m)
    return made


def test_a_choice_for_each_model_keeps_its_thresholds_there_and_back(tmp_path):
    made, x = decoupled(2, 2, normalised=False), torch.randn(50, 2, 5)
    back = load(convert(made, "dictionary_learning", tmp_path / "dl"))
    assert back.config == made.config
    for name, tensor in made.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name
    assert torch.equal(back(x).recon, made(x).recon)


@pytest.mark.parametrize("norm", ["CROSSCODER", "DECOUPLED"])
def test_from_dictionary_learning_and_back_every_bit_stays(tmp_path, norm):
    written = writers.dictionary_learning(tmp_path / "a", normaliser=False, norm=norm)
    there = convert(load(written.path), "dictionary_learning", tmp_path / "b")
    tensors = load_file(there / "model.safetensors")
    for name, tensor in written.tensors.items():
        assert torch.equal(tensors[name], tensor), name


def test_to_sae_lens_and_back_the_function_stays_and_the_second_time_every_bit(tmp_path):
    made, x = crosscoder(), torch.randn(50, 2, 5)
    once = load(convert(made, "sae-lens", tmp_path / "a"))
    assert torch.allclose(once.encode(x), made.encode(x), atol=1e-5)
    assert torch.allclose(once(x).recon, made(x).recon, atol=1e-4)
    twice = load(convert(once, "sae-lens", tmp_path / "b"))
    for name, tensor in once.state_dict().items():
        assert torch.equal(twice.state_dict()[name], tensor), name


def test_a_folded_normaliser_is_taken_out_again_for_dictionary_learning(tmp_path):
    made, x = crosscoder(), torch.randn(50, 2, 5)
    back = load(convert(made.folded(), "dictionary_learning", tmp_path / "a"))
    assert back.config == made.config
    for name, tensor in made.state_dict().items():
        torch.testing.assert_close(back.state_dict()[name], tensor, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(back(x).recon, made(x).recon, atol=1e-4, rtol=1e-5)


THROUGH_SAE_LENS = {
    "L1": {"batch_topk": False, "normaliser": False},
    "L1, normalised": {"batch_topk": False},
    "BatchTopK": {},
    "BatchTopK, raw activations": {"normaliser": False},
    "BatchTopK, SAE norm": {"norm": "SAE"},
    "BatchTopK, NONE norm": {"norm": "NONE"},
    "BatchTopK, MIXED norm": {"norm": "MIXED"},
}


@NEEDS_SAE_LENS
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("case", THROUGH_SAE_LENS)
def test_from_dictionary_learning_through_sae_lens_and_back_the_formula_stays(tmp_path, case):
    """Their file, ours, SAE-Lens' own class saved and loaded by SAE-Lens, ours, their file: the source's formula in float64."""
    written = writers.dictionary_learning(tmp_path / "a", **THROUGH_SAE_LENS[case])
    x = torch.randn(40, 2, writers.D, dtype=torch.float64, generator=torch.Generator().manual_seed(8))
    acts, recon = written.formula(x)
    assert 0.02 < (acts > 0).double().mean() < 0.98

    def same(codes, back):
        torch.testing.assert_close(codes, acts, atol=1e-10, rtol=1e-10)
        torch.testing.assert_close(back, recon, atol=1e-10, rtol=1e-10)

    to_sae_lens(load(written.path), hook=HOOK).save_model(tmp_path / "b")
    plain = sae_lens().SAE.load_from_disk(tmp_path / "b")
    assert type(plain).__module__.startswith("sae_lens.")
    same(plain.encode(x.flatten(1)), plain(x.flatten(1)).unflatten(1, (2, -1)))
    ours = from_sae_lens(plain)
    same(ours.encode(x), ours(x).recon)
    if "MIXED" in case:  # a threshold for each latent by then, for which their file has no place
        with pytest.raises(UnreadableFormat, match="no place for the sparsity Threshold"):
            convert(ours, "dictionary_learning", tmp_path / "c")
        return
    again = load(convert(ours, "dictionary_learning", tmp_path / "c"))
    same(again.encode(x), again(x).recon)
    first, last = (load_file(folder / "model.safetensors") for folder in (written.path, tmp_path / "c"))
    for name, tensor in first.items():
        if "target_rms" in name or "std" in name or "global_scale" in name:
            continue  # their product is what counts, and is in the formula
        torch.testing.assert_close(last[name].to(tensor), tensor, atol=1e-10, rtol=1e-10, msg=name)


@pytest.mark.parametrize("make", [writers.papergrade, writers.crosscode])
def test_thresholds_of_other_tools_reach_sae_lens(tmp_path, make):
    written, x = make(tmp_path / "a"), torch.randn(40, 2, writers.D, dtype=torch.float64)
    there = load(convert(load(written.path), "sae-lens", tmp_path / "b"))
    assert torch.allclose(there.encode(x), written.formula(x)[0], atol=1e-6)
    assert torch.allclose(there(x).recon, written.formula(x)[1], atol=1e-6)


def test_what_the_other_tool_has_no_place_for_is_refused_before_anything_is_written(tmp_path):
    for made, reason in (
        (crosscoder(TopK(2)), "TopK"),
        (Crosscoder(5, 9, BatchTopK(2)), "without a threshold"),
        (decoupled(2, 3, normalised=False), "a k for each model"),
        (decoupled(2, 2), "a normaliser beside a decoupled choice"),
        (decoupled(2, 2).folded(), "a normaliser beside a decoupled choice"),
        (crosscoder(PerModel((ReLU(), ReLU())), "decoupled", normalised=False), "the sparsity ReLU"),
    ):
        with pytest.raises(UnreadableFormat, match=reason):
            convert(made, "dictionary_learning", tmp_path / "c")
        assert not (tmp_path / "c").exists()
    with pytest.raises(KeyError, match="no format named 'onnx'"):
        convert(crosscoder(), "onnx", tmp_path / "c")


def test_the_verb_imports_a_crosscoder_of_another_tool(tmp_path):
    written, out = writers.kissane(tmp_path / "a"), tmp_path / "b"
    command = [
        sys.executable,
        "-m",
        "tl_crosscoder",
        "convert",
        str(written.path),
        str(out),
        "--scale",
        "0.27",
        "--scale",
        "0.31",
    ]
    subprocess.run(command, check=True)
    x = torch.randn(20, 2, writers.D, dtype=torch.float64)
    assert torch.allclose(load(out)(x).recon, written.formula(x)[1], atol=1e-6)
    assert origin(load(out)).extra["imported"]["format"] == "ckkissane"
