"""SAEs of SAE-Lens on tiny models: one model's half, both models run as one, and what must not pass without a word."""

import copy
import logging
import warnings

import pytest
import torch

from tests.hub.sae_lens_cases import NEEDS_SAE_LENS, sae_lens
from tests.models.tiny_models import bridged, hooked, tiny_llama_model, word_tokenizer
from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.dictionary.normalizer import Normalizer
from tl_crosscoder.dictionary.sparsity import BatchTopK, TopK
from tl_crosscoder.errors import HookNotFound, ShapeMismatch
from tl_crosscoder.hub.sae_lens.convert import from_sae_lens, to_sae_lens
from tl_crosscoder.hub.sae_lens.joint import joint
from tl_crosscoder.hub.sae_lens.views import as_sae, paired
from tl_crosscoder.models.backends import HookBackend
from tl_crosscoder.models.pair import ModelPair

pytestmark = [
    NEEDS_SAE_LENS,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # HookedTransformer tells of its end
]
HOOK = "blocks.1.hook_resid_pre"
LIBRARIES = ["hooked", "bridge"]


def models():
    """Base and a fine-tune of it, as transformers models."""
    base, tuned = tiny_llama_model(0), tiny_llama_model(0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in tuned.parameters():
            weight += 0.05 * torch.randn(weight.shape, generator=generator)
    return base, tuned


def seen(library, model):
    """The model in SAE-Lens' class, which attaches SAEs."""
    sae_lens()
    from sae_lens import HookedSAETransformer
    from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge

    if library == "hooked":
        plain = hooked(model)
        made = HookedSAETransformer(plain.cfg)
        made.load_state_dict(plain.state_dict())
        return made.eval()
    made = bridged(model)
    made.__class__ = SAETransformerBridge  # as its own loader does
    made._acts_to_saes, made._transcoder_output_hooks = {}, {}
    return made


def crosscoder(sparsity=None, d_sae=24):
    generator = torch.Generator().manual_seed(3)
    normalizer = Normalizer(0.1 * torch.randn(2, 16, generator=generator), torch.tensor([3.0, 2.0]))
    made = Crosscoder(16, d_sae, sparsity or BatchTopK(4), normalizer=normalizer).eval()
    with torch.no_grad():
        for parameter in (made.W_enc_rows, made.W_dec):
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    if isinstance(made.sparsity, BatchTopK):
        made.sparsity.threshold.fill_(0.5)
    return made


TOKENS = torch.randint(3, 61, (2, 7), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=LIBRARIES)
def run(request):
    """(base, tuned) in one library, their activations at the hook [seq pos model d_in], and what the tuned one says."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base, tuned = (seen(request.param, model) for model in models())
        pair = ModelPair(*(HookBackend(model) for model in models()), hook=HOOK)
        x = pair.capture(TOKENS)
        with torch.no_grad():
            return base, tuned, x, tuned(TOKENS)


def always(acts):
    """The edit that puts these activations there."""
    return lambda _, hook=None: acts  # noqa: ARG005


def splice(acts):
    """The tuned model's logits with these activations at the hook, by plain torch hooks."""
    return ModelPair(*(HookBackend(model) for model in models()), hook=HOOK).run(TOKENS, always(acts))


@pytest.mark.parametrize("sparsity", [lambda: BatchTopK(4), lambda: TopK(4)])
def test_the_paired_half_reads_both_models_and_writes_one(run, sparsity):
    """Codes are the crosscoder's, the run is the one with its reconstruction spliced in."""
    _, tuned, x, plain = run
    cc = crosscoder(sparsity())
    sae = paired(cc, 1, hook=HOOK)
    codes = cc.encode(x.flatten(0, 1)).unflatten(0, (2, 7))
    weight = cc.selection_norms() if isinstance(cc.sparsity, TopK) else 1
    with sae.bound(x[:, :, 0]), torch.no_grad():
        logits, cache = tuned.run_with_cache_with_saes(TOKENS, saes=[sae])
        kept = tuned.run_with_saes(TOKENS, saes=[sae], use_error_term=True)
    recon = cc(x.flatten(0, 1)).recon.unflatten(0, (2, 7))[:, :, 1].detach()
    torch.testing.assert_close(logits, splice(recon), atol=1e-5, rtol=1e-5)
    assert (logits - plain).abs().max() > 0.1
    torch.testing.assert_close(kept, plain, atol=1e-5, rtol=1e-5)
    [acts] = [value for key, value in cache.items() if key.endswith("hook_sae_acts_post")]
    torch.testing.assert_close(acts, codes.detach() * weight, atol=1e-5, rtol=1e-5)
    assert 0 < (acts > 0).float().mean() < 0.9
    assert not tuned.acts_to_saes


def test_ablating_a_latent_of_the_paired_half_takes_away_what_it_writes(run):
    _, tuned, x, _ = run
    cc = crosscoder()
    sae = paired(cc, 1, hook=HOOK)
    codes = cc.encode(x.flatten(0, 1)).detach()
    j = int(codes.sum(0).argmax())

    def ablate(acts, hook):  # noqa: ARG001
        acts[..., j] = 0
        return acts

    sae.add_hook("hook_sae_acts_post", ablate)
    with sae.bound(x[:, :, 0]), torch.no_grad():
        ablated = tuned.run_with_saes(TOKENS, saes=[sae], use_error_term=True)
    written = codes[:, j, None] * cc.raw_rows()[j, 1].detach()
    expected = splice(x[:, :, 1] - written.unflatten(0, (2, 7)))
    torch.testing.assert_close(ablated, expected, atol=1e-5, rtol=1e-5)
    assert written.norm() > 0.1


def test_a_half_that_was_not_told_the_other_model_or_told_other_tokens_raises(run, tmp_path):
    _, tuned, x, plain = run
    sae = paired(crosscoder(), 1, hook=HOOK)
    with pytest.raises(RuntimeError, match=r"with sae\.bound\(other_acts\)"):
        tuned.run_with_saes(TOKENS, saes=[sae])
    with (
        pytest.raises(ShapeMismatch, match=r"\[2, 7, 16\] of this model and \[2, 6, 16\]"),
        sae.bound(x[:, 1:, 0]),
    ):
        tuned.run_with_saes(TOKENS, saes=[sae])
    with pytest.raises(ValueError, match="half of a crosscoder"):
        sae.save_model(tmp_path / "c")
    assert not (tmp_path / "c").exists()
    with torch.no_grad():
        assert torch.equal(tuned(TOKENS), plain)
    assert not tuned.acts_to_saes


def test_a_half_at_a_hook_that_the_model_does_not_have_is_not_skipped_in_silence(run):
    _, tuned, x, _ = run
    sae = paired(crosscoder(), 1, hook="blocks.1.hook_resid_prae")
    with pytest.raises(HookNotFound, match="nothing ran this SAE"), sae.bound(x[:, :, 0]):
        tuned.run_with_saes(TOKENS, saes=[sae])


@pytest.mark.parametrize("hook", [HOOK, "blocks.1.hook_resid_prae", None])
def test_the_whole_crosscoder_cannot_be_attached_to_one_model(run, hook, caplog):
    """With a hook that it does not have, SAE-Lens would log a line and run the plain model."""
    _, tuned, _, plain = run
    sae = to_sae_lens(crosscoder(), hook=HOOK)
    sae.cfg.metadata.hook_name = hook
    with caplog.at_level(logging.WARNING):
        for attach in (tuned.run_with_saes, tuned.run_with_cache_with_saes):
            with pytest.raises(ValueError, match="reads the activations of two models side by side"):
                attach(TOKENS, saes=[sae])
    with torch.no_grad():
        assert torch.equal(tuned(TOKENS), plain)
    assert not tuned.acts_to_saes
    with pytest.raises(ValueError, match="two models"):
        tuned.add_sae(copy.deepcopy(sae))


def test_a_half_works_in_an_nnsight_trace():
    nnsight = pytest.importorskip("nnsight")
    base, tuned = models()
    cc = crosscoder()
    sae = paired(cc, 1, hook=HOOK)
    pair = ModelPair(HookBackend(base), HookBackend(copy.deepcopy(tuned)), hook="blocks.0.hook_resid_post")
    x = pair.capture(TOKENS)
    traced = nnsight.NNsight(tuned)
    with sae.bound(x[:, :, 0]), torch.no_grad(), traced.trace(TOKENS):
        layer = traced.model.layers[0].output
        traced.model.layers[0].output = sae(layer)
        logits = traced.output.logits.save()
    recon = cc(x.flatten(0, 1)).recon.unflatten(0, (2, 7))[:, :, 1].detach()
    expected = pair.run(TOKENS, always(recon))
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


# approximations


def affine(n=400, noise=0.0):
    """Activations in which the base model's are an affine function of the tuned model's."""
    generator = torch.Generator().manual_seed(5)
    tuned = torch.randn(n, 16, generator=generator)
    A, c = torch.randn(16, 16, generator=generator) / 4, torch.randn(16, generator=generator)
    base = tuned @ A + c + noise * torch.randn(n, 16, generator=generator)
    return torch.stack([base, tuned], dim=1)


def approximate(cc, x, encoder):
    with pytest.warns(UserWarning, match=rf"an approximation.*\({encoder}\).*held-out tokens"):
        sae = as_sae(cc, 1, [x], encoder=encoder, hook=HOOK, extra={"tuned": "gpt2-chat"})
    return sae, sae.cfg.metadata.crosscoder_view


def test_a_copied_encoder_is_exact_where_nothing_changed_and_a_linear_one_where_the_change_is_affine():
    cc = crosscoder()
    x = affine()
    same = x[:, [1, 1]]
    sae, view = approximate(cc, same, "copy")
    torch.testing.assert_close(sae.encode(same[:, 1]), cc.encode(same), atol=1e-4, rtol=1e-4)
    assert view["relative_error"] < 1e-5
    assert view["jaccard"] == 1
    sae, view = approximate(cc, x, "linear")
    torch.testing.assert_close(sae.encode(x[:, 1]), cc.encode(x), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(sae(x[:, 1]), cc(x).recon[:, 1], atol=1e-4, rtol=1e-4)
    assert view["relative_error"] < 1e-5
    assert view["fve"] == pytest.approx(view["fve_crosscoder"])


def test_the_fidelity_of_an_approximation_is_measured_on_tokens_that_it_was_not_fitted_to():
    """By hand, on the second half of the one batch; and in the order linear, copy."""
    cc, x = crosscoder(), affine(noise=0.3)
    found = {encoder: approximate(cc, x, encoder) for encoder in ("linear", "copy", "mean")}
    for sae, view in found.values():
        held_out = x[200:]
        exact, codes = cc.encode(held_out).detach(), sae.encode(held_out[:, 1]).detach()
        error = (codes - exact).norm() / exact.norm()
        both = ((codes > 0) & (exact > 0)).sum() / ((codes > 0) | (exact > 0)).sum()
        assert view["relative_error"] == pytest.approx(error.item(), rel=1e-3)
        assert view["jaccard"] == pytest.approx(both.item(), rel=1e-3)
        assert view["l0"] == pytest.approx((codes > 0).sum(1).float().mean().item())
        assert view["tokens"] == 200
    assert found["linear"][1]["relative_error"] < found["copy"][1]["relative_error"]


def test_an_approximation_says_what_it_is_wherever_it_goes(tmp_path):
    sae, view = approximate(crosscoder(), affine(), "copy")
    sae.save_model(tmp_path / "c")
    loaded = sae_lens().SAE.load_from_disk(tmp_path / "c")
    assert type(loaded).__module__.startswith("sae_lens.")
    assert loaded.cfg.metadata.crosscoder_view == {**view, "model": 1, "encoder": "copy"}
    assert (loaded.cfg.metadata.hook_name, loaded.cfg.metadata.model_name) == (HOOK, "gpt2-chat")
    # nobody may take it for the crosscoder
    with pytest.raises(ValueError, match="does not say of how many models"):
        from_sae_lens(loaded)
    x = affine()[:, 1]
    assert torch.equal(loaded(x), sae(x))


def test_an_approximation_is_asked_for_by_name():
    with pytest.raises(TypeError, match="encoder"):
        as_sae(crosscoder(), 1, [affine()], hook=HOOK)
    with pytest.raises(ValueError, match=r"16 numbers wants more tokens than that to fit, got 10"):
        as_sae(crosscoder(), 1, [affine(20)], encoder="linear", hook=HOOK)


# both models run as one


@pytest.fixture(scope="module", params=["plain", *LIBRARIES])
def two(request):
    """The pair in one library."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pick = (lambda model: model) if request.param == "plain" else (lambda m: seen(request.param, m))
        base, tuned = (pick(model) for model in models())
        return ModelPair(base, tuned, hook=HOOK, tokenizer=word_tokenizer())


@pytest.mark.parametrize("out", [0, 1])
def test_two_models_run_as_one_say_what_one_of_them_says(two, out):
    together = joint(two, out)
    assert list(together.hook_dict) == [HOOK]
    side = ("base", "tuned")[out]
    plain = two.run(TOKENS, side=side)
    logits, cache = together.run_with_cache(TOKENS)
    torch.testing.assert_close(logits, plain, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(cache[HOOK], two.capture(TOKENS).flatten(2), atol=1e-5, rtol=1e-5)
    short = together.run_with_cache(TOKENS, stop_at_layer=2, prepend_bos=False)[1]
    torch.testing.assert_close(short[HOOK], cache[HOOK], atol=1e-5, rtol=1e-5)
    both, loss = together(TOKENS, return_type="both", loss_per_token=True)
    log_probs = both.log_softmax(-1)[:, :-1].gather(-1, TOKENS[:, 1:, None])[..., 0]
    torch.testing.assert_close(loss, -log_probs, atol=1e-5, rtol=1e-5)
    assert together(TOKENS, return_type="loss").item() == pytest.approx(-log_probs.mean().item(), rel=1e-5)


def test_running_two_models_as_one_renames_none_of_their_hooks(two):
    """As submodules they would be models.1.blocks...; and an SAE that was attached leaves none behind."""
    inner = [side.model for side in (two.base, two.tuned) if hasattr(side.model, "hook_dict")]
    before = [(list(model.hook_dict), list(model.run_with_cache(TOKENS)[1])) for model in inner]
    together = joint(two)
    together.run_with_saes(TOKENS, saes=[to_sae_lens(crosscoder(), hook=HOOK)])
    after = [(list(model.hook_dict), list(model.run_with_cache(TOKENS)[1])) for model in inner]
    assert after == before
    assert not list(together.parameters())


def test_both_models_run_as_one_leave_out_the_tokens_that_they_are_told_to(two):
    """SAE-Lens' bridge takes the argument and does nothing with it."""
    together, cc = joint(two), crosscoder()
    x, ids = two.capture(TOKENS), TOKENS[0, [1, 4]].tolist()
    recon = cc(x.flatten(0, 1)).recon.unflatten(0, (2, 7)).detach()
    out = torch.isin(TOKENS, torch.tensor(ids))
    logits = together.run_with_saes(TOKENS, saes=[to_sae_lens(cc, hook=HOOK)], exclude_special_tokens=ids)
    expected = two.run(TOKENS, always(x[:, :, 1].where(out[..., None], recon[:, :, 1])))
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    assert (logits - two.run(TOKENS, always(recon[:, :, 1]))).abs().max() > 0.1


def test_the_crosscoder_attaches_exactly_to_both_models_run_as_one(two):
    together, cc = joint(two), crosscoder()
    sae = to_sae_lens(cc, hook=HOOK)
    x = two.capture(TOKENS)
    recon = cc(x.flatten(0, 1)).recon.unflatten(0, (2, 7)).detach()
    plain = two.run(TOKENS)
    logits, cache = together.run_with_cache_with_saes(TOKENS, saes=[sae])
    expected = two.run(TOKENS, always(recon[:, :, 1]))
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    codes = cc.encode(x.flatten(0, 1)).unflatten(0, (2, 7)).detach()
    torch.testing.assert_close(cache[f"{HOOK}.hook_sae_acts_post"], codes, atol=1e-4, rtol=1e-4)
    kept = together.run_with_saes(TOKENS, saes=[sae], use_error_term=True)
    torch.testing.assert_close(kept, plain, atol=1e-4, rtol=1e-4)
    assert (logits - plain).abs().max() > 0.1
    assert not together.acts_to_saes
    torch.testing.assert_close(together(TOKENS), plain, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_sae_lens_evaluates_the_crosscoder_on_both_models_run_as_one(two):
    """A hook that never fires would give the ablation a perfect 0, as on the bridge of SAE-Lens where it goes by another name."""
    from sae_lens.evals import EvalConfig, run_evals
    from sae_lens.training.activation_scaler import ActivationScaler

    together, cc = joint(two), crosscoder()
    sae = to_sae_lens(cc, hook=HOOK, extra={"context_size": 8})
    store = store_of(together, sae)
    x = next(store)
    assert x.shape == (32, 32)
    assert store.get_activations(TOKENS).shape == (2, 7, 32)
    torch.testing.assert_close(store.get_activations(TOKENS), two.capture(TOKENS).flatten(2))
    config = EvalConfig(
        batch_size_prompts=4,
        n_eval_reconstruction_batches=2,
        n_eval_sparsity_variance_batches=2,
        compute_kl=True,
        compute_ce_loss=True,
        compute_l2_norms=True,
        compute_sparsity_metrics=True,
        compute_variance_metrics=True,
        compute_featurewise_density_statistics=True,
    )
    found, _ = run_evals(sae, store, together, ActivationScaler(), config)
    behaviour, sparsity = found["model_behavior_preservation"], found["sparsity"]
    assert behaviour["kl_div_with_ablation"] > 0.01
    assert behaviour["kl_div_with_sae"] > 0
    assert 0 < sparsity["l0"] < 24


def store_of(model, sae):
    """SAE-Lens' store on a data set of random tokens."""
    from datasets import Dataset
    from sae_lens import ActivationsStore

    rows = torch.randint(3, 61, (64, 8), generator=torch.Generator().manual_seed(2)).tolist()
    return ActivationsStore.from_sae(
        model,
        sae,
        Dataset.from_dict({"tokens": rows}),
        streaming=False,
        store_batch_size_prompts=4,
        n_batches_in_buffer=4,
        train_batch_size_tokens=32,
        total_tokens=64,
    )


def test_both_models_run_as_one_ask_for_what_they_know(two):
    together = joint(two)
    sae = to_sae_lens(crosscoder(), hook="blocks.1.hook_in")
    with pytest.raises(
        HookNotFound, match=r"set sae\.cfg\.metadata\.hook_name = 'blocks\.1\.hook_resid_pre'"
    ):
        together.run_with_saes(TOKENS, saes=[sae])
    with pytest.raises(ValueError, match="ids already"):
        together(TOKENS, prepend_bos=True)
    with pytest.raises(TypeError, match="past_kv_cache"):
        together(TOKENS, past_kv_cache=None)
    assert not together.acts_to_saes


def test_folding_the_norms_of_a_half_changes_no_reconstruction_and_is_refused_where_it_would():
    x = torch.randn(20, 2, 16, generator=torch.Generator().manual_seed(5))
    half = paired(crosscoder(), 1, hook=HOOK)
    with torch.no_grad(), half.bound(x[:, 0]):
        before = half.decode(half.encode(x[:, 1]))
        half.fold_W_dec_norm()
        torch.testing.assert_close(half.decode(half.encode(x[:, 1])), before, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(half.W_dec.norm(dim=-1), torch.ones(24))
    assert (before - half.b_dec).norm() > 0.1
    with pytest.raises(TypeError, match="which k latents are the largest"):
        paired(crosscoder(TopK(4)), 1, hook=HOOK).fold_W_dec_norm()
