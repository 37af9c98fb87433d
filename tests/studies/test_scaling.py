import json

import numpy as np
import pandas as pd
import pytest
import torch

from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.dictionary.sparsity import ReLU
from tl_crosscoder.figures import NotDrawn
from tl_crosscoder.studies import StudyResult
from tl_crosscoder.studies.scaling import latent_scaling_study
from tl_crosscoder.studies.scaling_ratios import _correlation, filtered, target_row
from tl_crosscoder.types import BASE, TUNED

SHARED, TRUE, SHRUNK = range(40), range(40, 50), range(50, 60)


@pytest.fixture(scope="module")
def planted():
    """Forty shared concepts, ten that the tuned model alone has, and ten that both have and the base decoder misses."""
    g = torch.Generator().manual_seed(0)
    d, n = 64, 4000
    crosscoder = Crosscoder(d, 60, ReLU())
    rows = torch.linalg.qr(torch.randn(d, d, generator=g)).Q[:60]
    codes = (0.5 + torch.rand(n, 60, generator=g)) * (torch.rand(n, 60, generator=g) < 0.1)
    base_codes = codes.clone()
    base_codes[:, list(TRUE)] = 0
    x = torch.stack([base_codes @ rows, codes @ rows], 1)
    x += 0.02 * torch.randn(x.shape, generator=g)
    with torch.no_grad():
        crosscoder.W_enc_rows.zero_()
        crosscoder.W_enc_rows[:, TUNED] = rows
        crosscoder.b_enc.fill_(-0.1)
        crosscoder.W_dec[:, TUNED] = rows
        crosscoder.W_dec[:, BASE] = rows
        crosscoder.W_dec[40:, BASE] = 0
    return crosscoder.eval(), x


def study(planted, **options):
    crosscoder, x = planted
    return latent_scaling_study(crosscoder, x.split(1000), progress=False, **options)


def test_true_calls_pass_the_gates_and_shrunken_ones_look_like_shared_latents(planted):
    result = study(planted)
    latents = result.latents.set_index("latent")
    assert latents.index[latents["called"]].tolist() == [*TRUE, *SHRUNK]
    assert latents.index[latents["specific"]].tolist() == list(TRUE)
    assert set(latents.index[latents["reference"]]) == set(SHARED)
    error = result.table.set_index("target").loc["error"]
    # shrinkage shows in the error alone: half of the called latents lie near the shared ones there
    assert latents.loc[list(SHRUNK), "nu_error"].between(0.95, 1.05).all()
    assert latents.loc[list(SHRUNK), "nu_recon"].abs().max() < 0.1
    assert 0.2 <= error["inside"] <= 0.5 and error["inside_low"] < error["inside"] < error["inside_high"]
    assert result.counts["called_specific"] == 10 and "10 pass both gates" in result.verdict


def test_truly_absent_latents_rank_lowest_then_those_the_reconstruction_misses_then_the_shared(planted):
    # shrunken ones are absent from the base reconstruction too: only the error's rank tells them from the true ones
    ranks = study(planted).latents.set_index("latent")["rank_sum"]
    true, shrunk, shared = (ranks[list(part)].median() for part in (TRUE, SHRUNK, SHARED))
    assert true < shrunk < shared


def test_the_norms_go_with_the_ratios_as_far_as_they_are_right(planted):
    table = study(planted).table.set_index("target")
    assert table.loc["recon", "pearson"] < -0.95  # the base decoder of all twenty is missing
    assert -0.95 < table.loc["error", "pearson"] < -0.4  # ten of them are artefacts
    assert (
        table.loc["error", "pearson_low"] < table.loc["error", "pearson"] < table.loc["error", "pearson_high"]
    )


def test_directions_that_are_not_theirs_are_no_evidence(planted):
    controls = study(planted).controls.set_index("directions")
    assert set(controls.index) == {"random", "other latents'"}
    assert (controls["latents"] == 20).all()
    assert (controls["specific"] < 0.2).all()


def test_the_base_probe_asks_the_mirrored_question(planted):
    crosscoder, x = planted
    swapped = Crosscoder(64, 60, ReLU())
    with torch.no_grad():
        for mine, its in ((swapped.W_dec, crosscoder.W_dec), (swapped.W_enc_rows, crosscoder.W_enc_rows)):
            mine.copy_(its.flip(1))
        swapped.b_enc.copy_(crosscoder.b_enc)
    there, here = study((swapped.eval(), x.flip(1)), probe="base"), study(planted)
    pd.testing.assert_series_equal(there.latents["nu_error"], here.latents["nu_error"], rtol=1e-4)
    assert there.latents["called"].equals(here.latents["called"])
    assert "base-only" in there.verdict


