import pytest
import torch

from tests.analysis.crosscoders import random_acts, random_crosscoder
from tl_crosscoder.analysis.latent_scaling import latent_scaling
from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.dictionary.sparsity import ReLU
from tl_crosscoder.types import BASE, TUNED


def naive(crosscoder, x):
    """The definition, latent by latent, by least squares on the stacked target."""
    f = crosscoder.encode(x)
    target = crosscoder.normalizer.normalise(x)
    estimate = crosscoder.normalizer.normalise(crosscoder.decode(f))
    out = {}
    for j in range(crosscoder.d_sae):
        d = crosscoder.W_dec[j, TUNED]
        design = torch.outer(f[:, j], d).flatten()[:, None]
        for side, m in (("base", BASE), ("tuned", TUNED)):
            own = torch.outer(f[:, j], crosscoder.W_dec[j, m])
            targets = {
                "error": target[:, m] - (estimate[:, m] - own),
                "recon": estimate[:, m],
                "recon_no_bias": estimate[:, m] - crosscoder.b_dec[m],
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


@torch.no_grad()
def test_one_streaming_pass_equals_least_squares_latent_by_latent():
    crosscoder, x = random_crosscoder(dead=[4]), random_acts()
    got, want = latent_scaling(crosscoder, [x]), naive(crosscoder, x)
    for name, values in want.items():
        torch.testing.assert_close(got[name], values, rtol=1e-9, atol=1e-9, equal_nan=True)
    for target in ("error", "recon", "recon_no_bias"):
        ratio = want[f"beta_{target}_base"] / want[f"beta_{target}_tuned"]
        torch.testing.assert_close(got[f"nu_{target}"], ratio, rtol=1e-8, atol=1e-8, equal_nan=True)


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
    for name in ("nu_error", "nu_recon", "nu_recon_no_bias"):
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
