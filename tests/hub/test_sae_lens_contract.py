"""What SAE-Lens asks of every SAE holds of each of ours, whatever its architecture is called."""

import copy
import json

import pytest
import torch

from tests.hub.format_writers import dictionary_learning
from tests.hub.published import small_crosscoder, small_table
from tests.hub.sae_lens_cases import D_IN, D_SAE, HOOK, NEEDS_SAE_LENS, acts, made, sae_lens
from tl_crosscoder.errors import ShapeMismatch
from tl_crosscoder.hub.load import load
from tl_crosscoder.hub.publish import publish
from tl_crosscoder.hub.sae_lens.convert import from_sae_lens, to_sae_lens
from tl_crosscoder.hub.sae_lens.converter import sae_lens_converter
from tl_crosscoder.hub.sae_lens.training import sae_lens_config, sae_lens_training
from tl_crosscoder.hub.sae_lens.views import as_sae, paired

pytestmark = [NEEDS_SAE_LENS, pytest.mark.filterwarnings("ignore")]
HOOKS = ("input", "acts_pre", "acts_post", "recons", "output")


def trained():
    """Decoders of many norms, and a threshold."""
    torch.manual_seed(0)
    sae = sae_lens_training(sae_lens_config(D_IN, D_SAE, 2))
    with torch.no_grad():
        sae.W_dec *= 3 * torch.rand(D_SAE, 1) + 0.2
        sae.b_enc += torch.randn(D_SAE) / 2
    sae.topk_threshold.fill_(1 / 3)
    return sae


def half(kind):
    """One model's half, told the other's activations for good."""
    sae = paired(made(kind), 1, hook=HOOK)
    sae._others = acts()[:, 0]
    return sae


KINDS = {
    "crosscoder": lambda: to_sae_lens(made(), hook=HOOK),
    "crosscoder, topk": lambda: to_sae_lens(made("topk"), hook=HOOK),
    "half": lambda: half("batch_topk"),
    "half, topk": lambda: half("topk"),
    "approximation": lambda: as_sae(made(), 1, [acts()], encoder="linear", hook=HOOK),
    "approximation, topk": lambda: as_sae(made("topk"), 1, [acts()], encoder="linear", hook=HOOK),
    "in training": trained,
}
CASTS = {"half": torch.float16, "bfloat16": torch.bfloat16, "double": torch.float64, "to": torch.float64}
ON_DISK = [kind for kind in KINDS if not kind.startswith("half")]


def activations(sae):
    x = acts()
    return x.flatten(1) if sae.cfg.d_in == 2 * D_IN else x[:, 1]


@torch.no_grad()
def strongest(sae, x):
    """The codes of one latent alone, and what they write."""
    codes = sae.encode(x)
    j = int((codes.sum(0) * sae.W_dec.norm(dim=-1)).argmax())
    one = torch.zeros_like(codes)
    one[:, j] = codes[:, j]
    written = sae.decode(one) - sae.decode(torch.zeros_like(one))
    assert written.norm() > 1
    return one, written


@pytest.mark.parametrize("kind", KINDS)
def test_the_config_comes_back_from_its_dict_and_from_json(kind):
    sae = KINDS[kind]()
    told = sae.cfg.to_dict()
    again = type(sae.cfg).from_dict(json.loads(json.dumps(told, allow_nan=False)))
    assert again.to_dict() == told
    assert again.architecture() == told["architecture"]
    if kind in ON_DISK:
        assert type(type(sae).from_dict(told)) is type(sae)