def test_without_a_call_by_the_norms_those_that_lean_most_stand_in_and_it_says_so(planted):
    crosscoder, x = planted
    alike = Crosscoder(64, 60, ReLU())
    with torch.no_grad():
        for name, value in crosscoder.named_parameters():
            alike.get_parameter(name).copy_(value)
        alike.W_dec[40:, BASE] = 0.6 * alike.W_dec[40:, TUNED]
    result = latent_scaling_study(alike.eval(), [x], n_top=5, progress=False)
    assert result.latents["called"].sum() == 5
    assert "none is tuned-only by its norms" in result.verdict


def test_latents_of_ones_own_choice_may_be_asked_about(planted):
    result = study(planted, calls=[0, 41])
    assert result.latents.loc[result.latents["called"], "latent"].tolist() == [0, 41]
    with pytest.raises(IndexError, match="99"):
        study(planted, calls=[99])


def test_too_few_firings_give_nan_and_a_count_and_no_number(planted):
    result = study(planted, least=10**6)
    assert result.counts["dropped"] == {"too few firings": 60} and result.counts["called_kept"] == 0
    assert result.table[["inside", "pearson", "called_median"]].isna().all(axis=None)
    assert "says nothing" in result.verdict
    with pytest.raises(NotDrawn):
        result.plot()


def test_the_filters_name_the_first_reason():
    frame = pd.DataFrame(
        {
            "n_fired": [99, 100, 100, 100, 100, 100],
            "nu_error": [0.1, np.nan, 0.1, 0.1, 2.01, 0.1],
            "nu_recon": [0.4, 0.4, 0.4, -0.11, 0.4, 0.6],
            "probed": ["tuned", "tuned", "base", "tuned", "tuned", "base"],
            "beta_error_tuned": [1.0, 1, 1, 1, 1, -1],
            "beta_recon_tuned": 1.0,
            "beta_error_base": [1.0, 1, -1, 1, 1, 1],
            "beta_recon_base": 1.0,
        }
    )
    got = filtered(frame, 100)
    reasons = ["too few firings", "undefined", "negative beta", "out of range", "out of range", ""]
    assert got["dropped"].tolist() == reasons
    assert got["rank_sum"].dropna().tolist() == [2.0]  # first in both
    assert not got["specific"].any()


def test_a_negative_ratio_beyond_the_gate_is_no_sign_of_absence():
    frame = pd.DataFrame({"n_fired": [100, 100], "nu_error": [-0.05, 0.3], "nu_recon": [0.0, 0.0]})
    betas = {f"beta_{target}_tuned": 1.0 for target in ("error", "recon")}
    betas |= {f"beta_{target}_base": 0.1 for target in ("error", "recon")}
    assert filtered(frame.assign(probed="tuned", **betas), 1)["specific"].tolist() == [True, False]


def test_the_shared_range_and_the_share_inside_are_those_of_the_definition():
    shared = np.linspace(0.9, 1.1, 41)  # middle 95 %: one at either end of 41 is outside
    frame = pd.DataFrame(
        {
            "nu_error": [*shared, 0.9, 0.905, 1.0, 2.0],
            "dropped": "",
            "delta_norm": 0.5,
            "called": [False] * 41 + [True] * 4,
            "reference": [True] * 41 + [False] * 4,
        }
    )
    row = target_row(frame, "error")
    assert (row["shared_low"], row["shared_high"]) == pytest.approx((0.905, 1.095))
    assert row["inside"] == 0.5 and row["shared"] == 41 and row["called"] == 4
    assert np.isnan(row["pearson"])  # delta_norm does not vary


def test_correlations_without_data_are_nan():
    values = pd.Series([1.0, 2, 3])
    assert np.isnan(_correlation(values, values)["pearson"])


def test_the_result_is_read_back_and_draws_the_same(planted):
    result = study(planted)
    back = StudyResult.from_dict(json.loads(result.to_json()))
    assert back.verdict == result.verdict
    assert back.plot().svg() == result.plot().svg()


def test_the_same_seed_draws_the_same_sample_and_controls(planted):
    one, two = study(planted, seed=3), study(planted, seed=3)
    assert one.to_json() == two.to_json()
