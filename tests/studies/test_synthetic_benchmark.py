"""The claims of the field hold on small planted pairs, and the table of claims counts as it says."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from tl_crosscoder.analysis.marks import presence_norm, strengths
from tl_crosscoder.studies import StudyResult
from tl_crosscoder.studies import synthetic_benchmark as benchmark
from tl_crosscoder.studies.synthetic_benchmark import CLAIMS, Claim, synthetic_benchmark
from tl_crosscoder.studies.synthetic_cells import CELLS, FAST


@pytest.fixture(scope="module")
def fast():
    return synthetic_benchmark(seeds=1, fast=True, progress=False)


def test_what_is_claimed_holds_on_small_pairs_with_a_margin(fast):
    """One seed.  Measured: precision .57 before the gates, 1 after; agreement .82 and 1; exclusive 0, 0 and .91."""
    marks = fast.cells.set_index("cell").to_dict("index")
    l1, topk = marks["L1"], marks["BatchTopK"]
    assert l1["norm_precision"] <= 0.75 and l1["mirror_pairs"] >= 3
    assert l1["gated_precision"] >= l1["norm_precision"] + 0.2
    assert l1["gated_recall"] == l1["norm_recall"] >= 0.8
    assert l1["shrinkage"] > 0.015 > topk["shrinkage"]
    assert topk["norm_weak"] == 0 and topk["norm_precision"] >= 0.8
    assert topk["agreement"] > l1["agreement"] + 0.05
    assert topk["shared_nu_error"] == pytest.approx(1, abs=0.05)
    assert marks["L1, identity"]["exclusive"] == marks["BatchTopK, identity"]["exclusive"] == 0
    assert marks["BatchTopK, disjoint"]["exclusive"] >= 0.75


def test_the_result_has_a_row_a_claim_a_sentence_and_a_figure(fast):
    assert fast.table["claim"].tolist() == [claim.text for claim in CLAIMS]
    assert f"of {len(CLAIMS)} claims hold in every seed" in fast.verdict
    back = StudyResult.from_dict(json.loads(fast.to_json()))
    assert back.verdict == fast.verdict
    assert back.plot().svg() == fast.plot().svg()


def test_a_training_that_is_finished_is_not_repeated(tmp_path, monkeypatch):
    tiny = replace(FAST, steps=3, n_judged=500)
    first = synthetic_benchmark(seeds=1, setting=tiny, parts=tmp_path, progress=False)
    monkeypatch.setattr(benchmark, "cell_marks", None)
    again = synthetic_benchmark(seeds=1, setting=tiny, parts=tmp_path, progress=False)
    pd.testing.assert_frame_equal(first.cells, again.cells)
    assert len(list(tmp_path.glob("*/*.json"))) == len(CELLS) + 1


def test_claims_are_counted_by_hand(monkeypatch):
    """Figures 1, 3, undefined: mean 2, half the interval t(.975, 1) · 1 = 12.7; at least 2 in one of two seeds."""
    claim = Claim("more than two", "x", lambda marks: marks["L1"]["x"], 2.0)
    monkeypatch.setattr(benchmark, "CLAIMS", (claim,))
    table = benchmark.judged(pd.DataFrame({"cell": "L1", "seed": [0, 1, 2], "x": [1.0, 3.0, np.nan]}))
    (row,) = table.to_dict("records")
    assert (row["mean"], row["holds"], row["seeds"], row["wanted"]) == (2, 1, 2, "≥ 2")
    assert [row["low"], row["high"]] == pytest.approx([2 - 12.706, 2 + 12.706], abs=1e-3)
    result = benchmark.SyntheticBenchmarkResult(table, pd.DataFrame())
    assert result.verdict == "0 of 1 claims hold in every seed; “more than two” in 1 of 2."


def test_a_claim_without_a_case_in_a_seed_is_not_said_to_hold_in_every_seed():
    cells = pd.DataFrame({"claim": ["a", "b"], "holds": [5, 1], "seeds": [5, 1]})
    result = benchmark.SyntheticBenchmarkResult(cells, pd.DataFrame())
    assert result.verdict == "2 of 2 claims hold in every seed that has a case of them."


def test_the_norms_of_a_true_dictionary_are_its_strengths():
    np.testing.assert_allclose(presence_norm(np.array([0.0, 0.3, 1.0, 2.0, np.inf])), [1, 0.85, 0.5, 0.25, 0])


def test_strengths_by_hand():
    """Weak at the truth + .1; of two wrong decoupled calls one has nu_recon .8; one right one is not counted; 3 of 6 exclusive."""
    labels = pd.DataFrame(
        {
            "kind": ["weak", "decoupled", "decoupled", "decoupled", "shared", "shared", "dead"],
            "correlation": 0.9,
            "base_presence": [0.4, 0.7, 0.7, 0.01, 1.0, 1.0, np.nan],
        }
    )
    table = pd.DataFrame(
        {
            "delta_norm": [0.9, 0.95, 0.99, 0.97, 0.5, 0.5, 1.0],
            "nu_error": [0.1] * 4 + [1.1, 0.9, np.nan],
            "nu_recon": [0.1, 0.8, 0.3, 0.0, 1.2, 1.0, np.nan],
            "n_fired": [9] * 6 + [0],
        }
    )
    found = strengths(labels, table)
    assert found["shrinkage"] == pytest.approx(0.1)
    assert found["caught"] == 0.5
    assert found["exclusive"] == 0.5
    assert (found["shared_nu_error"], found["shared_nu_recon"]) == (1.0, pytest.approx(1.1))


def test_no_seed_is_an_error():
    with pytest.raises(ValueError, match="at least one seed, got 0"):
        synthetic_benchmark(seeds=0)
