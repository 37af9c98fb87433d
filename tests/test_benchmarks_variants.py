"""The comparison of the variants: its marks have known answers, and it compares at equal L0."""

import json
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pandas as pd
import pytest
import torch

from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.dictionary.difference import difference
from tl_crosscoder.dictionary.sparsity import JumpReLU
from tl_crosscoder.dictionary.synthetic import SyntheticPair

BENCHMARKS = str(Path(__file__).parents[1] / "benchmarks")
sys.path.insert(0, BENCHMARKS)
cells, grid, variants = map(import_module, ["variant_cells", "variant_grid", "variants"])
sys.path.remove(BENCHMARKS)

PAIR = SyntheticPair(d_in=256, n_shared=8, n_weak=4, n_base=4, n_tuned=4, n_decoupled=0, p=0.1, noise=0.001)
SMALL = SyntheticPair(d_in=16, n_shared=6, n_weak=0, n_base=2, n_tuned=2, n_decoupled=0, p=0.1)
STUDY = grid.Study(
    SMALL,
    {"ReLU": grid.l1(0.3), "BatchTopK": grid.batch_topk(), "diff-SAE": grid.of_difference(1)},
    l0=2,
    d_sae=16,
    steps=60,
    batch_size=64,
    lr=1e-2,
    n_judged=1000,
)
GATES = ("norm", "gated", "nu")


def dictionary(
    directions: torch.Tensor, gains: torch.Tensor, n_models: int = 2, threshold: float = 0.25
) -> Crosscoder:
    """A latent for each direction, active with the concept's own strength where that exceeds the threshold."""
    crosscoder = Crosscoder(
        directions.shape[1], len(directions), JumpReLU(threshold, bandwidth=1.0), n_models=n_models
    )
    with torch.no_grad():
        rows = directions[:, None] * gains[:, :, None]
        crosscoder.W_dec.copy_(rows)
        crosscoder.W_enc_rows.copy_(rows / gains.square().sum(1)[:, None, None])
    return crosscoder.eval()


def test_a_perfect_dictionary_gets_every_mark():
    marks = cells.marks(PAIR, dictionary(PAIR.directions, PAIR.gains), 4000)
    for gate in GATES:
        assert (marks[f"{gate}_precision"], marks[f"{gate}_recall"]) == (1, 1)
        assert marks[f"{gate}_calls"] == {"tuned": 4}
    assert (marks["found"], marks["found_tuned"], marks["mirror_pairs"], marks["dead"]) == (1, 1, 0, 0)
    assert marks["mcc"] > 0.95
    assert marks["l0"] == pytest.approx(20 * 0.1, rel=0.1)
    assert min(marks["fve"], marks["fve_difference"]) > 0.9


def test_a_dictionary_that_lacks_a_rare_tuned_only_concept_loses_it_in_recall_and_in_what_is_found():
    """The last of 20 concepts is the fourth tuned-only one; its latent points elsewhere and never fires."""
    crosscoder = dictionary(PAIR.directions, PAIR.gains)
    with torch.no_grad():
        crosscoder.b_enc[-1] = -100
    marks = cells.marks(PAIR, crosscoder, 4000)
    assert [marks[f"{gate}_recall"] for gate in GATES] == [0.75] * 3
    assert [marks[f"{gate}_precision"] for gate in GATES] == [1] * 3
    assert (marks["found"], marks["found_tuned"], marks["dead"]) == (0.95, 0.75, 0.05)


def test_a_concept_cut_into_a_mirror_pair_is_counted_and_the_gate_sees_through_it():
    """The last concept is there in both models, or (p = .01 each) in one: a latent for each model writes it alone.

    The tuned one is called by its norm, wrongly: its concept is in base on .1 / .11 of its tokens.  Latent Scaling finds the base
    decoder's part in the reconstruction.
    """
    pair = replace(PAIR, n_decoupled=1)
    directions = torch.cat([pair.directions, pair.directions[-1:]])
    gains = torch.cat([pair.gains[:-1], torch.eye(2)])
    marks = cells.marks(pair, dictionary(directions, gains), 4000)
    assert marks["mirror_pairs"] == 1
    assert marks["norm_calls"] == {"tuned": 4, "decoupled": 1}
    assert (marks["norm_precision"], marks["norm_recall"]) == (0.8, 1)
    assert (marks["gated_precision"], marks["gated_recall"]) == (1, 1)


def test_a_dictionary_of_the_difference_is_asked_for_the_concepts_that_differ():
    """tuned - base: 1 - gain of a weak concept, -1 of a base-only one, 1 of a tuned-only one."""
    change = (PAIR.gains[:, 1] - PAIR.gains[:, 0])[PAIR.n_shared :, None]
    crosscoder = dictionary(PAIR.directions[PAIR.n_shared :], change, n_models=1)
    marks = cells.marks(PAIR, crosscoder, 4000)
    assert (marks["found"], marks["found_tuned"], marks["fve"]) == (1, 1, None)
    assert marks["fve_difference"] > 0.85
    assert "norm_precision" not in marks


