"""The folder for SAE-Lens: what it computes, what it says, and what comes back."""

import json
import os
import shutil
import subprocess
import sys

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.hub.sae_lens_cases import D_IN, D_SAE, HOOK, KINDS, NEEDS_SAE_LENS, acts, made, sae_lens
from tl_crosscoder.analysis.decoder_norms import delta_norm
from tl_crosscoder.analysis.table import latent_table
from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.dictionary.normalizer import Normalizer
from tl_crosscoder.dictionary.sparsity import BatchTopK, GroupMax, JumpReLU, ReLU, Split, TopK
from tl_crosscoder.errors import CorruptFile
from tl_crosscoder.hub.load import load as hub_load
from tl_crosscoder.hub.load import origin
from tl_crosscoder.hub.sae_lens.artifact import read_sae_lens, write_sae_lens
from tl_crosscoder.hub.sae_lens.flat import flatten
from tl_crosscoder.hub.save import load, save

EXTRA = {
    "pair": {"hook": HOOK, "base": {"name": "gpt2", "revision": "abc"}, "tuned": {"name": "gpt2-chat"}},
    "context_size": 128,
}
#: What a process without this library does with a folder and with a repository.
PLAIN = """
import sys, warnings
warnings.simplefilter("ignore")
import torch
from safetensors.torch import load_file, save_file
from sae_lens import SAE
folders = sys.argv[1].split(",")
for folder in folders:
    sae = SAE.load_from_disk(folder + "/sae_lens")
    x = load_file(folder + "/x.safetensors")["x"]
    save_file({"acts": sae.encode(x).detach(), "recon": sae(x).detach()}, folder + "/plain.safetensors")
import huggingface_hub.constants
for offline in (False, True):
    huggingface_hub.constants.HF_HUB_OFFLINE = offline
    again = SAE.from_pretrained("someone/crosscoder", "sae_lens")
    assert torch.equal(again(x), sae(x)), offline
    assert again.cfg.metadata.crosscoder["n_models"] == 2
    sparsity = SAE.from_pretrained_with_cfg_and_sparsity("someone/crosscoder", "sae_lens")[2]
    save_file({"sparsity": sparsity}, folder + "/sparsity_found.safetensors")
assert not any(name.startswith("tl_crosscoder") for name in sys.modules)
print(type(sae).__module__, "done")
"""


@NEEDS_SAE_LENS
@pytest.mark.enable_socket
def test_plain_sae_lens_loads_the_folder_in_a_process_without_this_library(tmp_path):
    """From disk, from a Hub and from its cache offline; with exact arithmetic, bit for bit what the crosscoder computes."""
    from tests.hub.local_hub import LocalHub

    cases = {kind: made(kind, code_norm="none" if kind == "topk" else "sum", exact=True) for kind in KINDS}
    x = acts(exact=True)
    table = latent_table(cases["split"], [x])
    for kind, crosscoder in cases.items():
        save(crosscoder, tmp_path / kind, extra=EXTRA, table=table)
        save_file({"x": x.flatten(1)}, tmp_path / kind / "x.safetensors")
    folder = tmp_path / kind / "sae_lens"
    with LocalHub() as hub:
        hub.add(
            "someone/crosscoder", {f"sae_lens/{path.name}": path.read_bytes() for path in folder.iterdir()}
        )
        folders = ",".join(str(tmp_path / kind) for kind in cases)
        environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "cache")}
        command = [sys.executable, "-c", PLAIN, folders]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert "done" in done.stdout, done.stderr
    assert done.stdout.startswith("sae_lens.")
    for kind, crosscoder in cases.items():
        plain = load_file(tmp_path / kind / "plain.safetensors")
        assert torch.equal(plain["acts"], crosscoder.encode(x)), kind
        assert torch.equal(plain["recon"], crosscoder(x).recon.flatten(1)), kind
        assert plain["acts"].any(), kind
    # of the last, the only one on the Hub: log10 of the share of tokens, as SAE-Lens' own trainer keeps it
    sparsity = load_file(folder.parent / "sparsity_found.safetensors")["sparsity"]
    fired = (plain["acts"] > 0).float().mean(0)
    torch.testing.assert_close(sparsity, torch.log10(fired + 1e-10))
    assert 0 < fired.min() < fired.max() < 1


