"""Mirror images are found as by brute force, in blocks, and their co-activation is what a loop over tokens counts."""

import numpy as np
import pytest
import torch

from tl_crosscoder.analysis import matching
from tl_crosscoder.analysis.coactivation import (
    EDGES,
    Coactivation,
    coactivation,
    csr,
    divergence,
    pair_scales,
    strong,
)
from tl_crosscoder.analysis.mirrors import mirrored
from tl_crosscoder.dictionary.codes import Codes


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("side", [3, 4096])
def test_every_pair_above_the_cosine_is_found_once_in_blocks_or_not(monkeypatch, side):
    monkeypatch.setattr(matching, "SIDE", side)
    rows = torch.randn(40, 2, 4, generator=generator(), dtype=torch.float64)
    tuned, base = torch.arange(3, 23), torch.arange(20, 40)
    cosine = torch.nn.functional.cosine_similarity(rows[:, None, 1], rows[None, :, 0], dim=-1)
    wanted = {
        (j, i): cosine[j, i].item()
        for j in tuned.tolist()
        for i in base.tolist()
        if i != j and cosine[j, i] > 0.6
    }
    found = mirrored(rows, tuned, base, cosine=0.6)
    got = dict(zip(map(tuple, found.pairs.tolist()), found.cosine.tolist(), strict=True))
    assert found.n == len(got) == len(wanted) > 20
    assert got == pytest.approx(wanted)
    assert found.cosine.tolist() == sorted(found.cosine.tolist(), reverse=True)


def test_of_many_pairs_the_most_similar_are_kept_and_all_are_counted(monkeypatch):
    monkeypatch.setattr(matching, "SIDE", 7)
    rows = torch.randn(40, 2, 4, generator=generator())
    tuned, base = torch.arange(20), torch.arange(20, 40)
    every = mirrored(rows, tuned, base, cosine=0.5)
    few = mirrored(rows, tuned, base, cosine=0.5, most=5)
    assert few.n == every.n > 5
    assert torch.equal(few.pairs, every.pairs[:5])


def test_a_row_of_zeros_and_an_empty_class_have_no_mirror():
    rows = torch.ones(4, 2, 3)
    rows[0] = 0
    everything, nothing = torch.arange(4), torch.arange(0)
    assert mirrored(rows, everything, everything).n == 6  # of 1, 2, 3 each ordered pair
    assert mirrored(rows, nothing, everything).n == mirrored(rows, everything, nothing).n == 0


def some_codes(tokens=300, d_sae=6, seed=0) -> torch.Tensor:
    acts = torch.rand(tokens, d_sae, generator=generator(seed)) ** 3
    return acts * (torch.rand(acts.shape, generator=generator(seed + 1)) < 0.4)


@pytest.mark.parametrize("weights", [None, torch.tensor([1.0, 3.0, 0.5, 1.0, 2.0, 0.1])])
def test_the_histograms_are_those_of_a_loop_over_tokens(weights):
    acts, pairs = some_codes(), torch.tensor([[0, 1], [3, 2], [5, 0], [0, 5], [4, 4]])
    together = Coactivation(pairs, pair_scales(acts.amax(0), pairs, weights))
    for part in acts.split(70):
        together.update(Codes.from_dense(part))
    scaled = (acts * (1 if weights is None else weights)).double()
    for histogram, (j, i) in zip(together.histograms, pairs.tolist(), strict=True):
        tops = scaled.amax(0)
        top = (tops[j], tops[i]) if weights is None else (max(tops[j], tops[i]),) * 2
        wanted = np.zeros((5, 5), dtype=int)
        for row in scaled:
            one, other = (
                sum((row[k] / t).item() >= edge for edge in EDGES) for k, t in zip((j, i), top, strict=True)
            )
            wanted[one, other] += 1
        np.testing.assert_array_equal(histogram, wanted)
        assert histogram.sum() == len(acts)


def test_planted_twins_have_the_overlap_that_was_planted():
    """Of 450 tokens 100 have both strong, 300 one strong and the other silent, 50 one strong and the other in between."""
    acts = torch.zeros(1000, 2)
    acts[:100] = 1.0
    acts[100:250, 0] = acts[250:400, 1] = 0.9
    acts[400:450, 0], acts[400:450, 1] = 0.8, 0.3
    together = Coactivation(torch.tensor([[0, 1]]), torch.ones(1, 2))
    together.update(Codes.from_dense(acts))
    assert strong(together.histograms).tolist() == [450]
    assert divergence(together.histograms).tolist() == [300 / 450]
    assert coactivation(together.histograms).tolist() == [100 / 450]


def test_the_shares_by_hand_and_undefined_where_nothing_is_strong():
    histogram = np.zeros((2, 5, 5), dtype=int)
    histogram[0, 4, 0], histogram[0, 1, 3], histogram[0, 3, 4], histogram[0, 2, 2] = 5, 3, 2, 100
    histogram[1, 1, 1] = 7
    np.testing.assert_allclose(divergence(histogram), [0.8, np.nan])
    np.testing.assert_allclose(coactivation(histogram), [0.2, np.nan])


def test_codes_are_the_same_as_a_sparse_matrix():
    acts = some_codes(seed=5)
    np.testing.assert_array_equal(csr(Codes.from_dense(acts)).toarray(), acts.numpy())
