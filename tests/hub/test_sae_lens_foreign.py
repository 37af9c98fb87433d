"""SAEs that SAE-Lens itself made, on the activations of two models side by side, as crosscoders of this library."""

import pytest
import torch

from tests.hub.sae_lens_cases import HOOK, NEEDS_SAE_LENS, acts, made, sae_lens
from tl_crosscoder.dictionary.sparsity import JumpReLU, ReLU, TopK
from tl_crosscoder.hub.sae_lens.convert import from_sae_lens, to_sae_lens
from tl_crosscoder.hub.sae_lens.views import paired

pytestmark = [NEEDS_SAE_LENS, pytest.mark.filterwarnings("ignore")]
D, F, K = 10, 12, 3


def foreign(architecture, **settings):
    """An SAE of SAE-Lens in float64 with random weights, and thresholds on both sides of 0."""
    lens = sae_lens()
    kinds = {
        "standard": (lens.StandardSAE, lens.StandardSAEConfig),
        "jumprelu": (lens.JumpReLUSAE, lens.JumpReLUSAEConfig),
        "topk": (lens.TopKSAE, lens.TopKSAEConfig),
        "gated": (lens.GatedSAE, lens.GatedSAEConfig),
        "transcoder": (lens.Transcoder, lens.TranscoderConfig),
        "batchtopk": (lens.BatchTopKTrainingSAE, lens.BatchTopKTrainingSAEConfig),
    }
    kind, config = kinds[architecture]
    sae = kind(config(d_in=D, d_sae=F, dtype="float64", **settings))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return sae


def by_hand(sae, x):
    """What it computes, one token and one latent after the other, from its weights and its settings."""
    W_enc, b_enc, W_dec, b_dec = (
        getattr(sae, name).detach().tolist() for name in ("W_enc", "b_enc", "W_dec", "b_dec")
    )
    norms = [sum(w * w for w in row) ** 0.5 for row in W_dec]
    rescaled, k = getattr(sae.cfg, "rescale_acts_by_decoder_norm", False), getattr(sae.cfg, "k", F)
    thresholds = sae.threshold.tolist() if hasattr(sae, "threshold") else [0.0] * F
    codes, recons = [], []
    for row in x.flatten(1).tolist():
        read = [v - b if sae.cfg.apply_b_dec_to_input else v for v, b in zip(row, b_dec, strict=True)]
        p = [sum(read[i] * W_enc[i][j] for i in range(D)) + b_enc[j] for j in range(F)]
        p = [v * n for v, n in zip(p, norms, strict=True)] if rescaled else p
        kth = sorted(p)[-k]
        f = [v if v >= kth and v > max(0.0, t) else 0.0 for v, t in zip(p, thresholds, strict=True)]
        g = [v / n for v, n in zip(f, norms, strict=True)] if rescaled else f
        codes.append(f)
        recons.append([sum(g[j] * W_dec[j][i] for j in range(F)) + b_dec[i] for i in range(D)])
    made = (torch.tensor(rows, dtype=torch.float64) for rows in (codes, recons))
    return next(made), next(made).unflatten(1, (2, -1))


CASES = {
    "standard": ("standard", {}, ReLU),
    "jumprelu": ("jumprelu", {}, JumpReLU),
    "topk": ("topk", {"k": K}, TopK),
    "topk, ranked by norm": ("topk", {"k": K, "rescale_acts_by_decoder_norm": True}, TopK),
}


