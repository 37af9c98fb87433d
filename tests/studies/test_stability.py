"""Two runs are matched where they are the same, and not where chance alone would."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse, stats

from tl_crosscoder.analysis.acts_matching import SharedActs, acts_of, match_acts, shifted
from tl_crosscoder.analysis.matching_nulls import p_value, shift_null
from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.dictionary.init import Init
from tl_crosscoder.dictionary.sparsity import ReLU
from tl_crosscoder.errors import EmptyData, ShapeMismatch
from tl_crosscoder.studies import StudyResult
from tl_crosscoder.studies.stability import StabilityResult, stability

D_IN, D_SAE = 16, 24
ORDER = torch.randperm(D_SAE, generator=torch.Generator().manual_seed(3))


def dictionary(seed=0) -> Crosscoder:
    """Four tuned-only latents, four base-only, sixteen shared."""
    crosscoder = Crosscoder(D_IN, D_SAE, ReLU(), init=Init(seed=seed))
    with torch.no_grad():
        crosscoder.W_dec[:4, 0] = 0
        crosscoder.W_dec[4:8, 1] = 0
        crosscoder.b_enc.fill_(-1.0)
    return crosscoder.eval()


def permuted(crosscoder: Crosscoder, order=ORDER) -> Crosscoder:
    other = Crosscoder(D_IN, len(order), ReLU())
    with torch.no_grad():
        for name in ("W_dec", "W_enc_rows", "b_enc"):
            getattr(other, name).copy_(getattr(crosscoder, name)[order])
        other.b_dec.copy_(crosscoder.b_dec)
    return other.eval()


def tokens(n=400) -> list[torch.Tensor]:
    x = torch.randn(n, 2, D_IN, generator=torch.Generator().manual_seed(5))
    x[:, 1] = 0.7 * x[:, 0] + 0.3 * x[:, 1]
    return list((2 * x).split(150))


def ask(a, b, batches=None, **options) -> StabilityResult:
    return stability(a, b, batches, progress=False, **options)


def test_a_permuted_dictionary_is_recovered_by_directions_and_by_activations():
    a = dictionary()
    result = ask(a, permuted(a), tokens())
    assert (result.table["share"].dropna() == 1).all()
    assert result.tokens == 400
    pairs = result.pairs
    assert (ORDER[pairs["b"].tolist()].numpy() == pairs["a"]).all()
    np.testing.assert_allclose(pairs[["cosine", "correlation"]], 1, atol=1e-5)
    assert (pairs["class_a"] == pairs["class_b"]).all()
    sizes = result.table[result.table["by"] == "directions"].set_index("class")["n_a"]
    assert sizes.to_dict() == {"all": 24, "tuned_only": 4, "base_only": 4, "shared": 16, "other": 0}


def test_firings_may_come_in_any_order_and_not_in_part():
    a = dictionary()
    fired = pd.Series([0.0, 0, *[9] * 22])  # of the four tuned-only latents two never fired
    rows = ask(a, a, alive=(fired.sample(frac=1, random_state=0), fired)).table.set_index("class")
    assert rows.loc["tuned_only", ["n_a", "n_b", "matched"]].tolist() == [2, 2, 2]
    with pytest.raises(ValueError, match="a row for each of 24 latents, in any order, got 22"):
        ask(a, a, alive=(fired[fired > 0], fired))


def test_another_dictionary_is_not_and_does_no_better_than_chance():
    rows = ask(dictionary(), dictionary(seed=9), n_draws=19).table.set_index("class")
    assert rows.loc["all", "share"] <= rows.loc["all", "rotation"] + 0.1
    assert rows.loc["all", "p_rotation"] > 0.05


def test_the_same_dictionary_is_beyond_chance_and_the_sentence_says_so():
    a = dictionary()
    result = ask(a, permuted(a), n_draws=19)
    rows = result.table.set_index("class")
    assert rows.loc["all", "p_rotation"] == pytest.approx(1 / 20)
    assert np.isnan(rows.loc["all", "p_random"])  # all of them are no choice
    assert rows.loc["tuned_only", "random"] < 0.6 < rows.loc["tuned_only", "share"]
    assert result.verdict.startswith("Of 24 and 24 living latents 24 (100%) are matched with cosine ≥ 0.7 (")


def test_a_class_that_moved_is_found_elsewhere():
    """The same directions in b, but of both models: not tuned-only there, though their partners are as similar as .7 asks for."""
    a = dictionary()
    b = permuted(a, torch.arange(D_SAE))
    with torch.no_grad():
        b.W_dec[:4, 0] = 0.5 * b.W_dec[:4, 1]
    result = ask(a, b)
    row = result.table.set_index("class").loc["tuned_only"]
    assert (row["n_a"], row["n_b"], row["matched"], row["elsewhere"]) == (4, 0, 0, 1)
    assert "Of 4 and 0 tuned-only latents none can be matched." in result.verdict


def test_dead_latents_are_left_out():
    a = dictionary()
    fired = pd.Series([0] * 4 + [5] * 20)
    result = ask(a, permuted(a), alive=(fired, fired.iloc[ORDER.numpy()].reset_index(drop=True)))
    sizes = result.table.set_index("class")["n_a"]
    assert (sizes["all"], sizes["tuned_only"]) == (20, 0)


def test_activations_are_matched_by_their_pearson_correlation():
    a, b = dictionary(), dictionary(seed=9)
    acts = acts_of((a, b), tokens())
    every = torch.arange(D_SAE)
    found = match_acts(acts.a, acts.b, every, every)
    x = torch.cat(tokens())
    whole = np.corrcoef(a.encode(x).detach().numpy().T, b.encode(x).detach().numpy().T)[:D_SAE, D_SAE:]
    np.testing.assert_allclose(found.best_a, np.nan_to_num(whole).max(1), atol=1e-5)
    np.testing.assert_allclose(found.similarity, whole[tuple(found.pairs.T.numpy())], atol=1e-5)


def test_a_shift_moves_tokens_within_their_document_and_keeps_their_order():
    # a document of 1, one of 4 and one of 5 tokens; latent 0 says which token it is
    document = np.array([7, 3, 3, 3, 3, 9, 9, 9, 9, 9])
    acts = sparse.csc_matrix(np.arange(1.0, 11)[:, None])
    seen = set()
    for seed in range(60):
        moved = shifted(acts, document, seed).toarray()[:, 0]
        assert moved[0] == 1
        for start, stop in ((1, 5), (5, 10)):
            here = moved[start:stop]
            assert sorted(here) == list(range(start + 1, stop + 1)) and here[0] != start + 1
            assert ((np.diff(here) == 1) | (np.diff(here) == start + 1 - stop)).all()  # a turn, nothing else
        seen.add(tuple(moved))
    assert len(seen) == 3 * 4  # every turn of either document


def test_after_a_shift_the_same_latents_match_as_often_as_unrelated_ones():
    """One dictionary twice: all are matched, and after a shift no more than chance; the p-value says it."""
    a = dictionary()
    rows = ask(a, permuted(a), tokens(), n_draws=19).table
    row = rows[(rows["class"] == "all") & (rows["by"] == "activations")].iloc[0]
    assert row["share"] == 1 and row["shift"] < 0.05 and row["p_shift"] == pytest.approx(1 / 20)
    assert np.isnan(row["rotation"]) and np.isnan(row["p_random"])
    tuned = rows[(rows["class"] == "tuned_only") & (rows["by"] == "activations")].iloc[0]
    assert tuned["random"] < 0.6 < tuned["share"]


def test_the_shift_null_is_calibrated():
    """Activations that have nothing to do with each other: the rank among the shifts is uniform."""
    rng, p = np.random.default_rng(0), []
    every, document = torch.arange(6), np.repeat(np.arange(8), 30)
    for seed in range(100):
        a, b = (sparse.csc_matrix(np.maximum(rng.normal(size=(240, 6)), 0)) for _ in range(2))
        null = shift_null(SharedActs(a, b, document), every, every, n_draws=9, seed=seed)
        p.append(p_value(match_acts(a, b, every, every).mean(), [each.mean() for each in null]))
    counts = [p.count(value) for value in sorted({i / 10 for i in range(1, 11)})]
    assert sum(counts) == 100
    assert stats.chisquare(counts).pvalue > 0.01


def test_no_more_tokens_are_read_than_asked_for_and_none_is_an_error():
    a = dictionary()
    assert acts_of((a, a), tokens(), most=200).a.shape == (300, D_SAE)  # whole batches
    with pytest.raises(EmptyData, match="no tokens"):
        acts_of((a, a), [])


def test_other_models_are_refused():
    with pytest.raises(ShapeMismatch, match=r"d_in=16.*d_in=8"):
        ask(dictionary(), Crosscoder(8, 4, ReLU()))


def test_the_result_is_read_back_drawn_and_resumed(tmp_path, monkeypatch):
    a = dictionary()
    result = ask(a, permuted(a), tokens(), parts=tmp_path)
    back = StudyResult.from_dict(json.loads(result.to_json()))
    assert back.verdict == result.verdict
    assert back.plot().svg() == result.plot().svg()
    monkeypatch.setattr("tl_crosscoder.studies.stability.rotation_null", None)
    pd.testing.assert_frame_equal(ask(a, permuted(a), tokens(), parts=tmp_path).table, result.table)