@pytest.mark.parametrize("kind", KINDS)
def test_every_hook_runs_in_order_and_an_edit_of_a_latent_moves_what_it_writes(kind):
    sae = KINDS[kind]()
    x = activations(sae)
    one, written = strongest(sae, x)
    with torch.no_grad():
        recon, cache = sae.run_with_cache(x)
        codes = sae.encode(x)
        edited = sae.run_with_hooks(x, fwd_hooks=[("hook_sae_acts_post", lambda f, hook: f - one)])  # noqa: ARG005
        assert torch.equal(sae(x), recon)  # no hook is left behind
    assert list(cache) == [f"hook_sae_{name}" for name in HOOKS]
    assert torch.equal(cache["hook_sae_input"], x)
    assert ((codes > 0) <= (cache["hook_sae_acts_pre"] > 0)).all()
    assert torch.equal(cache["hook_sae_acts_post"], codes)
    assert torch.equal(cache["hook_sae_recons"], sae.decode(codes))
    assert torch.equal(cache["hook_sae_output"], recon)
    torch.testing.assert_close(edited, recon - written, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_with_the_error_term_nothing_is_lost_and_an_edit_is_all_that_changes(kind):
    sae = KINDS[kind]()
    x = activations(sae)
    one, written = strongest(sae, x)
    with torch.no_grad():
        sae.use_error_term = True
        torch.testing.assert_close(sae(x), x, atol=1e-4, rtol=1e-5)
        edited = sae.run_with_hooks(x, fwd_hooks=[("hook_sae_acts_post", lambda f, hook: f - one)])  # noqa: ARG005
        torch.testing.assert_close(edited, x - written, atol=1e-4, rtol=1e-5)
        assert "hook_sae_error" in sae.run_with_cache(x)[1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cast", CASTS)
def test_in_another_precision_it_runs_and_says_so(kind, cast):
    dtype = CASTS[cast]
    plain, sae = KINDS[kind](), KINDS[kind]()
    x = activations(sae)
    by_to = cast == "to" or "approximation" in kind  # SAE-Lens' own class follows to() alone
    sae = sae.to(dtype) if by_to else getattr(sae, cast)()
    assert (sae.dtype, sae.cfg.dtype) == (dtype, str(dtype).removeprefix("torch."))
    assert {p.dtype for p in sae.parameters()} == {dtype}
    codes, wanted = sae.encode(x), plain.encode(x)
    assert (codes.dtype, sae(x).dtype) == (dtype, dtype)
    close = 0.1 if dtype.itemsize == 2 else 1e-4
    # near a threshold a rounding may switch a latent on or off
    assert ((codes - wanted).abs() <= close * (1 + wanted.abs())).float().mean() > 0.97
    assert codes.any()


def test_the_threshold_of_a_training_keeps_its_precision_where_the_weights_lose_theirs():
    """A hundredth of a step of it is less than bfloat16 can tell."""
    sae = trained().bfloat16()
    assert (sae.W_dec.dtype, sae.topk_threshold.dtype) == (torch.bfloat16, torch.float64)
    assert sae.topk_threshold.item() == pytest.approx(1 / 3, rel=1e-12)


@pytest.mark.parametrize("kind", ON_DISK)
def test_leading_dimensions_are_any(kind):
    sae = KINDS[kind]()
    x = activations(sae)[:48]
    if kind == "in training":  # there, a batch is ranked as one
        torch.testing.assert_close(sae.encode(x.view(4, 12, -1)), sae.encode(x).view(4, 12, -1))
        return
    torch.testing.assert_close(sae.encode(x.view(2, 4, 6, -1)), sae.encode(x).view(2, 4, 6, -1))
    torch.testing.assert_close(sae(x[0]), sae(x[:1])[0])


@pytest.mark.parametrize("kind", KINDS)
def test_a_scale_folded_in_is_the_same_function_of_scaled_activations(kind):
    sae, folded = KINDS[kind](), KINDS[kind]()
    x = activations(sae)
    folded.fold_activation_norm_scaling_factor(0.5)
    torch.testing.assert_close(folded(x), 2 * sae(x / 2), atol=1e-4, rtol=1e-5)
    assert torch.equal(folded.encode(x) > 0, sae.encode(x / 2) > 0)


@pytest.mark.parametrize("kind", KINDS)
def test_norms_folded_in_leave_the_function_or_are_refused(kind):
    sae, folded = KINDS[kind](), KINDS[kind]()
    x = activations(sae)
    if "topk" in kind:
        with pytest.raises((NotImplementedError, TypeError), match=r"topk activations|k latents"):
            folded.fold_W_dec_norm()
    else:
        folded.fold_W_dec_norm()
        assert torch.equal(folded.encode(x) > 0, sae.encode(x) > 0)
    torch.testing.assert_close(folded(x), sae(x), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_whitening_folded_in_is_the_same_function_of_whitened_activations_or_is_refused(kind):
    sae, folded = KINDS[kind](), KINDS[kind]()
    x, d = activations(sae), sae.cfg.d_in
    generator = torch.Generator().manual_seed(4)
    mean, matrix = (
        torch.randn(d, generator=generator),
        torch.randn(d, d, generator=generator) + 4 * torch.eye(d),
    )
    if kind == "in training":
        with pytest.raises(ValueError, match="mixes the models' coordinates"):
            folded.fold_activation_whitening(mean, matrix, matrix.inverse())
        return
    folded.fold_activation_whitening(mean, matrix, matrix.inverse())
    z = (x - mean) @ matrix
    torch.testing.assert_close(folded(x), sae(z) @ matrix.inverse() + mean, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(folded.encode(x), sae.encode(z), atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("kind", ON_DISK)
def test_saving_and_loading_gives_the_same_class_and_the_same_bits(tmp_path, kind):
    sae = KINDS[kind]()
    sae.save_model(tmp_path / "c")
    loaded = type(sae).load_from_disk(tmp_path / "c")
    assert type(loaded) is type(sae)
    assert loaded.cfg.to_dict() == sae.cfg.to_dict()
    x = activations(sae)
    for name, tensor in sae.state_dict().items():
        if (
            name == "topk_threshold"
        ):  # SAE-Lens reads every tensor in the precision of the weights; a checkpoint keeps it
            tensor = tensor.float().double()
        assert torch.equal(loaded.state_dict()[name], tensor), name
        assert loaded.state_dict()[name].dtype == tensor.dtype, name
    assert torch.equal(loaded(x), sae(x))


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_shares_nothing(kind):
    sae = KINDS[kind]()
    x, again = activations(sae), copy.deepcopy(sae)
    before = again(x)
    assert torch.equal(before, sae(x))
    with torch.no_grad():
        sae.W_dec.zero_()
    sae.cfg.metadata.hook_name = "elsewhere"
    assert torch.equal(again(x), before)
    assert again.cfg.metadata.hook_name != "elsewhere"


# the typed view


@pytest.mark.parametrize("kind", ["batch_topk", "relu", "jumprelu", "topk", "split"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_what_sae_lens_loaded_gets_its_type_without_a_copy(tmp_path, kind, dtype):
    from tl_crosscoder.hub.sae_lens.native.joint_sae import CrosscoderSAE, CrosscoderTopKSAE

    crosscoder = made(kind, dtype=dtype)
    to_sae_lens(crosscoder, hook=HOOK).save_model(tmp_path / "c")
    plain = sae_lens().SAE.load_from_disk(tmp_path / "c")
    assert plain.dtype == dtype
    typed = CrosscoderSAE.from_sae(plain)
    assert type(typed) is (CrosscoderTopKSAE if kind == "topk" else CrosscoderSAE)
    assert type(CrosscoderSAE.load_from_disk(tmp_path / "c")) is type(typed)
    assert typed.cfg.to_dict() == plain.cfg.to_dict()
    for name, p in plain.named_parameters():
        assert getattr(typed, name).data_ptr() == p.data_ptr(), name
    x = acts(dtype=dtype)
    assert torch.equal(typed(x.flatten(1)), plain(x.flatten(1)))
    # [batch model d_in], one model after the other
    W_enc, W_dec, b_dec = typed.W_enc_by_model, typed.W_dec_by_model, typed.b_dec_by_model
    for m in range(2):
        part = slice(m * D_IN, (m + 1) * D_IN)
        assert torch.equal(W_enc[m], plain.W_enc[part])
        assert torch.equal(W_dec[:, m], plain.W_dec[:, part])
        assert torch.equal(b_dec[m], plain.b_dec[part])
    assert W_dec.data_ptr() == plain.W_dec.data_ptr()
    ours = typed.crosscoder()
    assert torch.equal(ours.W_dec, W_dec)
    assert torch.equal(ours.encode(x), from_sae_lens(plain).encode(x))
    with pytest.raises(ShapeMismatch, match=r"\[\.\.\., 2 \* 5\]; got \[50, 5\]"):
        typed.encode(x[:, 0])


def test_an_sae_of_one_model_is_not_taken_for_a_crosscoder():
    from tl_crosscoder.hub.sae_lens.native.joint_sae import CrosscoderSAE

    with pytest.raises(ValueError, match="an SAE of one model, or its metadata were lost"):
        CrosscoderSAE.from_sae(KINDS["approximation"]())
    lens = sae_lens()
    gated = lens.GatedSAE(lens.GatedSAEConfig(d_in=10, d_sae=9))
    with pytest.raises(ValueError, match="saved as 'jumprelu' or 'topk', this SAE is 'gated'"):
        CrosscoderSAE.from_sae(gated)


# the Hub, by SAE-Lens' own uploading and downloading


@pytest.mark.allow_hosts(["127.0.0.1", "::1"])
def test_what_sae_lens_uploads_is_what_it_loads_and_what_we_load(hub, monkeypatch):
    from sae_lens import upload_saes_to_huggingface

    from tl_crosscoder.hub.sae_lens.native.joint_sae import CrosscoderSAE

    # the client's functions of a module speak to where it pointed when it was imported
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", hub.url)
    saes = {kind: KINDS[name]() for kind, name in {"whole": "crosscoder", "one": "approximation"}.items()}
    upload_saes_to_huggingface(saes, "me/saes", show_progress=False)
    files = hub.repositories["me/saes"].head.files
    assert {f"{kind}/{file}" for kind in saes for file in ("cfg.json", "sae_weights.safetensors")} < set(
        files
    )
    for kind, sae in saes.items():
        x = activations(sae)
        loaded = sae_lens().SAE.from_pretrained("me/saes", kind)
        assert type(loaded).__module__.startswith("sae_lens.")
        assert torch.equal(loaded(x), sae(x))
        assert loaded.cfg.metadata.to_dict() == sae.cfg.metadata.to_dict()
    typed = CrosscoderSAE.from_pretrained("me/saes", "whole", dtype="float64")
    assert (type(typed), typed.dtype) == (CrosscoderSAE, torch.float64)
    ours = load("me/saes:whole")
    assert torch.equal(ours.encode(acts()), saes["whole"].crosscoder().encode(acts()))
    with pytest.raises(ValueError, match="means nothing without the other model"):
        upload_saes_to_huggingface({"half": KINDS["half"]()}, "me/saes", show_progress=False)


@pytest.mark.allow_hosts(["127.0.0.1", "::1"])
def test_what_we_publish_tells_sae_lens_how_often_each_latent_fires(hub):
    frequency = torch.linspace(0, 0.75, 16)
    table = small_table().assign(frequency=frequency.numpy())
    done = publish(small_crosscoder(), "me/cc", license="mit", table=table)
    assert "sae_lens/sparsity.safetensors" in done.files
    sae, _, sparsity = sae_lens().SAE.from_pretrained_with_cfg_and_sparsity("me/cc", "sae_lens")
    torch.testing.assert_close(sparsity, (frequency + 1e-10).log10())
    assert sae.cfg.metadata.crosscoder["n_models"] == 2
    assert hub.repositories["me/cc"].head.files["sae_lens/sparsity.safetensors"]
    assert torch.equal(load("me/cc").W_dec, small_crosscoder().W_dec)
    assert torch.equal(load("me/cc:sae_lens").W_dec.flatten(1), sae.W_dec)


@pytest.mark.allow_hosts(["127.0.0.1", "::1"])
@pytest.mark.parametrize("norm", ["CROSSCODER", "SAE"])
def test_sae_lens_reads_a_crosscoder_of_another_tool_through_our_converter(hub, tmp_path, norm):
    """Of dictionary_learning, on the Hub: the source's own formula, in float64."""
    written = dictionary_learning(tmp_path / "a", norm=norm, config={"trainer": {"layer": 7}})
    hub.add("them/cc", {path.name: path.read_bytes() for path in written.path.iterdir()})
    from_pretrained = sae_lens().SAE.from_pretrained
    sae = from_pretrained("them/cc", ".", dtype="float64", converter=sae_lens_converter)
    assert type(sae).__module__.startswith("sae_lens.")
    assert (sae.cfg.metadata.hook_name, sae.dtype) == ("blocks.7.hook_resid_post", torch.float64)
    x = torch.randn(40, 2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(8))
    acts, recon = written.formula(x)
    torch.testing.assert_close(sae.encode(x.flatten(1)), acts, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(sae(x.flatten(1)).unflatten(1, (2, -1)), recon, atol=1e-10, rtol=1e-10)
    assert 0.02 < (acts > 0).double().mean() < 0.98
    rounded = from_pretrained("them/cc", ".", converter=sae_lens_converter)
    assert {p.dtype for p in rounded.parameters()} == {torch.float32}
    torch.testing.assert_close(rounded.W_dec, sae.W_dec.float(), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="force_download"):
        from_pretrained("them/cc", ".", converter=sae_lens_converter, force_download=True)
