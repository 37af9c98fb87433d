"""Known answers: Latent Scaling on crosscoders trained on planted differences."""

import pytest
import torch

from tl_crosscoder.analysis.table import latent_table

N = 20_000


def table_of(run):
    pair, crosscoder = run
    return latent_table(crosscoder, pair.sample(N, seed=7).x.split(4096))


def called(table, gated):
    mask = table["class"] == "tuned_only"
    if gated:
        mask &= (table["nu_error"] < 0.2) & (table["nu_recon"] < 0.5)
    return torch.tensor(mask.to_numpy())


def test_latent_scaling_takes_the_false_calls_of_l1_away_and_keeps_the_true_ones(trained_l1):
    pair, crosscoder = trained_l1
    table = table_of(trained_l1)
    plain, gated = (pair.score(crosscoder, called(table, gated)) for gated in (False, True))
    assert plain.precision <= 0.7
    assert gated.precision >= plain.precision + 0.2
    assert gated.recall >= plain.recall - 1e-9


def test_latent_scaling_leaves_the_calls_of_batch_topk_standing(trained_batchtopk):
    pair, crosscoder = trained_batchtopk
    score = pair.score(crosscoder, called(table_of(trained_batchtopk), gated=True))
    assert score.precision >= 0.9 and score.recall >= 0.9


def test_shared_latents_scale_by_one(trained_batchtopk):
    pair, crosscoder = trained_batchtopk
    table = table_of(trained_batchtopk)
    shared = table[(pair.label(crosscoder)["kind"] == "shared").to_numpy() & (table["n_fired"] >= 100)]
    assert len(shared) >= 10
    for column in ("nu_error", "nu_recon"):
        assert shared[column].median() == pytest.approx(1, abs=0.02)


def test_an_identity_pair_has_no_exclusive_latent_and_scales_by_one(trained_identity):
    table = table_of(trained_identity)
    alive = table[table["n_fired"] >= 100]
    assert not alive["class"].isin(["tuned_only", "base_only"]).any()
    for column in ("nu_error", "nu_recon"):
        assert (alive[column] - 1).abs().max() < 0.05


def test_disjoint_halves_are_mostly_exclusive_by_class(trained_disjoint):
    table = table_of(trained_disjoint)
    alive = table[table["class"] != "dead"]
    assert alive["class"].isin(["tuned_only", "base_only"]).mean() >= 0.8