@pytest.mark.parametrize("subtracts", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_a_crosscoder_computes_what_the_sae_does(case, subtracts):
    architecture, settings, sparsity = CASES[case]
    sae = foreign(architecture, apply_b_dec_to_input=subtracts, **settings)
    x = acts(30, dtype=torch.float64) / 3
    codes, recon = by_hand(sae, x)
    before = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    # the reference is that of SAE-Lens
    torch.testing.assert_close(sae.encode(x.flatten(1)), codes, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(sae(x.flatten(1)).unflatten(1, (2, -1)), recon, atol=1e-10, rtol=1e-10)
    crosscoder = from_sae_lens(sae, n_models=2)
    assert (crosscoder.n_models, crosscoder.d_in, type(crosscoder.sparsity)) == (2, D // 2, sparsity)
    torch.testing.assert_close(crosscoder.encode(x), codes, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(crosscoder(x).recon, recon, atol=1e-10, rtol=1e-10)
    assert 0.1 < (codes > 0).double().mean() < 0.9
    with torch.no_grad():
        crosscoder.W_dec.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in sae.state_dict().items())
    one = from_sae_lens(sae, n_models=1)
    torch.testing.assert_close(one(x.flatten(1)[:, None]).recon.view_as(recon), recon, atol=1e-10, rtol=1e-10)


def test_what_sae_lens_trains_itself_comes_over_once_exported(tmp_path):
    sae = foreign("batchtopk", k=2.0)
    sae.topk_threshold.fill_(1.5)
    with pytest.raises(
        ValueError, match=r"BatchTopKTrainingSAE \(batchtopk\).*of one in training: save_inference_model"
    ):
        from_sae_lens(sae, n_models=2)
    sae.save_inference_model(tmp_path / "c")
    plain, x = sae_lens().SAE.load_from_disk(tmp_path / "c"), acts(30, dtype=torch.float64)
    crosscoder = from_sae_lens(plain, n_models=2)
    p = x.flatten(1) @ sae.W_enc + sae.b_enc - sae.b_dec @ sae.W_enc
    norms = sae.W_dec.norm(dim=-1)
    codes = (p * norms).where(p * norms > 1.5, 0).detach()
    torch.testing.assert_close(crosscoder.encode(x), codes, atol=1e-9, rtol=1e-9)
    recon = (codes / norms) @ sae.W_dec + sae.b_dec
    torch.testing.assert_close(crosscoder(x).recon.flatten(1), recon, atol=1e-9, rtol=1e-9)


def test_a_scale_or_a_whitening_comes_over_once_it_is_folded_as_the_refusal_says():
    x, matrix = acts(30, dtype=torch.float64), torch.eye(D, dtype=torch.float64) * 2
    matrix[0, 7] = 1
    for name, fold in {
        "expected_average_only_in": lambda sae: sae.fold_activation_norm_scaling_factor(0.25),
        "covariance_whitening": lambda sae: sae.fold_activation_whitening(
            torch.ones(D, dtype=torch.float64), matrix, matrix.inverse()
        ),
    }.items():
        sae = foreign("jumprelu", normalize_activations=name)
        with pytest.raises(
            ValueError, match=rf"normalize_activations='{name}', wanted 'none'; fold the .*: sae\.fold_"
        ):
            from_sae_lens(sae, n_models=2)
        fold(sae)
        folded = from_sae_lens(sae, n_models=2)
        torch.testing.assert_close(folded(x).recon.flatten(1), sae(x.flatten(1)), atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(folded.encode(x), by_hand(sae, x)[0], atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("how", ["layer_norm", "constant_norm_rescale"])
def test_a_norm_of_each_token_is_no_crosscoders_and_is_done_before(how):
    sae, x = foreign("standard", normalize_activations=how), acts(30, dtype=torch.float64).flatten(1)
    with pytest.raises(ValueError, match=rf"'{how}', wanted 'none'; each token is scaled by itself"):
        from_sae_lens(sae, n_models=2)
    mean = x.mean(-1, keepdim=True) if how == "layer_norm" else 0
    size = x.std(-1, keepdim=True) + 1e-5 if how == "layer_norm" else x.norm(dim=-1, keepdim=True) / D**0.5
    recon = sae(x)
    sae.cfg.normalize_activations = "none"
    y = ((x - mean) / size).unflatten(1, (2, -1))
    ours = from_sae_lens(sae, n_models=2)(y).recon.flatten(1) * size + mean
    torch.testing.assert_close(
        ours, recon, atol=1e-4, rtol=1e-4
    )  # theirs leaves the 1e-5 out on the way back


def test_an_sae_that_reads_heads_comes_over_once_it_reads_flat_activations():
    from sae_lens.saes.sae import SAEMetadata

    metadata = SAEMetadata(hook_name="blocks.0.attn.hook_z")
    sae, x = (
        foreign("standard", reshape_activations="hook_z", metadata=metadata),
        acts(30, dtype=torch.float64),
    )
    by_head = sae(x)  # [batch heads d_head]
    with pytest.raises(
        ValueError, match=r"'hook_z', wanted 'none'; sae\.turn_off_forward_pass_hook_z_reshaping"
    ):
        from_sae_lens(sae, n_models=2)
    sae.turn_off_forward_pass_hook_z_reshaping()
    sae.cfg.reshape_activations = "none"
    torch.testing.assert_close(from_sae_lens(sae, n_models=2)(x).recon, by_head, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("architecture", ["gated", "transcoder"])
def test_other_architectures_are_refused_by_name(architecture):
    settings = {"d_out": D, "apply_b_dec_to_input": False} if architecture == "transcoder" else {}
    with pytest.raises(
        ValueError, match=rf"\({architecture}\) has no counterpart here; wanted an inference SAE"
    ):
        from_sae_lens(foreign(architecture, **settings), n_models=2)


def test_a_half_of_a_crosscoder_is_no_whole():
    with pytest.raises(ValueError, match="a PairedSAE also has W_enc_other"):
        from_sae_lens(paired(made(), 1, hook=HOOK), n_models=1)


def test_how_many_models_an_sae_is_of_must_be_told_and_be_right():
    sae = foreign("standard")
    with pytest.raises(ValueError, match=r"pass n_models=2 if they are base and tuned side by side"):
        from_sae_lens(sae)
    with pytest.raises(ValueError, match="d_in=10 is not one of 3 models of equal width"):
        from_sae_lens(sae, n_models=3)
    with pytest.raises(ValueError, match="n_models=1, but this SAE says that it is of 2"):
        from_sae_lens(to_sae_lens(made(), hook=HOOK), n_models=1)
