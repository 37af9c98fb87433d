"""Known answers: what training finds on pairs whose difference was planted."""

import pytest
import torch
from synthetic_runs import K, alive, delta_norm, run_batchtopk, run_l1, small_pair

from tl_crosscoder.analysis.decoder_norms import mirror_pairs
from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.dictionary.init import Init
from tl_crosscoder.dictionary.losses import L1, MSE, AuxK
from tl_crosscoder.dictionary.sparsity import BatchTopK, ReLU
from tl_crosscoder.dictionary.synthetic import SyntheticPair
from tl_crosscoder.training.config import TrainConfig
from tl_crosscoder.training.train import train

TUNED_ONLY, BASE_ONLY = 0.9, 0.1


def calls(pair, crosscoder):
    return (delta_norm(crosscoder) > TUNED_ONLY) & alive(pair, crosscoder)


def twins(pair, crosscoder):
    return mirror_pairs(crosscoder, alive(pair, crosscoder).double().tolist())


def test_batch_topk_finds_exactly_the_planted_tuned_only_concepts(trained_batchtopk):
    pair, crosscoder = trained_batchtopk
    score = pair.score(crosscoder, calls(pair, crosscoder))
    assert score.precision >= 0.9
    assert score.recall >= 0.9
    assert twins(pair, crosscoder) == 0


def test_batch_topk_does_not_shrink_weakly_shared_concepts(trained_batchtopk):
    """True gain g in (.25, .40): delta_norm 1 - g/2 in (.80, .875)."""
    pair, crosscoder = trained_batchtopk
    labels = pair.label(crosscoder)
    weak = delta_norm(crosscoder)[torch.tensor((labels["kind"] == "weak").to_numpy())]
    assert 0.78 < weak.median() < 0.89


def test_l1_invents_tuned_only_latents_by_shrinking_and_by_decoupling(trained_l1):
    pair, crosscoder = trained_l1
    score = pair.score(crosscoder, calls(pair, crosscoder))
    assert score.recall >= 0.9
    assert score.precision <= 0.7
    assert score.calls["weak"] + score.calls["decoupled"] >= 4
    assert twins(pair, crosscoder) >= 3


def test_norms_tell_true_presence_better_under_batch_topk_than_under_l1(trained_batchtopk, trained_l1):
    def agreement(run):
        """Correlation of delta_norm with 1 - r/2 (or 1/2r for r > 1), r the concept's presence in base over that in tuned."""
        pair, crosscoder = run
        labels = pair.label(crosscoder)
        about_one = torch.tensor((labels["correlation"] > 0.5).to_numpy())
        r = torch.tensor(labels["base_presence"].to_numpy())[about_one]
        truth = torch.where(r <= 1, 1 - r / 2, 1 / (2 * r))
        return torch.corrcoef(torch.stack([delta_norm(crosscoder)[about_one].double(), truth]))[0, 1]

    assert agreement(trained_batchtopk) > agreement(trained_l1)
    assert agreement(trained_batchtopk) > 0.99


def test_an_identity_pair_stays_identical(trained_identity):
    pair, crosscoder = trained_identity
    share = delta_norm(crosscoder)[alive(pair, crosscoder)]
    torch.testing.assert_close(share, torch.full_like(share, 0.5), atol=1e-4, rtol=0)


def test_models_that_start_apart_agree_on_an_identity_pair():
    pair, crosscoder = run_batchtopk(small_pair("identity"), same_init=False)
    share = delta_norm(crosscoder)[alive(pair, crosscoder)]
    assert len(share) > 30
    assert ((share > 0.4) & (share < 0.6)).all()


def test_disjoint_halves_are_mostly_exclusive(trained_disjoint):
    pair, crosscoder = trained_disjoint
    share = delta_norm(crosscoder)[alive(pair, crosscoder)]
    assert ((share > TUNED_ONLY) | (share < BASE_ONLY)).float().mean() >= 0.8


def test_the_threshold_gives_the_trained_sparsity_on_fresh_tokens(trained_batchtopk):
    pair, crosscoder = trained_batchtopk
    l0 = crosscoder.encode_sparse(pair.sample(20_000, seed=99).x).l0
    assert l0 == pytest.approx(K, rel=0.05)


