"""A pair whose whole difference is one direction on one token: adding or subtracting it must move the answers over."""

import copy
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from tests.studies.planted import latents_of_interest, planted_crosscoder, planted_pair
from tl_crosscoder.data.planted import Behaviour
from tl_crosscoder.figures import NotDrawn
from tl_crosscoder.figures.strength_curves import strength_curves
from tl_crosscoder.interventions import steer
from tl_crosscoder.models.answers import turn_ends
from tl_crosscoder.models.corpus import Corpus
from tl_crosscoder.models.drop import Drop
from tl_crosscoder.studies import StudyResult
from tl_crosscoder.studies.judge import Verdict
from tl_crosscoder.studies.pushes import pushes
from tl_crosscoder.studies.steering import steering
from tl_crosscoder.studies.steering_table import stopped
from tl_crosscoder.studies.sweep import Sweep, nll

PROMPT = (
    "xxxxxxxx"  # nothing but the trigger, so that a constant vector is the planted change on every word of it
)
HOW = {"drop": Drop(sinks=None, special=True, template=True), "max_new_tokens": 1}
STRENGTHS = (-1.0, 0.0, 1.0)


def table():
    return latents_of_interest().assign(max_act=1.0)


@pytest.fixture(scope="module")
def planted():
    pair, shift, _ = planted_pair()
    return pair, planted_crosscoder(pair, shift)


def first_words(pair):
    """What base and tuned say first: what steering has to exchange."""
    batch = Corpus.prompts([PROMPT], pair.tokenizer).batch([0], pad="left")
    ids = [side.generate(batch, 1, stop_ids=turn_ends(pair)) for side in (pair.base, pair.tuned)]
    return [text.strip() for text in pair.tokenizer.batch_decode(torch.cat(ids))]


class SaysTuned:
    """A judge that knows what the tuned model says."""

    name = "says-tuned"

    def __init__(self, word):
        self.word, self.asked = word, 0

    def holds(self, claim, passages):  # noqa: ARG002
        self.asked += len(passages)
        return [Verdict(p.text == self.word) for p in passages]


def study(planted, **options):
    pair, crosscoder = planted
    behaviour = Behaviour(name="trigger", keywords=("?",), heldout=(PROMPT,))
    settings = {
        "latents": [0],
        "strengths": STRENGTHS,
        "open_prompts": (),
        "n_controls": 2,
        "progress": False,
    } | HOW
    return steering(crosscoder, pair, [behaviour], table(), **settings | options)


@pytest.fixture(scope="module")
def result(planted):
    base, tuned = first_words(planted[0])
    assert base != tuned
    return study(planted, judge=SaysTuned(tuned))


def rate(result, side, strength, target="latent 0"):
    rows = result.table.set_index(["side", "target", "kind", "strength"])["rate"]
    return rows.loc[side, target, "latents", strength]


def test_adding_the_planted_direction_installs_the_behaviour_and_subtracting_it_takes_it_away(result):
    assert rate(result, "base", 0, "none") == 0 and rate(result, "tuned", 0, "none") == 1
    assert rate(result, "base", 1) == 1
    assert rate(result, "tuned", -1) == 0


def test_strength_zero_is_no_edit(result):
    answers = result.answers.set_index(["side", "target", "kind", "strength"]).sort_index()
    for side in ("base", "tuned"):
        plain = answers.loc[(side, "none", "latents", 0.0), "answer"]
        assert set(result.answers.query("side == @side and strength == 0")["answer"]) == {plain}
    text = result.table.query("strength == 0").groupby("side")[["perplexity_base", "perplexity_tuned"]]
    assert (text.nunique() == 1).all(axis=None)