def test_a_table_says_how_often_each_latent_fires_and_must_be_whole(tmp_path):
    table = pd.DataFrame({"frequency": torch.arange(D_SAE).double().numpy() / 10}).rename_axis("latent")
    for order in (table, table[::-1]):  # sorted by something else
        folder = write_sae_lens(made(), tmp_path / "c", table=order)
        found = load_file(folder / "sparsity.safetensors")["sparsity"]
        assert (found.dtype, found[0].item()) == (torch.float32, pytest.approx(-10))
        torch.testing.assert_close(10 ** found[1:], torch.arange(1, D_SAE) / 10)
    assert torch.equal(
        read_sae_lens(folder).W_enc, read_sae_lens(write_sae_lens(made(), tmp_path / "d")).W_enc
    )
    for write in (write_sae_lens, save):
        with pytest.raises(ValueError, match=r"has 8 rows, wanted one for each of the latents 0\.\.8"):
            write(made(), tmp_path / "e", table=table[1:])
    assert not (tmp_path / "e").exists()
    write_sae_lens(
        made(), folder, table=table.drop(columns="frequency")
    )  # not measured, and the old one is gone
    assert sorted(path.name for path in folder.iterdir()) == ["cfg.json", "sae_weights.safetensors"]


def test_the_folder_holds_five_tensors_and_says_what_they_are(tmp_path):
    folder = write_sae_lens(made(), tmp_path / "c", extra=EXTRA)
    assert sorted(path.name for path in folder.iterdir()) == ["cfg.json", "sae_weights.safetensors"]
    tensors = load_file(folder / "sae_weights.safetensors")
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert shapes == {"W_enc": (10, 9), "b_enc": (9,), "W_dec": (9, 10), "b_dec": (10,), "threshold": (9,)}
    # SAE-Lens casts every tensor to one dtype: a further one, or an integer, would not come back as it was
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    cfg = json.loads((folder / "cfg.json").read_text(), parse_constant=pytest.fail)
    metadata = cfg["metadata"]
    assert (cfg["architecture"], cfg["d_in"], cfg["d_sae"]) == ("jumprelu", 10, 9)
    assert (metadata["hook_name"], metadata["model_name"]) == (HOOK, "gpt2-chat")
    assert (metadata["prepend_bos"], metadata["context_size"]) == (True, 128)
    assert metadata["sae_lens_version"]
    block = metadata["crosscoder"]
    assert (block["n_models"], block["d_in"], block["code_norm"]) == (2, 5, "sum")
    assert block["models"] == [{"name": "gpt2", "revision": "abc"}, {"name": "gpt2-chat"}]
    assert block["hook_names"] == [HOOK, HOOK]
    assert block["assumed"] == ["prepend_bos"]


def test_an_adapter_stands_in_the_models_name_and_what_the_capture_counted_is_not_assumed(tmp_path):
    """By the base model's name alone, SAE-Lens' users would load the base model."""
    pair = {"hook": HOOK, "base": {"name": "gpt2"}, "tuned": {"name": "gpt2", "adapter_name": "poet"}}
    for opened, begins in ((40, True), (0, False)):
        extra = {"pair": pair, "capture": {"bos": {"id": 1, "sequences_opened_by_it": opened}}}
        folder = write_sae_lens(made(), tmp_path / "c", extra=extra)
        metadata = json.loads((folder / "cfg.json").read_text())["metadata"]
        assert (metadata["model_name"], metadata["prepend_bos"]) == ("gpt2 + poet", begins)
        assert metadata["crosscoder"]["assumed"] == ["context_size"]
        assert origin(hub_load(folder)).conventions.language_models == "gpt2, gpt2 + poet"
    folder = write_sae_lens(made(), tmp_path / "c", extra={**extra, "prepend_bos": True})
    assert (
        json.loads((folder / "cfg.json").read_text())["metadata"]["prepend_bos"] is True
    )  # who says so knows


