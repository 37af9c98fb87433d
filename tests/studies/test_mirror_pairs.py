"""Planted twins are found, told from chance, and judged by the tokens on which they fire."""

import json

import numpy as np
import pandas as pd
import pytest
import torch

from tl_crosscoder.analysis.table import latent_table
from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.dictionary.sparsity import ReLU
from tl_crosscoder.studies import StudyResult
from tl_crosscoder.studies.mirror_pairs import MirrorResult, mirror_pairs

D_IN, SHARED = 24, 16


def twins(overlap: int, *, only: float = 0.0) -> tuple[Crosscoder, torch.Tensor]:
    """Sixteen shared latents on axes of their own, and latents 16 (tuned) and 17 (base) on axis 16, with activations.

    Of 1000 tokens, 0..99 are tuned's and 100-overlap.. base's: ``overlap`` tokens have the concept in both models.  ``only``: the
    other model's share of each twin's norm.
    """
    crosscoder = Crosscoder(D_IN, SHARED + 2, ReLU())
    with torch.no_grad():
        for p in (crosscoder.W_dec, crosscoder.W_enc_rows, crosscoder.b_enc, crosscoder.b_dec):
            p.zero_()
        for j in range(SHARED):
            crosscoder.W_dec[j, :, j] = 1.0
            crosscoder.W_enc_rows[j, :, j] = 0.5
        crosscoder.W_dec[SHARED, :, SHARED] = torch.tensor([only, 1.0])
        crosscoder.W_dec[SHARED + 1, :, SHARED] = torch.tensor([1.0, only])
        crosscoder.W_enc_rows[SHARED, 1, SHARED] = crosscoder.W_enc_rows[SHARED + 1, 0, SHARED] = 1.0
    x = torch.zeros(1000, 2, D_IN)
    for j in range(SHARED):
        x[j::SHARED, :, j] = 1.0
    x[:100, 1, SHARED] = 1.0
    x[100 - overlap : 200 - overlap, 0, SHARED] = 1.0
    return crosscoder.eval(), x


def asked(overlap: int, only: float = 0.0, **options) -> MirrorResult:
    crosscoder, x = twins(overlap, only=only)
    table = latent_table(crosscoder, [x])
    return mirror_pairs(crosscoder, x.split(300), table, progress=False, **options)


@pytest.mark.parametrize("overlap", [0, 40, 100])
def test_planted_twins_are_found_with_their_overlap(overlap):
    """100 tokens each, ``overlap`` of them the same: strong on 200 - overlap tokens, together on overlap of those."""
    result = asked(overlap)
    (row,) = result.table.to_dict("records")
    assert (row["tuned"], row["base"], row["n_strong"]) == (SHARED, SHARED + 1, 200 - overlap)
    assert row["cosine"] == pytest.approx(1)
    assert row["coactivation"] == row["coactivation_scaled"] == pytest.approx(overlap / (200 - overlap))
    assert row["divergence"] == pytest.approx(1 - row["coactivation"])
    assert np.array(result.histograms[0])[[4, 0, 4], [0, 4, 4]].tolist() == [100 - overlap] * 2 + [overlap]


def test_two_mirrored_latents_are_more_than_chance_and_the_sentence_says_both():
    result = asked(0)
    only = result.counts.set_index("gate").loc["only"]
    assert (only["n_tuned"], only["n_base"], only["pairs"]) == (1, 1, 1)
    assert only["null_mean"] == 0 and only["p"] == pytest.approx(1 / 21)
    assert (
        "Among 1 tuned-only and 1 base-only latents 1 mirror pairs (cosine > 0.9), in random sets"
        in result.verdict
    )
    assert "In 100% of 1 such pairs" in result.verdict


def test_the_table_may_come_in_any_order():
    crosscoder, x = twins(40)
    table = latent_table(crosscoder, [x])
    plain, backwards = (mirror_pairs(crosscoder, [x], t, progress=False) for t in (table, table.iloc[::-1]))
    assert len(plain.table) == 1 and backwards.to_json() == plain.to_json()


def test_leaning_twins_are_looked_at_too_but_are_not_called_exclusive():
    counts = asked(0, only=0.5).counts.set_index("gate")
    assert counts["pairs"].to_dict() == {"only": 0, "leaning": 1}
    assert counts.loc["only", ["n_tuned", "n_base"]].tolist() == [0, 0]


def test_an_empty_class_is_a_result():
    crosscoder, x = twins(0)
    with torch.no_grad():
        crosscoder.W_dec[SHARED:] = 1.0
    result = mirror_pairs(crosscoder, [x], latent_table(crosscoder, [x]), progress=False)
    assert result.table.empty and result.random.empty
    assert result.verdict.startswith(
        "Among 0 tuned-only and 0 base-only latents there can be no mirror pair."
    )
    assert result.panel().notes[-1] == "Not drawn: there is no mirror pair."
    back = StudyResult.from_dict(json.loads(result.to_json()))
    assert back.verdict == result.verdict


def test_a_dead_latent_is_in_no_pair():
    crosscoder, x = twins(0)
    x[:, 0, SHARED] = 0
    result = mirror_pairs(crosscoder, [x], latent_table(crosscoder, [x]), progress=False)
    assert result.counts["pairs"].tolist() == [0, 0]


def test_the_result_is_read_back_and_drawn():
    result = asked(40)
    back = StudyResult.from_dict(json.loads(result.to_json()))
    assert isinstance(back, MirrorResult)
    pd.testing.assert_frame_equal(back.table, result.table, check_dtype=False)
    assert back.plot().svg() == result.plot().svg()
    assert "pairs" in result.plot().svg()


def test_finished_parts_are_not_drawn_again(tmp_path, monkeypatch):
    first = asked(10, parts=tmp_path)
    monkeypatch.setattr("torch.randperm", None)
    again = asked(10, parts=tmp_path)
    pd.testing.assert_frame_equal(first.counts, again.counts)


def test_one_model_has_no_mirror():
    crosscoder = Crosscoder(4, 6, ReLU(), n_models=1)
    with pytest.raises(ValueError, match="one model"):
        mirror_pairs(crosscoder, [torch.zeros(3, 1, 4)], pd.DataFrame(), progress=False)