def test_training_explains_the_variance_of_fresh_tokens(trained_batchtopk):
    pair, crosscoder = trained_batchtopk
    x = pair.sample(20_000, seed=99).x
    left = (x - crosscoder(x).recon).var(0).sum(-1)
    assert (1 - left / x.var(0).sum(-1) > 0.93).all()


@pytest.mark.parametrize("gain", [0.05, 0.3, 0.6])
def test_l1_shrinks_one_decoder_by_the_closed_form(gain):
    """Minimising (s·g - s·b)² + λ·s·b over b >= 0 gives b = max(0, g - λ / 2s): with s = 1, λ = .2 it is g - .1, or 0.

    The encoder is held at code 1 and the tuned decoder at 1, as in the derivation: only base's norm is free.
    """
    weight = 0.2
    x = torch.zeros(4, 2, 2)
    x[:, 0, 0], x[:, 1, 0] = gain, 1.0
    crosscoder = Crosscoder(2, 1, ReLU())
    with torch.no_grad():
        crosscoder.W_enc_rows.zero_()
        crosscoder.b_enc.fill_(1.0)
        crosscoder.W_dec.copy_(torch.tensor([[[0.5, 0.0], [1.0, 0.0]]]))
    for parameter in (crosscoder.W_enc_rows, crosscoder.b_enc, crosscoder.b_dec):
        parameter.register_hook(torch.zeros_like)
    config = TrainConfig(
        steps=200, lr=2e-2, warmup_steps=0, decay_fraction=1.0, b_dec_init="zeros", progress=False
    )
    train(crosscoder, [x], [MSE(), L1(weight, warmup_fraction=0.0)], config)
    assert crosscoder.decoder_norms()[0, 0].item() == pytest.approx(max(0.0, gain - weight / 2), abs=5e-3)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 4))
def test_recovery_holds_on_other_seeds(seed):
    pair, crosscoder = run_batchtopk(small_pair(seed=seed), seed=seed)
    score = pair.score(crosscoder, calls(pair, crosscoder))
    assert min(score.precision, score.recall) >= 0.9
    pair, crosscoder = run_l1(small_pair(seed=seed), seed=seed)
    assert pair.score(crosscoder, calls(pair, crosscoder)).precision <= 0.7


def full_size(pair, sparsity, losses, steps=3000, **arguments):
    crosscoder = Crosscoder(pair.d_in, 192, sparsity, **arguments)
    config = TrainConfig(steps=steps, lr=2e-3, warmup_steps=200, progress=False)
    train(crosscoder, pair.batches(1024), losses, config)
    return crosscoder


@pytest.mark.slow
def test_the_full_benchmark_separates_batch_topk_from_l1():
    pair = SyntheticPair()
    batch_topk = full_size(pair, BatchTopK(4, 30, 300), [MSE(), AuxK(dead_after_tokens=20_000)])
    score = pair.score(batch_topk, calls(pair, batch_topk))
    assert min(score.precision, score.recall) >= 0.9
    assert twins(pair, batch_topk) == 0
    l1 = full_size(pair, ReLU(), [MSE(), L1(0.1)], init=Init(norm=0.1))
    score = pair.score(l1, calls(pair, l1))
    assert score.precision <= 0.7
    assert score.recall >= 0.9
    assert score.calls["weak"] >= 1
    assert score.calls["decoupled"] >= 3


@pytest.mark.slow
def test_the_full_benchmark_passes_its_two_controls():
    losses = [MSE(), AuxK(dead_after_tokens=20_000)]
    pair = SyntheticPair(mode="identity")
    crosscoder = full_size(pair, BatchTopK(4, 30, 300), losses)
    share = delta_norm(crosscoder)[alive(pair, crosscoder)]
    assert not ((share > TUNED_ONLY) | (share < BASE_ONLY)).any()
    pair = SyntheticPair(mode="disjoint")
    crosscoder = full_size(pair, BatchTopK(7, 30, 300), losses)
    share = delta_norm(crosscoder)[alive(pair, crosscoder)]
    assert ((share > TUNED_ONLY) | (share < BASE_ONLY)).float().mean() >= 0.8
