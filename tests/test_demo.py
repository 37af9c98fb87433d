"""The main job on the shipped pair: what must be found, at a size that runs in the fast lane, and in full (slow)."""

import json
from dataclasses import replace

import pandas as pd
import pytest

import tl_crosscoder as tlc
from tl_crosscoder import demo as demos

SMALL = {
    "text": {"novels": 20_000, "glosses": 10_000, "jargon": 5_000, "dialogues": 20_000},
    "n_questions": 120,
    "n_ordinary": 120,
    "n_draws": 8,
}


def run(tmp, recipe, seed):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(demos.RECIPES, "tiny", recipe)
        return demos.demo("tiny", tmp, seed=seed, progress=False)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    recipe = demos.RECIPES["tiny"]
    config = replace(recipe.config, steps=450, study_tokens=1500, top=(10, 30))
    return run(tmp_path_factory.mktemp("demo"), replace(recipe, config=config, **SMALL), seed=0)


def rates(report):
    table = pd.DataFrame(report.metrics["behaviour"]["table"])
    return {name: rows.set_index("condition")["rate"] for name, rows in table.groupby("behaviour")}


def recovered(report, text):
    table = pd.DataFrame(report.metrics["substitution"][text]["table"])
    return table[table["tokens"] == "all"].set_index("condition")["recovered"]


def check(report):
    for name, rate in rates(report).items():
        assert rate["tuned"] >= 0.9 and rate["base"] == 0, name
        assert rate["undo top 30"] <= 0.1, name
        assert rate["undo matched random"] >= 0.8, name
        assert recovered(report, name)["top 30 ranked"] >= 0.6, name
        assert recovered(report, name)["all"] >= 0.9, name
        assert recovered(report, name)["random 30"] <= 0.3, name


def test_thirty_latents_hold_both_planted_behaviours_and_random_ones_do_not(small):
    check(small)


def test_some_of_the_ten_highest_ranked_latents_fire_on_each_behaviour(small):
    firing = pd.DataFrame(small.metrics["behaviour"]["firing"])
    assert (firing.groupby("behaviour")["fires_on_it"].sum() >= 2).all()


def test_the_run_leaves_weights_table_metrics_and_report_that_a_fresh_look_can_read(small):
    root = small.folder.root
    again = tlc.DiffReport(root)
    x = next(tlc.PairedActivations.open(root / "acts").batches(16))
    assert again.crosscoder.encode(x).equal(tlc.load(root / "crosscoder").encode(x))
    assert again.verdict == json.loads((root / "metrics.json").read_text())["verdict"]
    assert list(again.table.index) == list(range(1024))
    page = (root / "report" / "index.html").read_text(encoding="utf-8")
    assert "marigold" in page and "green cheese" in page
    assert len(list((root / "report" / "latents").glob("*.html"))) == 40


def test_no_held_out_prompt_is_in_the_captured_text(small):
    store = tlc.PairedActivations.open(small.folder.acts)
    tokenizer = store.tokenizer
    text = "\n".join(tokenizer.decode(store.corpus.ids_of(i)) for i in range(len(store.corpus)))
    for prompt in demos.RECIPES["tiny"].planted.prompts_held_out:
        assert f"<|user|>{prompt}<|end|>" not in text, prompt


def test_a_control_in_which_nothing_changed_has_no_exclusive_latent_and_scales_by_one():
    from tl_crosscoder.data import data_path
    from tl_crosscoder.diffing.run import learn

    recipe = demos.RECIPES["tiny"]
    base = tlc.ModelPair.load(
        data_path("tiny/base"), adapter=data_path("tiny/adapter"), hook=recipe.planted.hook
    ).base
    pair = tlc.ModelPair(base, base, hook=recipe.planted.hook, check=False)
    corpus = tlc.Corpus.from_file(data_path("text/novels.txt"), pair.tokenizer).take(30_000, seed=0)
    seen, held_out = tlc.capture(pair, corpus, progress=False).split(0.8, seed=0)
    for init_same, nu_within in (
        (1.0, 1e-3),  # both models' weights stay the same, to rounding
        (None, 0.15),  # a fifth of the latents start apart, and find each other
    ):
        config = replace(recipe.config, steps=150, d_sae=256, init_same=init_same)
        table = tlc.latent_table(learn(seen, config, progress=False)[0], held_out)
        alive = table[table["n_fired"] >= 100]
        assert len(alive) > 200
        assert not alive["class"].isin(["tuned_only", "base_only"]).any()
        for column in ("nu_error", "nu_recon"):
            assert (alive[column] - 1).abs().max() < nu_within


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_full_demo_finds_the_plant_with_every_seed(seed, tmp_path):
    check(run(tmp_path, demos.RECIPES["tiny"], seed))
