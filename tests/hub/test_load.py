"""What load() refuses, what it must be told, and whether what it made does what the files claim."""

import json

import format_writers as writers
import pytest
import torch
from safetensors.torch import load_file, save_file

from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.dictionary.sparsity import BatchTopK, ReLU
from tl_crosscoder.errors import CorruptFile, PairMismatch, UnreadableFormat
from tl_crosscoder.hub.load import load, origin
from tl_crosscoder.hub.save import save

dl = writers.dictionary_learning


def change(folder, edit, name="model.safetensors"):
    """Edit the tensors of a safetensors file."""
    tensors = load_file(folder / name)
    edit(tensors)
    save_file(tensors, folder / name)


def settings(folder, name="config.json", **changes):
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


REFUSED = {
    "a BatchTopK without its buffers": (lambda p: dl(p, buffers=False), {}, "the BatchTopK's"),
    "activations normalised twice": (lambda p: dl(p, norm="DECOUPLED"), {}, "twice before the encoder"),
    "lost scales": (writers.kissane, {}, "Pass scale="),
    "lost statistics": (writers.antebe, {}, "z-scored"),
    "no thresholds": (lambda p: writers.papergrade(p, thresholds=False), {}, "thresholds are missing"),
    "no norm scales": (lambda p: writers.papergrade(p, scales=False), {}, "norm_scale_A"),
    "masks that were not applied": (lambda p: writers.antebe(p, applied=False), {"scale": 1}, "whether the mask was applied"),
    "a top-k without its k": (lambda p: writers.antebe(p, k=0), {"scale": 1}, "k is 0"),
    "a BatchTopK for whole batches": (lambda p: writers.crosscode(p, kind="batchtopk"), {}, "no threshold for single tokens"),
    "scaling that was not folded": (lambda p: writers.crosscode(p, folded=False), {}, "is_folded is false"),
    "models and hook points": (lambda p: writers.crosscode(p, models=2, points=2), {}, "one axis for both"),
    "an unclear normalisation": (lambda p: writers.llamascopium(p, how="inference"), {}, "is not clear"),
    "a norm for each token": (lambda p: writers.llamascopium(p, how="token-wise"), {}, "frozen normaliser cannot"),
    "a batch's top-k": (lambda p: writers.llamascopium(p, act="batchtopk"), {}, "looks at a whole batch"),
    "a threshold never estimated": (lambda p: writers.heterogeneous(p, threshold=-1.0), {}, "threshold is -1"),
    "a skip connection": (lambda p: writers.sae_lens_flat(p, architecture="skip_crosscoder"), {}, "skip connection"),
    "other layers written than read": (lambda p: writers.sae_lens_flat(p, out=["a", "b"]), {}, "writes what it reads"),
    "an average norm lost": (lambda p: writers.sae_lens_layers(p, normalise="expected_average_only_in"), {}, "factors are not in"),
    "a latent processor": (lambda p: dl(p, config={"latent_processor": "mlp"}), {}, "latent_processor"),
    "an unknown setting": (lambda p: dl(p, config={"gate": True}), {}, "unknown setting 'gate'"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_lost_or_cannot_be_expressed_is_refused_by_name(tmp_path, case):
    make, given, reason = REFUSED[case]
    written = make(tmp_path / "c")
    with pytest.raises(UnreadableFormat, match=reason):
        load(written.path, **given)


def test_thresholds_too_large_for_the_dtype_leave_a_latent_silent(tmp_path):
    written = writers.llamascopium(tmp_path / "heads", act="jumprelu")
    change(written.path, lambda t: t["W_D"][0, 3].mul_(1e-6), "sae_weights.safetensors")  # tuned's own
    for dtype in (torch.float64, torch.float16):
        made = load(written.path, dtype=dtype)
        assert made.strengths(torch.tensor([5.0]), torch.tensor([3]))[0].tolist() == [0, 5]
    written = writers.crosscode(tmp_path / "one")
    written.tensors["activation_fn.log_threshold_L"].fill_(100.0)
    torch.save(written.tensors, written.path / "model.pt")
    made = load(written.path, dtype=torch.float32)
    assert not made.encode(torch.randn(20, 2, made.d_in)).any()
    save(made, tmp_path / "kept")


def test_numbers_too_large_for_float16_are_refused_and_not_made_infinite(tmp_path):
    made = Crosscoder(4, 9, ReLU())
    with torch.no_grad():
        made.b_dec[0, 0] = 7e4
    folder = save(made, tmp_path / "c")
    with pytest.raises(ValueError, match=r"'b_dec' holds numbers too large for float16.*bfloat16"):
        load(folder, dtype=torch.float16)
    assert load(folder, dtype=torch.bfloat16).b_dec.isfinite().all()


def test_an_sae_that_does_not_say_of_how_many_models_is_sent_to_from_sae_lens(tmp_path):
    save(Crosscoder(4, 9, ReLU()), tmp_path / "c")
    folder = tmp_path / "c" / "sae_lens"
    settings(folder, "cfg.json", metadata={})  # as SAE-Lens leaves them after a change of the config
    with pytest.raises(UnreadableFormat, match=r"one SAE.*tlc\.from_sae_lens\(.*n_models=2\)"):
        load(folder)


@pytest.mark.parametrize("threshold", [-1.0, 0.0, float("nan")])
def test_a_threshold_that_would_leave_the_code_dense_is_refused(tmp_path, threshold):
    written = dl(tmp_path / "c")
    change(written.path, lambda t: t.update(threshold=torch.tensor(threshold, dtype=torch.float64)))
    with pytest.raises(UnreadableFormat, match="every positive activation would stay"):
        load(written.path)
    x = torch.randn(30, 2, writers.D, dtype=torch.float64)
    assert torch.allclose(load(written.path, threshold=2.5).encode(x), written.formula(x)[0], atol=1e-6)


def test_what_the_files_state_is_not_overruled(tmp_path):
    with pytest.raises(ValueError, match="states its own"):
        load(dl(tmp_path / "c").path, threshold=1.0)
    with pytest.raises(ValueError, match="states its own"):
        load(dl(tmp_path / "d").path, scale=1.0)


def test_an_unknown_tensor_is_refused(tmp_path):
    for name, make in (("dl", dl), ("kk", lambda p: writers.kissane(p, name="model.safetensors"))):
        written = make(tmp_path / name)
        change(written.path, lambda t: t.update(gate=torch.zeros(writers.F)))
        with pytest.raises(UnreadableFormat, match="unknown tensor 'gate'"):
            load(written.path, **written.given)


def test_axes_that_fit_two_ways_are_refused(tmp_path):
    # d_sae = d_in = 5: nothing tells (model, d_in, d_sae) from (model, d_sae, d_in)
    square = {
        "W_enc": torch.randn(2, 5, 5),
        "W_dec": torch.randn(5, 2, 5),
        "b_enc": torch.zeros(5),
        "b_dec": torch.zeros(2, 5),
    }
    writers.write(tmp_path / "c", "cc_weights.safetensors", square, {}, "cfg.json")
    with pytest.raises(UnreadableFormat, match="ambiguous"):
        load(tmp_path / "c", scale=1)


def test_a_normaliser_that_contradicts_itself_is_refused(tmp_path):
    written = dl(tmp_path / "c")
    change(written.path, lambda t: t.update(activation_global_scale=2 * t["activation_global_scale"]))
    with pytest.raises(UnreadableFormat, match="not clear which of them"):
        load(written.path)
    change(written.path, lambda t: t["activation_mean"].__setitem__((0, 1), float("nan")))
    with pytest.raises(CorruptFile, match="NaN in part"):
        load(written.path)


def test_several_checkpoints_are_not_chosen_between(tmp_path):
    for step in (100, 200):
        dl(tmp_path / "c", name=f"checkpoint_{step}.pt")
    with pytest.raises(UnreadableFormat, match="several files hold a crosscoder"):
        load(tmp_path / "c")
    assert load(tmp_path / "c" / "checkpoint_100.pt").d_sae == writers.F
    dl(tmp_path / "c", name="model_final.pt")
    assert load(tmp_path / "c").d_sae == writers.F


def test_a_folder_of_folders_names_them(tmp_path):
    writers.kissane(tmp_path / "blocks.14.hook_resid_pre")
    with pytest.raises(UnreadableFormat, match=r"blocks\.14\.hook_resid_pre"):
        load(tmp_path)


def test_what_was_saved_here_comes_back_with_its_words(tmp_path):
    made = Crosscoder(5, 9, BatchTopK(2))
    made.sparsity.threshold.fill_(0.7)
    loaded = load(save(made, tmp_path / "c", extra={"hook": "blocks.1.hook_resid_post"}))
    assert torch.equal(loaded.W_enc, made.W_enc)
    assert origin(loaded).extra == {"hook": "blocks.1.hook_resid_post"}
    with pytest.raises(KeyError, match="not loaded from files"):
        origin(made)


def test_statistics_without_a_place_in_a_crosscoder_are_set_aside_and_said(tmp_path):
    for make, name in (
        (writers.dictionary_learning, "activation_std"),
        (writers.heterogeneous, "normalizer.std_1"),
    ):
        written = make(tmp_path / name)
        found = origin(load(written.path))
        assert found.statistics[name] == pytest.approx(written.tensors[name].flatten().tolist())
        assert any(name in note and "origin(...).statistics" in note for note in found.conventions.notes)
    raw = writers.kissane(tmp_path / "c")
    assert origin(load(raw.path, scale=1)).statistics == {}


# -- check


def known(folder):
    """A dictionary that is right: on 12 directions, each model in its own basis, 3 of them on a token."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(torch.randn(2, 16, 12, generator=generator)).Q.transpose(
        1, 2
    )  # [model d_sae d_in]
    tensors = {
        "encoder.weight": directions.transpose(1, 2), "encoder.bias": torch.full((12,), -0.2), "decoder.weight": directions,
        "decoder.bias": torch.zeros(2, 16), "k": torch.tensor(3), "threshold": torch.tensor(0.5),
        "code_normalization_id": torch.tensor(1),
    }  # fmt: skip
    writers.write(folder, "model.safetensors", tensors, {"activation_dim": 16, "dict_size": 12})
    strengths = torch.rand(4000, 12, generator=generator) * (torch.rand(4000, 12, generator=generator) < 0.25)
    return torch.einsum("bj,mjd->bmd", strengths, directions)


def test_a_crosscoder_that_does_what_it_claims_passes(tmp_path):
    x = known(tmp_path / "c")
    fit = origin(load(tmp_path / "c", check=[x])).fit
    # by hand: f = 2s - .2 where that is above 0, and a token keeps those with 2f > .5
    s = torch.einsum("bmd,mjd->bj", x, load(tmp_path / "c").W_dec.permute(1, 0, 2)) / 2
    f = (2 * s - 0.2) * ((2 * s - 0.2) * 2 > 0.5)
    assert fit.measured["l0"] == pytest.approx((f > 0).float().sum(1).mean().item(), rel=1e-3)
    assert fit.claimed == {"l0": 3.0}
    assert not fit.problems


WRONG = {
    "look swapped": lambda x: x.flip(1),
    "ever active": lambda x: 0.01 * x,
    "latents are active": lambda x: 30 * x + 9,
}


@pytest.mark.parametrize("reason", WRONG)
def test_wrong_activations_are_noticed(tmp_path, reason):
    x = known(tmp_path / "c")
    settings(tmp_path / "c", k=3)
    with pytest.raises(PairMismatch, match=reason):
        load(tmp_path / "c", check=[WRONG[reason](x)])
