import pytest
import torch

from tests.analysis.crosscoders import random_acts, random_crosscoder
from tl_crosscoder.analysis.base import run
from tl_crosscoder.analysis.latent_scaling import TARGETS, LatentScaling, latent_scaling
from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.dictionary.sparsity import ReLU
from tl_crosscoder.types import BASE, TUNED


def naive(crosscoder, x, direction=None):
    """The definition, latent by latent, by least squares on the stacked target."""
    f = crosscoder.encode(x)
    target = crosscoder.normalizer.normalise(x)
    estimate = crosscoder.normalizer.normalise(crosscoder.decode(f))
    out = {}
    for j in range(crosscoder.d_sae):
        d = crosscoder.W_dec[j, TUNED] if direction is None else direction[j]
        design = torch.outer(f[:, j], d).flatten()[:, None]
        for side, m in (("base", BASE), ("tuned", TUNED)):
            own = torch.outer(f[:, j], crosscoder.W_dec[j, m])
            targets = {
                "error": target[:, m] - (estimate[:, m] - own),
                "recon": estimate[:, m],
                "recon_no_bias": estimate[:, m] - crosscoder.b_dec[m],
                "act": target[:, m],
                "act_no_bias": target[:, m] - crosscoder.b_dec[m],
            }
            for name, y in targets.items():
                fired = bool((f[:, j] > 0).any())
                beta = (
                    torch.linalg.lstsq(design, y.flatten()[:, None]).solution.item()
                    if fired
                    else float("nan")
                )
                out.setdefault(f"beta_{name}_{side}", []).append(beta)
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in out.items()}


def agree(got, want, ratio=("base", "tuned")):
    for name, values in want.items():
        torch.testing.assert_close(got[name], values, rtol=1e-9, atol=1e-9, equal_nan=True)
    for target in TARGETS:
        other, probed = (want[f"beta_{target}_{side}"] for side in ratio)
        torch.testing.assert_close(got[f"nu_{target}"], other / probed, rtol=1e-8, atol=1e-8, equal_nan=True)


@torch.no_grad()
def test_one_streaming_pass_equals_least_squares_latent_by_latent():
    crosscoder, x = random_crosscoder(dead=[4]), random_acts()
    agree(latent_scaling(crosscoder, [x]), naive(crosscoder, x))


@torch.no_grad()
def test_the_base_probe_equals_least_squares_along_the_base_decoder_with_tuned_over_base():
    crosscoder, x = random_crosscoder(dead=[4]), random_acts()
    want = naive(crosscoder, x, crosscoder.W_dec[:, BASE])
    agree(latent_scaling(crosscoder, [x], "base"), want, ("tuned", "base"))