def test_a_crosscoder_that_nobody_described_says_so_and_leaves_nothing_out(tmp_path):
    metadata = json.loads((write_sae_lens(made(), tmp_path / "c") / "cfg.json").read_text())["metadata"]
    wanted = ("hook_name", "model_name", "prepend_bos", "context_size")
    assert [metadata[name] for name in wanted] == ["unknown", "unknown", True, 1024]
    assert metadata["crosscoder"]["assumed"] == ["context_size", "prepend_bos"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_the_tensors_compute_what_a_loop_in_float64_does(tmp_path, kind, dtype):
    """``p = Σ_m s_m ⟨w_m, x_m − μ_m⟩ + b`` and ``x̂_m = (Σ_j f_j d_j^m + b_m) / s_m + μ_m``, on the crosscoder's own arrays."""
    crosscoder, x = made(kind, dtype=dtype), acts(20).double()
    tensors = load_file(write_sae_lens(crosscoder, tmp_path / "c") / "sae_weights.safetensors")
    tensors = {name: tensor.double() for name, tensor in tensors.items()}
    state = {name: tensor.double() for name, tensor in crosscoder.state_dict().items()}
    mean, scale = state["normalizer.mean"], state["normalizer.scale"]
    norms = state["W_dec"].norm(dim=-1).sum(-1)
    close = {torch.float64: 1e-10, torch.float32: 1e-4}.get(dtype, 0.1)
    for row in x:
        y = (row - mean) * scale[:, None]
        p = torch.stack([(w * y).sum() for w in state["W_enc_rows"]]) + state["b_enc"]
        p_flat = row.flatten() @ tensors["W_enc"] + tensors["b_enc"]
        weight = norms if kind == "topk" else 1
        torch.testing.assert_close(p_flat, p * weight, atol=close * 30, rtol=close)
        f = p.relu()
        recon = (torch.einsum("j,jmd->md", f, state["W_dec"]) + state["b_dec"]) / scale[:, None] + mean
        flat = (f * weight) @ tensors["W_dec"] + tensors["b_dec"]
        torch.testing.assert_close(flat.view(2, -1), recon, atol=close * 30, rtol=close)


@pytest.mark.parametrize("encoder", ["sum", "mean"])
@pytest.mark.parametrize("code_norm", ["sum", "l2", "none"])
@pytest.mark.parametrize("kind", KINDS)
def test_reading_back_gives_the_same_codes_norms_and_file(tmp_path, kind, code_norm, encoder):
    saved, x = made(kind, code_norm=code_norm, encoder=encoder), acts()
    folder = write_sae_lens(saved, tmp_path / "c", extra=EXTRA)
    loaded = read_sae_lens(folder)
    weight = saved.selection_norms() if kind == "topk" else torch.ones(D_SAE)
    torch.testing.assert_close(loaded.encode(x), saved.encode(x) * weight, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(loaded(x).recon, saved(x).recon, atol=1e-4, rtol=1e-5)
    # a TopK's codes are weighed, and its decoders so much the shorter
    torch.testing.assert_close(loaded.decoder_norms() * weight[:, None], saved.decoder_norms())
    torch.testing.assert_close(loaded(x).error, saved(x).error, atol=1e-4, rtol=1e-5)
    assert type(loaded.sparsity) is type(saved.sparsity)
    again = write_sae_lens(loaded, tmp_path / "d", extra=EXTRA)
    first, second = (load_file(path / "sae_weights.safetensors") for path in (folder, again))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["batch_topk", "jumprelu", "topk"])
def test_a_precision_comes_back(tmp_path, kind, dtype):
    saved = made(kind, dtype=dtype, exact=True)
    loaded = read_sae_lens(write_sae_lens(saved, tmp_path / "c"))
    assert loaded.W_dec.dtype == dtype
    first, second = flatten(saved).tensors(), flatten(loaded).tensors()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("code_norm", ["sum", "l2"])
def test_thresholds_are_those_that_training_tracked(code_norm):
    """Known answer: active exactly where p · norm > θ, each token by itself; exporting changes nothing in the crosscoder."""
    crosscoder, x = made(code_norm=code_norm), acts(400)
    before = {name: tensor.clone() for name, tensor in crosscoder.state_dict().items()}
    flat = flatten(crosscoder)
    codes = flat.encode(x.flatten(1))
    norms = crosscoder.W_dec.norm(dim=-1)
    norms = norms.sum(-1) if code_norm == "sum" else norms.norm(dim=-1)
    p = crosscoder.pre_acts(x).detach()
    assert torch.equal(codes > 0, p * norms > 0.75)
    torch.testing.assert_close(codes, p.where(p * norms > 0.75, 0), atol=1e-5, rtol=1e-5)
    assert 0.1 < (codes > 0).float().mean() < 0.9
    alone = torch.cat([flat.encode(row[None]) for row in x.flatten(1)])
    assert torch.equal(alone > 0, codes > 0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in crosscoder.state_dict().items())


def test_scales_of_the_models_do_not_move_a_latent_between_classes(tmp_path):
    """Raw decoder norms differ by the ratio of the scales; told in the units of training they do not."""
    saved = made()
    loaded = read_sae_lens(write_sae_lens(saved, tmp_path / "c"))
    torch.testing.assert_close(delta_norm(loaded.decoder_norms()), delta_norm(saved.decoder_norms()))
    raw = loaded.W_dec.norm(dim=-1)
    assert ((raw[:, 1] / raw.amax(-1)) - delta_norm(saved.decoder_norms())).abs().max() > 0.1
    assert torch.equal(loaded.units.scale, saved.normalizer.scale)
    assert torch.equal(loaded.units.mean, saved.normalizer.mean)


def test_a_latent_without_a_decoder_is_never_active_and_leaves_no_infinity(tmp_path):
    crosscoder, x = made(exact=True), acts(exact=True)
    with torch.no_grad():
        crosscoder.W_dec[3] = 0
    tensors = load_file(write_sae_lens(crosscoder, tmp_path / "c") / "sae_weights.safetensors")
    assert tensors["threshold"][3] == torch.finfo(torch.float32).max
    loaded = read_sae_lens(tmp_path / "c")
    assert torch.equal(loaded.encode(x), crosscoder.encode(x))
    assert crosscoder.pre_acts(x)[:, 3].max() > 1


def test_what_sae_lens_cannot_hold_is_refused_with_the_reason(tmp_path):
    def refused(sparsity, reason):
        with pytest.raises(ValueError, match=reason):
            write_sae_lens(Crosscoder(D_IN, D_SAE, sparsity), tmp_path / "c")
        assert not (tmp_path / "c").exists()

    refused(GroupMax(3), r"GroupMax is neither")
    refused(Split(3, ReLU(), TopK(1)), r"a TopK inside Split is for some of them")
    refused(Split(3, ReLU(), GroupMax(2)), r"GroupMax inside Split is neither")
    refused(BatchTopK(2), r"BatchTopK has no threshold yet.*set sparsity\.threshold")


def test_save_leaves_the_folder_wherever_sae_lens_can_hold_it(tmp_path):
    crosscoder = made()
    folder = save(crosscoder, tmp_path / "c", extra=EXTRA)
    assert torch.equal(read_sae_lens(folder / "sae_lens").b_dec, flatten(crosscoder).b_dec.view(2, -1))
    assert torch.equal(load(folder).W_dec, crosscoder.W_dec)
    save(load(folder), folder, extra=EXTRA)  # replaced as a whole
    assert not (save(crosscoder, tmp_path / "half", sae_lens=False) / "sae_lens").exists()
    grouped = Crosscoder(D_IN, D_SAE, GroupMax(3))
    assert not (save(grouped, tmp_path / "d") / "sae_lens").exists()
    with pytest.raises(ValueError, match="GroupMax is neither"):
        save(grouped, tmp_path / "e", sae_lens=True)
    assert not (tmp_path / "e").exists()


def test_a_folder_saved_without_it_still_loads(tmp_path):
    crosscoder, folder = made(), save(made(), tmp_path / "c")
    shutil.rmtree(folder / "sae_lens")
    assert torch.equal(load(folder).W_dec, crosscoder.W_dec)


def test_files_of_others_are_not_replaced(tmp_path):
    folder = save(made(), tmp_path / "c") / "sae_lens"
    (folder / "thesis.tex").write_text("years of work")
    for write in (lambda: write_sae_lens(made(), folder), lambda: save(made(), tmp_path / "c")):
        with pytest.raises(FileExistsError, match=r"holds 'thesis\.tex'"):
            write()
    assert (folder / "thesis.tex").read_text() == "years of work"


def broken(change):
    def edit(folder):
        path = folder / "cfg.json"
        config = json.loads(path.read_text())
        change(config)
        path.write_text(json.dumps(config))

    return edit


def truncated(folder):
    path = folder / "sae_weights.safetensors"
    path.write_bytes(path.read_bytes()[:-4])


def not_a_number(folder):
    path = folder / "sae_weights.safetensors"
    save_file(load_file(path) | {"b_dec": torch.full((10,), torch.nan)}, path)


def further_tensor(folder):
    path = folder / "sae_weights.safetensors"
    save_file(load_file(path) | {"scaling_factor": torch.ones(1)}, path)


BLOCK = {
    "a width of the metadata that is not the weights'": (lambda c: c.update(d_in=12), "wants the shape"),
    "an odd number of models": (lambda c: c["metadata"]["crosscoder"].update(n_models=3), "not one for each"),
    "a width as text": (lambda c: c.update(d_sae="9"), "want whole numbers"),
    "another architecture": (lambda c: c.update(architecture="gated"), "wanted 'jumprelu' or 'topk'"),
    "a bias on the input": (lambda c: c.update(apply_b_dec_to_input=True), "apply_b_dec_to_input is True"),
    "a norm of its own": (lambda c: c.update(normalize_activations="layer_norm"), "normalize_activations"),
    "an unknown dtype": (lambda c: c.update(dtype="int8"), "the dtype is 'int8'"),
    "a later schema": (lambda c: c["metadata"]["crosscoder"].update(schema=2), "upgrade tl-crosscoder"),
    "an unknown sparsity": (
        lambda c: c["metadata"]["crosscoder"]["sparsity"].update(name="x"),
        "no sparsity",
    ),
    "scales of 0": (lambda c: c["metadata"]["crosscoder"].update(model_scales=[0.0, 1.0]), "above 0"),
    "no thresholds": (lambda c: c["metadata"]["crosscoder"].pop("thresholds"), "thresholds"),
}
HOSTILE = {
    **{name: (broken(change), match) for name, (change, match) in BLOCK.items()},
    "a file cut short": (truncated, "cut short"),
    "a NaN": (not_a_number, "NaN or Inf"),
    "a further tensor": (further_tensor, "unexpected"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_broken_folder_is_refused_with_its_reason(tmp_path, case):
    edit, match = HOSTILE[case]
    folder = write_sae_lens(made(), tmp_path / "c")
    edit(folder)
    with pytest.raises(CorruptFile, match=match):
        read_sae_lens(folder)


def test_an_sae_whose_metadata_were_lost_is_no_crosscoder(tmp_path):
    folder = write_sae_lens(made(), tmp_path / "c")
    broken(lambda config: config["metadata"].pop("crosscoder"))(folder)
    with pytest.raises(ValueError, match=r"no metadata\.crosscoder that says how many models"):
        read_sae_lens(folder)


def test_thresholds_that_others_changed_are_kept_as_they_are(tmp_path):
    """They are then no longer one number divided by the norms."""
    folder = write_sae_lens(made(), tmp_path / "c")
    path, x = folder / "sae_weights.safetensors", acts()
    changed = load_file(path)
    changed["threshold"] = changed["threshold"] * torch.linspace(0.5, 2, D_SAE)
    save_file(changed, path)
    loaded = read_sae_lens(folder)
    assert isinstance(loaded.sparsity, JumpReLU)
    torch.testing.assert_close(loaded.sparsity.thresholds, changed["threshold"], rtol=1e-6, atol=0)
    p = x.flatten(1) @ changed["W_enc"] + changed["b_enc"]
    torch.testing.assert_close(loaded.encode(x), p.where(p > changed["threshold"], 0), atol=1e-5, rtol=1e-5)


def test_thresholds_in_half_precision_are_not_rounded_to_its_logarithms(tmp_path):
    """A logarithm near 3 has steps of 1/64 in bfloat16: a threshold would move by a percent."""
    folder = write_sae_lens(made(dtype=torch.bfloat16), tmp_path / "c")
    path = folder / "sae_weights.safetensors"
    changed = load_file(path)
    changed["threshold"] = torch.linspace(15, 25, D_SAE).bfloat16()
    save_file(changed, path)
    loaded = read_sae_lens(folder)
    torch.testing.assert_close(loaded.sparsity.thresholds, changed["threshold"].float(), rtol=1e-6, atol=0)


def test_a_dictionary_of_one_model_is_one_there_too(tmp_path):
    one = Crosscoder(5, 9, TopK(2), n_models=1, normalizer=Normalizer(torch.randn(1, 5), torch.tensor([2.0])))
    loaded, x = read_sae_lens(write_sae_lens(one, tmp_path / "c")), torch.randn(20, 1, 5)
    torch.testing.assert_close(loaded(x).recon, one.eval()(x).recon, atol=1e-5, rtol=1e-5)


@NEEDS_SAE_LENS
@pytest.mark.parametrize("kind", ["batch_topk", "topk"])
def test_sae_lens_saves_what_it_loaded_and_nothing_is_lost(tmp_path, kind):
    folder = write_sae_lens(made(kind), tmp_path / "c", extra=EXTRA)
    sae_lens().SAE.load_from_disk(folder).save_model(tmp_path / "d")
    first, second = (json.loads((path / "cfg.json").read_text()) for path in (folder, tmp_path / "d"))
    assert second == first
    assert torch.equal(read_sae_lens(tmp_path / "d").W_enc, read_sae_lens(folder).W_enc)


@NEEDS_SAE_LENS
def test_norms_folded_by_sae_lens_leave_the_function_as_it_was(tmp_path):
    saved, x = made(), acts()
    sae = sae_lens().SAE.load_from_disk(write_sae_lens(saved, tmp_path / "c"), fold_W_dec_norm=True)
    sae.save_model(tmp_path / "d")
    loaded = read_sae_lens(tmp_path / "d")
    torch.testing.assert_close(loaded(x).recon, saved(x).recon, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(loaded.W_dec.flatten(1).norm(dim=-1), torch.ones(D_SAE))
    torch.testing.assert_close(delta_norm(loaded.decoder_norms()), delta_norm(saved.decoder_norms()))


@NEEDS_SAE_LENS
def test_without_its_version_sae_lens_would_drop_our_words(tmp_path):
    """Why ``sae_lens_version`` is written: the block would be lost without a sound."""
    folder = write_sae_lens(made(), tmp_path / "c")
    load_from_disk = sae_lens().SAE.load_from_disk
    assert load_from_disk(folder).cfg.metadata.crosscoder["n_models"] == 2
    broken(lambda config: config["metadata"].pop("sae_lens_version"))(folder)
    assert load_from_disk(folder).cfg.metadata.crosscoder is None