def test_one_unit_is_what_steer_writes_at_the_largest_activation(planted):
    pair, crosscoder = planted
    made = pushes(crosscoder, table().assign(max_act=2.5), [3], part="whole", n_controls=1, seed=0)
    acts = torch.randn(2, 3, pair.d_in, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(acts + made[0].vector, steer(crosscoder, [3], 2.5)(acts))
    assert made[0].unit == 2.5


def test_controls_have_the_norm_of_their_target_and_a_set_is_the_sum(planted):
    _, crosscoder = planted
    made = pushes(crosscoder, table(), [1, 2], part="whole", n_controls=3, seed=0)
    norms = {p.target: float(p.vector.norm()) for p in made if p.kind == "latents"}
    assert [p.target for p in made if p.kind == "latents"] == ["latent 1", "latent 2", "all 2"]
    assert len(made) == 3 * (1 + 2 * 3)
    assert all(float(p.vector.norm()) == pytest.approx(norms[p.target], rel=1e-5) for p in made)
    alone, other, both = (next(p.vector for p in made if p.target == t) for t in norms)
    torch.testing.assert_close(both, alone + other)
    difference = pushes(crosscoder, table(), [0], part="difference", n_controls=1, seed=0)[0]
    torch.testing.assert_close(difference.vector, crosscoder.raw_rows()[0, 1] - crosscoder.raw_rows()[0, 0])


def test_latents_that_write_no_difference_are_no_controls_of_one(planted):
    _, crosscoder = planted  # latents 1 to 7 write the same into both models
    made = pushes(crosscoder, table(), [0], part="difference", n_controls=2, seed=0)
    assert [p.kind for p in made] == ["latents", *["random directions"] * 2]
    other = copy.deepcopy(crosscoder)
    with torch.no_grad():
        other.W_dec[5, 1] += 1
    made = pushes(other, table(), [0], part="difference", n_controls=2, seed=0)
    drawn = [p.vector for p in made if p.kind == "random latents"]
    for v in drawn:
        torch.testing.assert_close(v / v.norm(), torch.full((16,), 0.25), atol=1e-6, rtol=1e-5)
    assert len(drawn) == 2


def test_perplexity_is_that_of_a_loop_over_the_answers_tokens(planted):
    pair, _ = planted
    sweep = Sweep(
        pair, ["xx", "a longer one"], None, drop=HOW["drop"], max_new_tokens=6, temperature=0.0, seed=0
    )
    [first, second] = sweep.speak("base", torch.zeros(pair.d_in), [0.0])
    prompts = Corpus.prompts(["xx", "a longer one"], pair.tokenizer)
    for i, answer in enumerate((first, second)):
        alone = prompts.batch([i], pad="left")
        new = pair.base.generate(alone, 6, stop_ids=turn_ends(pair))[0, : answer["n_tokens"]]
        for side in ("base", "tuned"):
            total, ids = 0.0, alone.ids
            for token in new:
                logits = pair.run(ids, side=side)[0, -1].double()
                total -= (logits[token] - logits.logsumexp(-1)).item()
                ids = torch.cat([ids, token.reshape(1, 1)], 1)
            assert answer[f"nll_{side}"] == pytest.approx(total, rel=1e-4)


def test_ordinary_text_costs_what_the_steered_model_makes_of_it(planted):
    pair, _ = planted
    text = Corpus.from_texts(["some text", "and x more"], pair.tokenizer, context=16)
    sweep = Sweep(
        pair, ["x"], text, drop=Drop(first=False, sinks=None), max_new_tokens=1, temperature=0.0, seed=0
    )
    vector = torch.randn(pair.d_in, generator=torch.Generator().manual_seed(2))
    [answer] = sweep.speak("tuned", vector, [3.0])
    values = []
    for i in range(len(text)):
        batch = text.batch([i])
        keep = ~(batch.special & ~batch.template)
        edit = lambda acts, hook=None, keep=keep: acts + 3 * vector * keep[..., None]  # noqa: ARG005
        values += nll(pair.tuned, batch, {pair.hook: edit})[keep[:, :-1]].tolist()
    assert answer["nll_text"] == pytest.approx(np.mean(values), rel=1e-5)


def test_an_answer_less_likely_than_all_unsteered_ones_is_not_coherent(result):
    best = result.answers[["perplexity_base", "perplexity_tuned"]].min(axis=1)
    assert ((best <= result.ceiling * (1 + 1e-6)) == result.answers["coherent"]).all()
    assert result.answers.query("target == 'none'")["coherent"].all()


def test_what_the_judge_could_not_judge_is_counted_apart(planted):
    class Shrugs:
        name = "shrugs"

        def holds(self, claim, passages):  # noqa: ARG002
            return [Verdict(None, "who knows") for _ in passages]

    result = study(planted, judge=Shrugs())
    assert result.table["rate"].isna().all() and (result.table["n"] == 0).all()
    assert (result.table["n_unjudged"] > 0).all() and set(result.answers["judge_said"]) == {"who knows"}
    assert "could not be judged" not in result.verdict[0] and "no answer could be judged" in result.verdict[0]


def test_what_a_judge_left_out_is_neither_shown_nor_gone(result):
    answers = result.answers.copy()
    control = (answers["kind"] != "latents") & (answers["side"] == "tuned")
    answers["shown"] = answers["shown"].mask(control & (answers["strength"] == 1), pd.NA)
    answers.loc[control, "coherent"] = True
    one = control & (answers["draw"] == 1) & (answers["strength"] == -1)
    answers.loc[control, "shown"] = answers.loc[control, "shown"].mask(~one & answers["shown"].notna(), True)
    answers.loc[one, "shown"] = False
    gone = stopped(answers)
    for (_, _, side, _, kind, strength), figures in gone.items():
        if side == "tuned" and kind != "latents":
            assert figures == ((0.5, 1.0) if strength == -1 else (0.0, 0.0))
            assert strength != 1  # nothing was judged
    sentence = replace(result, answers=answers).verdict[0]
    assert (
        "with controls in at most 100%" in sentence
    )  # one draw of two: the best single one, as for what is shown


def test_where_the_unsteered_answers_could_not_be_judged_nothing_is_said(result):
    answers = result.answers.copy()
    answers["shown"] = answers["shown"].mask(answers["target"] == "none", pd.NA)
    assert "could be judged" in replace(result, answers=answers).verdict[0]


def test_without_a_behaviour_the_answers_are_given_and_nothing_is_judged(planted):
    pair, crosscoder = planted
    result = steering(
        crosscoder,
        pair,
        [],
        table(),
        latents=[0],
        strengths=[1.0],
        open_prompts=("a",),
        n_controls=1,
        progress=False,
        **HOW,
    )
    assert set(result.table["behaviour"]) == {"not judged"} and result.table["rate"].isna().all()
    assert len(result.answers) == 2 * (1 + 3)


def test_it_goes_on_where_it_was_and_a_new_judge_speaks_nothing_anew(planted, tmp_path, monkeypatch):
    _, word = first_words(planted[0])
    judge = SaysTuned(word)
    whole = study(planted, judge=judge, parts=tmp_path)
    asked, spoken = judge.asked, []
    plain = Sweep.speak
    monkeypatch.setattr(Sweep, "speak", lambda *args: spoken.append(args) or plain(*args))
    again = study(planted, judge=judge, parts=tmp_path)
    assert judge.asked == asked and not spoken
    pd.testing.assert_frame_equal(again.table, whole.table)
    assert (
        study(planted, parts=tmp_path).table["rate"].max() == 0
    )  # the keyword rule, on answers that are there already
    assert not spoken


def test_a_result_is_read_back_and_drawn(result):
    back = StudyResult.from_dict(result.to_dict())
    assert back.verdict == result.verdict and "latent 0 at 1 in" in result.verdict[0]
    assert back.panel().figure.startswith("<svg")


def test_a_column_that_the_picture_needs_is_named_where_it_is_missing(result):
    for name in ("rate", "perplexity_tuned"):
        with pytest.raises(NotDrawn, match=f"no column {name}"):
            strength_curves(result.table.drop(columns=name))


def test_what_makes_no_sense_is_refused_before_anything_runs(planted):
    with pytest.raises(ValueError, match="finite"):
        study(planted, strengths=[math.nan])
    with pytest.raises(IndexError, match="99"):
        study(planted, latents=[99])
    with pytest.raises(ValueError, match="at least 1"):
        study(planted, n_controls=0)
    pair, crosscoder = planted
    silent = table()
    silent.loc[0, "max_act"] = 0.0
    with pytest.raises(ValueError, match="never fired"):
        steering(crosscoder, pair, [], silent, latents=[0])
