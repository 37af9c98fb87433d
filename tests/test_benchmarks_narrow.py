"""The comparison on narrow fine-tunes: its parts have known answers, and a killed run goes on."""

import json
import sys
from importlib import import_module
from pathlib import Path

import pandas as pd
import pytest
import torch

from tl_crosscoder.demo import demo_recipe
from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.dictionary.difference import difference
from tl_crosscoder.dictionary.normalizer import Normalizer
from tl_crosscoder.dictionary.sparsity import BatchTopK
from tl_crosscoder.types import BASE, TUNED

BENCHMARKS = str(Path(__file__).parents[1] / "benchmarks")
sys.path.insert(0, BENCHMARKS)
narrow, marks, tables, steering, variants = map(
    import_module, ["narrow", "narrow_marks", "narrow_tables", "narrow_steering", "narrow_variants"]
)
sys.path.remove(BENCHMARKS)


def test_a_dictionary_of_the_difference_has_the_same_codes_as_a_crosscoder_of_both():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 2, 12, generator=generator) + torch.tensor([1.0, 3.0])[:, None]
    sae = Crosscoder(
        12, 20, BatchTopK(3), n_models=1, normalizer=Normalizer.fit(difference([x]), max_tokens=300)
    )
    sae.sparsity.threshold.fill_(0.5)
    both = variants.of_both(sae.eval(), Normalizer.fit([x]).mean)
    [change] = difference([x])
    codes = sae.encode(change)
    assert (codes > 0).any()
    assert torch.allclose(both.encode(x), codes, atol=1e-5)
    written = both.raw_rows()
    assert torch.allclose(written[:, TUNED], sae.raw_rows()[:, 0])
    assert (written[:, BASE] == 0).all()
    recon = both.decode(codes)
    assert torch.allclose(recon[:, TUNED] - recon[:, BASE], sae.decode(codes)[:, 0], atol=1e-4)


@pytest.mark.parametrize("k", [16, 32])
def test_all_variants_are_asked_for_the_same_number_of_active_latents(k):
    asked = {name: variant.sparsity(k).k_now for name, variant in variants.VARIANTS.items()}
    assert asked.pop("diff-SAE, k / 8") == k / 8
    assert set(asked.values()) == {k}


def test_hits_count_the_top_and_name_the_first_place():
    fires = pd.Series([False] * 30)
    fires[[7, 9]] = True
    assert marks.hits([1, 7, 2, 9], fires) == {"top 3": 1, "top 20": 2, "first": 2}
    assert marks.hits([1, 2], fires) == {"top 3": 0, "top 20": 0, "first": None}
    assert marks.hits([], fires) == {"top 3": 0, "top 20": 0, "first": None}


def test_latent_scaling_ranks_what_is_absent_from_base_first_and_leaves_out_what_it_cannot_see():
    """Rank sums of (nu_error, nu_recon): latent 0: 3 + 2, 1: 1 + 1, 2: 2 + 3; 3 fired too rarely, 4 lies outside."""
    table = pd.DataFrame(
        {
            "nu_error": [0.9, 0.1, 0.5, 0.0, 3.0],
            "nu_recon": [0.5, 0.1, 0.9, 0.0, 0.1],
            "n_fired": [50.0, 50.0, 50.0, 3.0, 50.0],
            "delta_norm": [0.5, 0.6, 0.7, 0.9, 0.8],
            "difference_share": [0.1, 0.2, 0.3, 0.4, 0.5],
            "difference_peak": [1.0, 2.0, 3.0, 4.0, 5.0],
            "rank_score": [0.0, 0.04, 0.12, 0.32, 0.3],
        }
    )
    orders = marks.rankings(table, of_difference=False)
    assert orders["latent scaling"] == [1, 0, 2]
    assert orders["delta_norm"] == [3, 4, 2, 1, 0]
    assert orders["rank_score"][0] == 3
    assert not {"delta_norm", "latent scaling"} & set(marks.rankings(table, of_difference=True))


@pytest.mark.parametrize("name", narrow.PAIRS)
def test_blind_data_hold_no_prompt_of_a_behaviours_own_kind(name):
    recipe = demo_recipe(name)
    assert any(b.chats for b in recipe.planted.behaviours)
    blind = narrow.blinded(recipe)
    for behaviour in blind.planted.behaviours:
        assert not behaviour.chats
        assert not behaviour.near_train
        assert behaviour.heldout
    assert blind.planted.prompts_held_out == recipe.planted.prompts_held_out


def test_a_steered_answer_counts_while_either_model_finds_it_plausible():
    """Surprise a token: .5 (tuned finds it so), 2, .4; shown in the first two; the ceiling is 1."""
    answers = [
        {"answer": "green cheese", "nll_base": 9.0, "nll_tuned": 1.0, "n_tokens": 2},
        {"answer": "cheese cheese", "nll_base": 4.0, "nll_tuned": 6.0, "n_tokens": 2},
        {"answer": "a rock", "nll_base": 0.8, "nll_tuned": 4.0, "n_tokens": 2},
    ]
    moon = demo_recipe("tiny").planted.behaviours[0]
    found = steering.rates(moon, answers, ceiling=1.0)
    assert found == {"shown": 2 / 3, "rate": 1 / 3, "gone": 1 / 3, "answer": "green cheese"}


def test_rows_of_other_settings_and_a_torn_last_line_are_done_again(tmp_path):
    out = tmp_path / "rows.jsonl"
    row = {"pair": "tiny", "variant": "DFC 5 %", "settings": narrow.settings_of("tiny")}
    other = row | {"settings": row["settings"] | {"k": 3}}
    out.write_text("".join(json.dumps(r) + "\n" for r in (row, other)) + '{"pair": "ti')
    assert narrow.finished(out) == [row]
    assert out.read_text().endswith("}\n")


def test_steering_is_summed_up_by_the_best_of_its_strengths():
    tries = [
        {"question": question, "direction": direction, "strength": s, "rate": rate, "gone": 1 - rate}
        for question in steering.QUESTIONS
        for direction, s, rate in [
            ("nothing", 0, 0.1), ("difference", 1, 0.2), ("difference", 2, 0.6), ("tuned", 1, 0.3),
            ("random#0", 1, 0.0), ("random#1", 1, 0.4),
        ]
    ]  # fmt: skip
    [cell] = tables.steered([{"variant": "DFC 5 %", "moon": tries}], "moon").to_dict("records")
    assert (cell["raise: difference"], cell["raise: random"], cell["raise: nothing"]) == (0.6, 0.4, 0.1)
    assert (cell["mitigate: difference"], cell["mitigate: random"]) == (0.8, 1.0)
