"""Matching finds a known permutation, agrees with an exhaustive search, and its nulls are calibrated."""

from itertools import permutations

import pytest
import torch
from scipy import stats

from tl_crosscoder.analysis import matching
from tl_crosscoder.analysis.matching import match_latents
from tl_crosscoder.analysis.matching_nulls import p_value, random_null, random_rotation, rotation_null
from tl_crosscoder.errors import ShapeMismatch


def rows(n, *shape, seed=0):
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("method", ["hungarian", "mutual"])
def test_a_known_permutation_is_recovered_whatever_the_lengths(method):
    a = rows(50, 2, 16)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(1))
    b = a[order] * torch.linspace(0.1, 9, 50)[:, None, None] + 0.01 * rows(50, 2, 16, seed=2)
    found = match_latents(a, b, method=method)
    assert torch.equal(order[found.pairs[:, 1]], found.pairs[:, 0])
    assert found.share(0.99) == found.upper_bound(0.99) == 1


def test_the_best_assignment_is_that_of_an_exhaustive_search():
    a, b = rows(6, 4).double(), rows(6, 4, seed=1).double()
    cosine = torch.nn.functional.cosine_similarity(a[:, None], b[None], dim=-1)
    best = max(
        permutations(range(6)), key=lambda order: sum(cosine[i, j].item() for i, j in enumerate(order))
    )
    found = match_latents(a, b)
    assert found.pairs[:, 1].tolist() == list(best)
    torch.testing.assert_close(found.similarity, cosine[range(6), list(best)])
    torch.testing.assert_close(found.best_b, cosine.amax(0))


def test_blocks_change_nothing(monkeypatch):
    a, b = rows(37, 6).double(), rows(41, 6, seed=1).double()
    whole = [match_latents(a, b, method=method) for method in ("hungarian", "mutual")]
    monkeypatch.setattr(matching, "SIDE", 5)
    for one in whole:
        parted = match_latents(a, b, method=one.method)
        assert torch.equal(parted.pairs, one.pairs)
        for name in ("similarity", "best_a", "best_b"):
            torch.testing.assert_close(getattr(parted, name), getattr(one, name), check_dtype=False)


def test_mutual_neighbours_by_hand():
    """a0 and a1 both like b0 best; b0 likes a1 best: only (a1, b0) is mutual.  Both rows of a have a neighbour, one has a pair."""
    a = torch.tensor([[1.0, 0.2], [1.0, 0.1]])
    b = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    found = match_latents(a, b, method="mutual")
    assert found.pairs.tolist() == [[1, 0]]
    assert (found.share(0.9), found.upper_bound(0.9)) == (0.5, 1.0)


def test_many_are_matched_by_mutual_neighbours_and_few_by_the_best_assignment(monkeypatch):
    monkeypatch.setattr(matching, "HUNGARIAN_AT_MOST", 99)
    assert match_latents(rows(9, 4), rows(11, 4)).method == "hungarian"
    assert match_latents(rows(9, 4), rows(12, 4)).method == "mutual"


def test_the_smaller_side_is_what_can_be_recovered():
    a = rows(30, 12)
    assert match_latents(a, a[:10]).share() == 1
    assert match_latents(a[:10], a).upper_bound() == 1


def test_rows_of_zeros_match_nothing_and_empty_sides_are_undefined():
    a = torch.cat([rows(3, 8), torch.zeros(2, 8)])
    for method in ("hungarian", "mutual"):
        assert match_latents(a, a, method=method).matched() == 3
    nothing = match_latents(a, a[:0])
    assert nothing.matched() == 0
    assert all(x != x for x in (nothing.share(), nothing.upper_bound(), nothing.mean()))


def test_other_widths_are_refused():
    with pytest.raises(ShapeMismatch, match=r"\[2, 8\] and \[2, 9\]"):
        match_latents(rows(3, 2, 8), rows(3, 2, 9))


def test_a_rotation_is_orthogonal_and_keeps_what_a_latent_says_about_the_models():
    q = random_rotation(16, torch.Generator().manual_seed(0))
    torch.testing.assert_close(q @ q.T, torch.eye(16, dtype=torch.float64))
    a = rows(5, 2, 16).double()
    torch.testing.assert_close((a @ q).norm(dim=-1), a.norm(dim=-1))
    torch.testing.assert_close(((a @ q)[:, 0] * (a @ q)[:, 1]).sum(-1), (a[:, 0] * a[:, 1]).sum(-1))


def test_the_rotation_null_is_calibrated():
    """Of 200 pairs of unrelated dictionaries the p values are uniform on 1/20 ... 20/20."""
    p = []
    for seed in range(200):
        a, b = rows(8, 2, 4, seed=2 * seed), rows(8, 2, 4, seed=2 * seed + 1)
        null = rotation_null(a, b, n_draws=19, seed=seed)
        p.append(p_value(match_latents(a, b).mean(), [each.mean() for each in null]))
    counts = [p.count(value) for value in sorted({i / 20 for i in range(1, 21)})]
    assert sum(counts) == 200
    assert stats.chisquare(counts).pvalue > 0.01


def test_the_null_of_random_latents_is_of_their_number_and_finds_what_chance_does():
    """Of 40 common latents two random tens share 40 · (10/40)² = 2.5, a quarter of ten."""
    a, alive = rows(60, 32), torch.arange(40)
    null = random_null(a, a, alive, alive, (10, 10), n_draws=200)
    assert {each.size for each in null} == {10}
    assert sum(each.share(0.99) for each in null) / 200 == pytest.approx(0.25, abs=0.03)
    with pytest.raises(ValueError, match="50 random latents wanted of side b, which has 40 alive"):
        random_null(a, a, alive, alive, (10, 50))


def test_a_p_value_counts_the_observed_one():
    assert p_value(3.0, [1.0, 2.0, 3.0, 4.0]) == 3 / 5
    assert p_value(9.0, [1.0, 2.0, 3.0]) == 1 / 4
    assert p_value(float("nan"), [1.0]) != p_value(float("nan"), [1.0])