@pytest.mark.parametrize("start", [1e-4, 0.02, 1.0, 50.0])
@pytest.mark.parametrize("exponent", [0.1, 0.4, 3.0])
def test_the_search_reaches_its_l0_from_afar(start, exponent):
    """L0 = 4 · (w / .05)^-exponent above a floor: 5 is at .05 · 5/4^(-1/exponent), give or take the floor."""
    l0 = lambda weight: 0.1 + 4 * (weight / 0.05) ** -exponent
    made, weight, tried = cells.at_equal_l0(lambda weight: weight, l0, 5.0, start)
    assert made == weight
    if tried < cells.MAX_TRAININGS:
        assert l0(made) == pytest.approx(5, rel=cells.TOLERANCE)
    else:  # from far off in small steps: nearer than it began
        assert abs(l0(made) - 5) < abs(l0(start) - 5)


def test_a_search_without_an_end_gives_the_nearest_it_has_seen():
    made, weight, tried = cells.at_equal_l0(lambda weight: weight, lambda weight: 9 + 1 / weight, 5.0, 1.0)
    assert tried == cells.MAX_TRAININGS
    assert made == weight > 100


def test_a_trained_cell_has_the_l0_that_was_asked_for():
    row = cells.cell(STUDY, STUDY.variants["ReLU"], seed=0, weight=None)
    assert row["l0"] == pytest.approx(2, rel=0.1)  # the search's tokens are others than the judge's
    assert row["trainings"] >= 1
    again = cells.cell(STUDY, STUDY.variants["ReLU"], seed=0, weight=row["weight"])
    assert again["trainings"] == 1
    assert again["l0"] == row["l0"]


def test_difference_batches_are_what_a_diff_sae_learns_from():
    crosscoder = cells.train_once(
        replace(STUDY, pair=replace(SMALL, seed=1)), STUDY.variants["diff-SAE"], 0.0, seed=1
    )
    x = replace(SMALL, seed=1).sample(500).x
    (y,) = difference([x])
    assert (y - crosscoder(y).recon).square().sum() < 0.7 * (y - y.mean(0)).square().sum()


def test_what_is_done_is_not_done_again_and_a_torn_last_line_is(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(variants.STUDIES, "planted", STUDY)
    out = tmp_path / "rows.jsonl"
    variants.run(["planted"], 1, out, only="BatchTopK")
    first = out.read_bytes()
    with out.open("ab") as file:
        file.write(b'{"study": "planted", "variant": "Re')
    variants.run(["planted"], 1, out, only="T")
    assert out.read_bytes() == first
    variants.run(["planted"], 1, out, only="diff")
    assert [json.loads(line)["variant"] for line in out.read_text().splitlines()] == ["BatchTopK", "diff-SAE"]
    assert capsys.readouterr().out.count("seed 0") == 2
    monkeypatch.setitem(variants.STUDIES, "planted", replace(STUDY, steps=61))
    assert variants.finished(out) == []
    monkeypatch.setitem(variants.STUDIES, "planted", STUDY)
    shown = variants.markdown(variants.table(variants.finished(out), "planted"))
    assert shown.splitlines()[2].startswith("| BatchTopK | 1 |")
    assert shown.splitlines()[3].startswith("| diff-SAE | 1 |")


def test_means_come_with_half_the_t_interval():
    """Of 1, 2, 3: s = 1, t(.975; 2) = 4.303, 4.303 / √3 = 2.48.  An undefined one is left out, and said."""
    nan = float("nan")
    assert variants.mean_and_interval(pd.Series([1, 2, 3])) == "2.00 ± 2.48"
    assert variants.mean_and_interval(pd.Series([0.5, 0.5, 0.5])) == ".50"
    assert variants.mean_and_interval(pd.Series([0.5, 0.001])) == ".50 / .00"
    assert variants.mean_and_interval(pd.Series([1, nan, 1])) == "1.00 (2 of 3)"
    assert variants.mean_and_interval(pd.Series([None, nan])) == "-"


def test_differences_are_taken_seed_by_seed():
    """2 - 1 and 5 - 2; the third seed, which the reference lacks, is left out."""
    rows = [
        {"study": "planted", "variant": name, "seed": seed, "l0": value}
        for name, values in {"TopK": (1, 2), "BatchTopK": (2, 5, 9)}.items()
        for seed, value in enumerate(values)
    ]
    assert variants.table(rows, "planted", "TopK").to_dict("index") == {
        "BatchTopK": {"seeds": 2, "L0": "1.00 / 3.00"}
    }


def test_every_study_builds_every_variant_with_a_seed_of_its_own():
    for study in variants.STUDIES.values():
        for name, variant in study.variants.items():
            setting = replace(study, **variant.changes)
            crosscoder, losses = variant.build(setting, variant.weight or 0.0, seed=3)
            assert crosscoder.init.seed == 3, name
            assert losses
            asked = crosscoder.sparsity.k_now
            if variant.n_models == 2 and asked is not None:
                # where each model chooses, its number is searched for: the union is what is active
                wanted = setting.l0 / (variant.weight or 1) if name.endswith("decoupled") else setting.l0
                assert asked == pytest.approx(wanted, abs=1 / setting.batch_size), name
