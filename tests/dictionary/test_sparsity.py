import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.dictionary.sparsity import SPARSITIES, BatchTopK, ReLU, TopK


def draw(batch=9, d_sae=13, seed=0, coarse=False):
    generator = torch.Generator().manual_seed(seed)
    pre = torch.randn(batch, d_sae, generator=generator)
    norms = torch.rand(d_sae, generator=generator) + 0.1
    if coarse:  # few values, so that ties abound
        pre, norms = pre.round(), torch.ones(d_sae)
    return pre, norms


def test_batch_topk_keeps_the_largest_scores_of_the_batch_and_leaves_their_values_alone():
    # scores: [[1, 4, 0], [6, 0, 2]] with norms [2, 4, 1]; k = 1, batch 2: the two largest are 6 and 4
    pre, norms = torch.tensor([[0.5, 1.0, -1.0], [3.0, -2.0, 2.0]]), torch.tensor([2.0, 4.0, 1.0])
    assert BatchTopK(1)(pre, norms).tolist() == [[0, 1, 0], [3, 0, 0]]
    # other decoders, same activations: another choice.  scores [[.5, 1, 0], [3, 0, 20]]
    assert BatchTopK(1)(pre, torch.tensor([1.0, 1.0, 10.0])).tolist() == [[0, 0, 0], [3, 0, 2]]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    k=st.integers(1, 13),
    coarse=st.booleans(),
    guess=st.sampled_from([None, 0.0, 0.5, 1.0, 1e9]),
)
def test_batch_topk_equals_sorting_everything_whatever_was_guessed(seed, k, coarse, guess):
    pre, norms = draw(seed=seed, coarse=coarse)
    sparsity = BatchTopK(k)
    sparsity.guess = guess
    acts = sparsity(pre, norms)
    expected = reference.keep_largest(pre.numpy(), norms.numpy(), k * len(pre))
    np.testing.assert_array_equal(acts, expected)
    positives = int(((pre > 0) & (norms > 0)).sum())
    assert acts.count_nonzero() == min(k * len(pre), positives)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), k=st.integers(1, 13), coarse=st.booleans())
def test_topk_equals_sorting_each_row(seed, k, coarse):
    pre, norms = draw(seed=seed, coarse=coarse)
    expected = reference.keep_largest_per_row(pre.numpy(), norms.numpy(), k)
    np.testing.assert_array_equal(TopK(k)(pre, norms), expected)


def test_relu_keeps_every_positive():
    pre, norms = draw()
    assert torch.equal(ReLU()(pre, norms), pre.clamp(min=0))


@pytest.mark.parametrize("sparsity", [BatchTopK(3), TopK(3), ReLU()])
def test_the_gradient_is_one_where_kept_and_zero_elsewhere(sparsity):
    pre, norms = draw()
    pre.requires_grad_(), norms.requires_grad_()
    acts = sparsity(pre, norms)
    acts.sum().backward()
    assert torch.equal(pre.grad, (acts > 0).float())
    assert norms.grad is None


def test_a_batch_with_no_positive_score_gives_no_code_and_no_threshold():
    sparsity = BatchTopK(2)
    assert not sparsity(-torch.ones(3, 4), torch.ones(4)).any()
    assert sparsity.threshold == -1


def test_zero_decoders_are_never_chosen():
    assert BatchTopK(2)(torch.ones(1, 3), torch.tensor([0.0, 1.0, 0.0])).tolist() == [[0, 1, 0]]
    assert TopK(2)(torch.ones(1, 3), torch.tensor([0.0, 1.0, 0.0])).tolist() == [[0, 1, 0]]


def test_the_threshold_is_the_running_mean_of_the_smallest_kept_score():
    sparsity, smallest = BatchTopK(2, threshold_decay=0.9), []
    for seed in range(12):
        pre, norms = draw(seed=seed)
        acts = sparsity(pre, norms)
        smallest.append(((acts * norms)[acts > 0]).min().item())
    assert sparsity.threshold.item() == pytest.approx(reference.threshold_after(smallest, 0.9), rel=1e-5)


def test_the_threshold_waits_for_its_part_of_training():
    sparsity = BatchTopK(2, threshold_start=0.5)
    sparsity.advance(4, 10)
    sparsity(*draw())
    assert sparsity.threshold == -1
    sparsity.advance(5, 10)
    sparsity(*draw())
    assert sparsity.threshold > 0


def test_k_starts_at_k_max_and_ends_at_k():
    # 10 -> 4 over 3 steps: 10, 8, 6, then 4
    sparsity = BatchTopK(4, k_max=10, k_anneal_steps=3)
    ks = []
    for step in range(5):
        sparsity.advance(step, 5)
        ks.append(sparsity.k_now)
    assert ks == [10, 8, 6, 4, 4]
    plain = BatchTopK(4)
    plain.advance(0, 5)
    assert plain.k_now == 4


def test_evaluation_is_strictly_above_the_threshold():
    sparsity = BatchTopK(1).eval()
    sparsity.threshold.fill_(2.0)
    pre, norms = torch.tensor([[1.0, 1.5, 2.0, -9.0]]), torch.tensor([2.0, 2.0, 0.5, 9.0])
    assert sparsity(pre, norms).tolist() == [[0, 1.5, 0, 0]]


@pytest.mark.parametrize("make", [lambda: BatchTopK(3), lambda: TopK(3), ReLU])
def test_eval_codes_do_not_depend_on_batch_mates(make):
    sparsity = make()
    pre, norms = draw(batch=32)
    sparsity(pre, norms)
    sparsity.eval()
    together = sparsity(pre, norms)
    alone = torch.cat([sparsity(pre[i : i + 1], norms) for i in range(32)])
    assert torch.equal(together, alone)


def test_evaluation_without_a_threshold_is_refused():
    with pytest.raises(RuntimeError, match="no threshold yet: train first"):
        BatchTopK(2).eval()(*draw())


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Crosscoder(4, 8, BatchTopK(9)), "d_sae=8, got k=9"),
        (lambda: Crosscoder(4, 8, BatchTopK(2, k_max=9, k_anneal_steps=5)), "d_sae=8, got k=9"),
        (lambda: Crosscoder(4, 8, TopK(0)), "d_sae=8, got k=0"),
        (lambda: BatchTopK(5, k_max=4, k_anneal_steps=5), "k=5, k_max=4"),
        (lambda: BatchTopK(5, k_max=9), "k_anneal_steps=0"),
        (lambda: BatchTopK(5, threshold_start=1.0), "got 1.0"),
        (lambda: SPARSITIES.build({"name": "btopk", "k": 4}), "known: .*batch_topk.*relu.*topk"),
        (lambda: SPARSITIES.build({"name": "topk", "q": 4}), "no argument 'q'"),
    ],
)
def test_impossible_settings_are_refused_with_their_numbers(make, reason):
    with pytest.raises((ValueError, KeyError), match=reason):
        make()


@pytest.mark.parametrize("sparsity", [BatchTopK(3, k_max=5, k_anneal_steps=9), TopK(2), ReLU()])
def test_describe_and_build_are_inverses(sparsity):
    description = SPARSITIES.describe(sparsity)
    assert SPARSITIES.describe(SPARSITIES.build(description)) == description
