"""What the variants find of a planted difference."""

import torch
from synthetic_runs import CONFIG, D_SAE, delta_norm, small_pair

from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.dictionary.init import Init
from tl_crosscoder.dictionary.losses import MSE, AuxK, Delta, PreAct, Progress, TanhPenalty
from tl_crosscoder.dictionary.sparsity import BatchTopK, JumpReLU, Split
from tl_crosscoder.training.train import train


def trained(pair, sparsity, losses):
    crosscoder = Crosscoder(pair.d_in, D_SAE, sparsity, init=Init(same=False))
    train(crosscoder, pair.batches(512), losses, CONFIG)
    return crosscoder


def trained_with_delta(pair):
    sparsity = Split(0.5, BatchTopK(1.5, 10, 80), BatchTopK(0.5, 5, 80))
    return trained(pair, sparsity, [MSE(), AuxK(dead_after_tokens=5_000), Delta(1.0, shared=0.5)])


def test_jumprelu_with_its_penalties_recovers_planted_tuned_only_concepts():
    """Recall 1 and precision .86 to 1 on three seeds of pair and start; pre-activations of concepts here are near 2."""
    pair = small_pair()
    crosscoder = trained(pair, JumpReLU(0.1, bandwidth=0.5), [MSE(), TanhPenalty(0.2), PreAct()])
    x = pair.sample(4_000, 5).x
    error = (crosscoder(x).recon - x).var(0).sum() / x.var(0).sum()
    assert error < 0.1
    assert crosscoder.encode_sparse(x).l0 < 3
    assert crosscoder.sparsity.thresholds.median() > 0.2  # they rose from .1
    score = pair.score(crosscoder, delta_norm(crosscoder) > 0.9)
    assert min(score.precision, score.recall) >= 0.8


def test_delta_recovers_planted_tuned_only_concepts_in_its_unshared_latents():
    """Precision and recall 1 on three seeds, with 19 of 20 calls in the latents that are not shared."""
    pair = small_pair()
    crosscoder = trained_with_delta(pair)
    called = delta_norm(crosscoder) > 0.9
    score = pair.score(crosscoder, called)
    assert min(score.precision, score.recall) >= 0.8
    assert called[D_SAE // 2 :].sum() > 2 * called[: D_SAE // 2].sum()


def test_delta_finds_nothing_tuned_only_between_a_model_and_itself():
    pair = small_pair("identity")
    crosscoder = trained_with_delta(pair)
    x = pair.sample(2_000, 5).x
    out = crosscoder(x)
    progress = Progress(0, 1, 0, torch.zeros(D_SAE, dtype=torch.int64))
    loss = Delta(1.0, shared=0.5)(x, out, crosscoder, progress).item()
    assert loss < 1e-3 * out.target.square().sum().item() / len(x)
    share = crosscoder.decoder_norms()[:, 1] / crosscoder.decoder_norms().sum(1)
    living = out.codes.fired()
    assert living[D_SAE // 2 :].any()
    assert (share[living] - 0.5).abs().max() < 0.1