@torch.no_grad()
def test_either_probe_is_that_of_each_latents_longer_decoder():
    crosscoder, x = random_crosscoder(), random_acts()
    analysis = LatentScaling(crosscoder, "either")
    run(crosscoder, [x], [analysis])
    norms = crosscoder.decoder_norms()
    longer = (norms[:, TUNED] >= norms[:, BASE]).long()
    assert torch.equal(analysis.probed(), longer) and 0 < longer.sum() < len(longer)
    own = [latent_scaling(crosscoder, [x], probe) for probe in ("base", "tuned")]
    for name, values in analysis.columns().items():
        want = torch.where(longer == TUNED, own[TUNED][name], own[BASE][name])
        torch.testing.assert_close(values, want, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_swapping_the_models_and_the_probe_leaves_every_ratio_as_it_was():
    crosscoder, x = random_crosscoder(), random_acts()
    before = latent_scaling(crosscoder, [x], "tuned")
    for weights in (crosscoder.W_dec, crosscoder.W_enc_rows):
        weights.copy_(weights.flip(1))
    for part in (crosscoder.b_dec, crosscoder.normalizer.mean, crosscoder.normalizer.scale):
        part.copy_(part.flip(0))
    after = latent_scaling(crosscoder, [x.flip(1)], "base")
    for target in TARGETS:
        torch.testing.assert_close(after[f"nu_{target}"], before[f"nu_{target}"], rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_directions_of_ones_own_stand_in_for_the_decoder():
    crosscoder, x = random_crosscoder(), random_acts()
    directions = torch.randn(11, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(8))
    analysis = LatentScaling(crosscoder, directions=directions)
    run(crosscoder, [x], [analysis])
    agree(analysis.columns(), naive(crosscoder, x, directions))


@torch.no_grad()
@pytest.mark.parametrize("target", ["act", "error"])
def test_planted_betas_are_found_to_five_digits(target):
    # y = Σ beta_j f_j d_j + noise off all d_j, d_j orthogonal, a tenth of the codes active, beta ~ 5 N(0, 1)
    g = torch.Generator().manual_seed(0)
    d_in, d_sae, n = 24, 16, 2000
    basis = torch.linalg.qr(torch.randn(d_in, d_in, generator=g, dtype=torch.float64)).Q
    rows = basis[:d_sae] * (0.5 + torch.rand(d_sae, 1, generator=g, dtype=torch.float64))
    codes = torch.rand(n, d_sae, generator=g, dtype=torch.float64) + 0.1
    codes *= torch.rand(n, d_sae, generator=g) < 0.1
    beta = 5 * torch.randn(d_sae, generator=g, dtype=torch.float64)
    noise = torch.randn(n, d_in - d_sae, generator=g, dtype=torch.float64) @ basis[d_sae:]
    crosscoder = Crosscoder(d_in, d_sae, ReLU()).double()
    crosscoder.W_enc_rows.zero_()
    crosscoder.W_enc_rows[:, TUNED] = rows / rows.square().sum(
        1, keepdim=True
    )  # reads the codes off the tuned model
    crosscoder.W_dec[:, TUNED] = rows
    crosscoder.W_dec[:, BASE] = 0  # so that the base model's error is its activation
    x = torch.stack([(beta * codes) @ rows + noise, codes @ rows], 1)
    columns = latent_scaling(crosscoder, x.split(300))
    torch.testing.assert_close(columns[f"beta_{target}_base"], beta, rtol=1e-5, atol=0)
    torch.testing.assert_close(columns[f"nu_{target}"], beta, rtol=1e-5, atol=0)


@torch.no_grad()
def test_error_with_the_own_part_put_back_equals_the_tensor_written_out():
    crosscoder, x = random_crosscoder(), random_acts()
    f, target = crosscoder.encode(x), crosscoder.normalizer.normalise(x)
    estimate = crosscoder.normalizer.normalise(crosscoder.decode(f))
    # y[j, i] = x_i − (x̂_i − f_ij d_j), all latents at once
    own = torch.einsum("nj,jmd->jnmd", f, crosscoder.W_dec)
    y = (target - estimate)[None] + own
    d = crosscoder.W_dec[:, TUNED]
    beta = torch.einsum("nj,jd,jnmd->jm", f, d, y) / (d.square().sum(1) * f.square().sum(0))[:, None]
    got = latent_scaling(crosscoder, [x])
    for side, m in (("base", BASE), ("tuned", TUNED)):
        torch.testing.assert_close(got[f"beta_error_{side}"], beta[:, m], rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_any_chunking_of_the_batches_gives_the_same_columns():
    crosscoder, x = random_crosscoder(), random_acts()
    whole = latent_scaling(crosscoder, [x])
    for size in (1, 7, 49):
        parts = latent_scaling(crosscoder, x.split(size))
        for name in whole:
            torch.testing.assert_close(parts[name], whole[name], rtol=1e-9, atol=1e-9, equal_nan=True)


@torch.no_grad()
def test_a_latent_that_never_fires_is_undefined_and_not_zero():
    columns = latent_scaling(random_crosscoder(dead=[2, 7]), [random_acts()])
    for name, values in columns.items():
        assert values[[2, 7]].isnan().all(), name
        assert not values[[0, 1]].isnan().any(), name


@torch.no_grad()
def test_exchanging_scale_between_code_and_decoder_leaves_nu_unchanged():
    crosscoder, x = random_crosscoder(), random_acts()
    before = latent_scaling(crosscoder, [x])
    factor = torch.rand(crosscoder.d_sae, dtype=torch.float64) + 0.5
    crosscoder.W_enc_rows *= factor[:, None, None]
    crosscoder.b_enc *= factor
    crosscoder.W_dec /= factor[:, None, None]
    after = latent_scaling(crosscoder, [x])
    for name in ("nu_error", "nu_recon"):
        torch.testing.assert_close(after[name], before[name], rtol=1e-8, atol=1e-8)


@torch.no_grad()
def test_folding_the_normaliser_leaves_every_column_unchanged():
    crosscoder, x = random_crosscoder(), random_acts()
    plain, folded = latent_scaling(crosscoder, [x]), latent_scaling(crosscoder.folded(), [x])
    for name in plain:
        torch.testing.assert_close(folded[name], plain[name], rtol=1e-8, atol=1e-8, equal_nan=True)


@torch.no_grad()
def test_identical_models_with_identical_decoders_scale_by_one():
    crosscoder = random_crosscoder(normalizer=False)
    crosscoder.W_dec[:, BASE] = crosscoder.W_dec[:, TUNED]
    crosscoder.b_dec[BASE] = crosscoder.b_dec[TUNED]
    x = random_acts()
    x[:, BASE] = x[:, TUNED]
    columns = latent_scaling(crosscoder, [x])
    for name in map("nu_{}".format, TARGETS):
        torch.testing.assert_close(columns[name], torch.ones(11, dtype=torch.float64), rtol=1e-9, atol=1e-9)


@pytest.fixture
def perfect():
    """Two orthogonal concepts read off exactly: concept 0 with base gain .3, concept 1 only in the tuned model."""
    crosscoder = Crosscoder(4, 2, ReLU()).double()
    with torch.no_grad():
        eye = torch.eye(4, dtype=torch.float64)
        crosscoder.W_enc_rows.zero_()
        crosscoder.W_enc_rows[:, TUNED] = eye[:2]  # read both concepts off the tuned model
        crosscoder.W_dec.zero_()
        crosscoder.W_dec[:, TUNED] = eye[:2]
        crosscoder.W_dec[0, BASE] = 0.3 * eye[0]
    return crosscoder.eval()


@torch.no_grad()
def test_nu_is_the_base_gain_of_a_perfectly_read_concept(perfect):
    codes = torch.rand(400, 2, dtype=torch.float64) * (torch.rand(400, 2) < 0.5)
    x = torch.zeros(400, 2, 4, dtype=torch.float64)
    x[:, TUNED, :2] = codes
    x[:, BASE, 0] = 0.3 * codes[:, 0]
    columns = latent_scaling(perfect, [x])
    for name in ("nu_error", "nu_recon"):
        torch.testing.assert_close(
            columns[name], torch.tensor([0.3, 0.0], dtype=torch.float64), atol=1e-9, rtol=0
        )


@torch.no_grad()
def test_complete_shrinkage_shows_in_the_error_and_decoupling_in_the_reconstruction(perfect):
    # shrinkage: the base has the concept at gain .3 and no decoder provides it, so it stays in the base error
    codes = torch.rand(400, 2, dtype=torch.float64)
    x = torch.zeros(400, 2, 4, dtype=torch.float64)
    x[:, TUNED, :2] = codes
    x[:, BASE, 0] = 0.3 * codes[:, 0]
    perfect.W_dec[0, BASE] = 0
    columns = latent_scaling(perfect, [x])
    assert columns["nu_error"][0] == pytest.approx(0.3, abs=1e-9)
    assert columns["nu_recon"][0] == pytest.approx(0.0, abs=1e-9)


@torch.no_grad()
def test_a_decoder_bias_inflates_nu_recon_and_the_no_bias_column_takes_it_out(perfect):
    codes = torch.full((100, 2), 0.01, dtype=torch.float64)  # weak activations: the bias dominates
    x = torch.zeros(100, 2, 4, dtype=torch.float64)
    x[:, TUNED, :2] = codes
    perfect.b_dec[BASE, 1] = 0.5
    columns = latent_scaling(perfect, [x])
    # beta_base = Σ f·0.5 / Σ f² = 0.5 / 0.01 = 50, beta_tuned = 1
    assert columns["nu_recon"][1] == pytest.approx(50.0)
    assert columns["nu_recon_no_bias"][1] == pytest.approx(0.0, abs=1e-9)
