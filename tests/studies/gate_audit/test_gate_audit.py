"""The planted cases: a latent that the answers depend on, and a drift that nothing reads."""

import inspect
import json

import pytest

from tests.studies.readout import DROP, answers_to, prompts, readout_pair, readout_store, written_down
from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.dictionary.init import Init
from tl_crosscoder.dictionary.losses import MSE, AuxK
from tl_crosscoder.dictionary.normalizer import Normalizer
from tl_crosscoder.dictionary.sparsity import BatchTopK
from tl_crosscoder.studies.gate_audit import AuditResult, ExactMatch, Gate, Unchanged, gate_audit
from tl_crosscoder.studies.gate_audit.arms import arm
from tl_crosscoder.studies.gate_audit.gates import measured
from tl_crosscoder.studies.result import StudyResult
from tl_crosscoder.training.config import TrainConfig
from tl_crosscoder.training.train import train

ASKED = prompts(64, planted=True)
OTHERS = Unchanged("others", prompts(48, planted=False))


def learn(name, _store, seed):
    return written_down(name, seed)


def audited(case, **options):
    pair = readout_pair(heard=case == "causal")
    task = ExactMatch("letters", ASKED, answers_to(ASKED)) if case == "causal" else Unchanged("own", ASKED)
    settings = {
        "gate": Gate(least=50),
        "seeds": (0, 1),
        "task": task,
        "off_task": OTHERS,
        "drop": DROP,
        "max_new_tokens": 1,
    }
    settings |= {"n_matched": 20, "n_turned": 2, "n_null": 59, "progress": False, "pair": pair} | options
    store = readout_store(pair)
    return gate_audit(store, learn, **settings)


@pytest.fixture(scope="module")
def causal():
    return audited("causal")


@pytest.fixture(scope="module")
def drift():
    return audited("drift")


def counts(result, name):
    rows = result.table[(result.table["arm"] == name) & (result.table["threshold"] == 5 / 6)]
    return [int(n) for n in rows["counts"].item().split()]


def test_a_causal_latent_passes(causal):
    assert causal.word == "PASS", causal.verdict
    a = causal.ablation
    assert a["accuracy_none"] == 1 and a["accuracy_gated"] < 0.1 < 0.9 < a["accuracy_matched"]
    assert a["effect"] > 0.8 and a["low"] > 0.7 and a["rank_p"] == 1 / 21 and a["kl_gated"] > a["kl_matched"]
    assert a["mcnemar_matched"][2] < 1e-6 and a["off_effect"] < 0.1


def test_a_drift_that_nothing_reads_is_stable_and_not_causal(drift):
    assert drift.word == "STABLE_NOT_CAUSAL", drift.verdict
    assert drift.ablation["accuracy_gated"] > 0.95 and drift.ablation["harmless_p"] < 0.05
    assert counts(drift, "target") == [3, 3]


def test_the_gate_finds_the_planted_directions_and_nothing_where_there_is_nothing(causal):
    assert counts(causal, "target") == [3, 3]
    assert counts(causal, "identity") == counts(causal, "noise") == [0, 0]
    assert counts(causal, "disjoint") == [
        11,
        11,
    ]  # two sides that merely differ: each concept has a latent of tuned's own


@pytest.mark.slow
def test_trained_crosscoders_find_nothing_in_identical_sides_and_much_in_disjoint_ones():
    store, gate = readout_store(readout_pair(heard=True)), Gate(least=50)
    passing = {}
    for name in ("identity", "disjoint"):
        there = arm(store, name)
        made = Crosscoder(16, 24, BatchTopK(3), normalizer=Normalizer.fit(there), init=Init(norm=0.5))
        config = TrainConfig(steps=250, lr=1e-2, progress=False)
        train(made, there.shuffled(256), [MSE(), AuxK(dead_after_tokens=3000)], config)
        passing[name] = len(gate.passing(measured(made, there, gate)))
    assert passing["identity"] == 0 and passing["disjoint"] >= 4


def test_both_seeds_find_the_same_directions_and_chance_does_not(causal):
    row = causal.stability.set_index("latents").loc["non-lexical"]
    assert row["matched"] == row["size"] == 3 and row["share"] == row["upper_bound"] == 1
    assert row["p_rotation"] <= 0.05 and row["p_random"] <= 0.05 and row["rotation"] < 0.1
    assert row["correlation"] == pytest.approx(1) and row["correlation_elsewhere"] == pytest.approx(1)
    assert not causal.latents["lexical"].any()


def test_without_a_task_the_verdict_says_what_was_not_asked():
    result = audited("causal", task=None, pair=None)
    assert result.word == "UNDERPOWERED" and "was not asked" in result.verdict[0]
    assert result.ablation == {} and result.answers.empty


def test_where_nothing_passes_it_says_where_something_would():
    result = audited("causal", gate=Gate(threshold=1.0, least=50))
    assert result.word == "UNDERPOWERED" and "nothing to ask about" in result.verdict[0]
    assert "latents a crosscoder would pass" in result.verdict[-1]


def test_the_result_is_read_back_with_its_panel(causal):
    read = StudyResult.from_dict(json.loads(causal.to_json()))
    assert isinstance(read, AuditResult) and read.verdict == causal.verdict
    assert read.panel().figure is not None


def test_what_was_measured_is_not_measured_again(tmp_path, monkeypatch, causal):
    audited("causal", parts=tmp_path)

    def never(*_, **__):
        raise AssertionError("measured again")

    for name in ("measured", "outcomes"):
        monkeypatch.setattr(f"tl_crosscoder.studies.gate_audit.audit.{name}", never)
    again = audited("causal", parts=tmp_path)
    assert again.word == "PASS" and again.table.equals(causal.table)


def test_kept_answers_are_marked_by_the_task_as_it_is_now(tmp_path, causal):
    audited("causal", parts=tmp_path)
    wrong = ExactMatch("letters", ASKED, tuple("?" for _ in ASKED))
    again = audited("causal", task=wrong, parts=tmp_path)
    assert causal.ablation["accuracy_none"] == 1 and again.ablation["accuracy_none"] == 0
    assert again.ablation["log_prob_gated"] != causal.ablation["log_prob_gated"]


@pytest.mark.parametrize("seeds", [(0,), (1, 1)])
def test_one_seed_is_no_audit(seeds):
    with pytest.raises(ValueError, match="two seeds"):
        audited("causal", seeds=seeds)


def test_a_task_without_models_is_refused_before_any_training():
    with pytest.raises(ValueError, match="wants the models"):
        audited("causal", pair=None)


@pytest.mark.parametrize("wrong", [{"noise": "white"}, {"part": "half"}])
def test_an_unknown_noise_or_part_is_refused_before_any_training(wrong):
    unchecked = inspect.unwrap(gate_audit)  # the types are checked in tests alone
    with pytest.raises(ValueError, match=r"known: (scale|whole), "):
        unchecked(readout_store(readout_pair(heard=True)), lambda *_: pytest.fail("trained"), **wrong)


def test_tokens_that_the_store_left_out_are_not_edited_either(monkeypatch):
    found = {}

    def asked(*_, drop, **__):
        found["drop"] = drop
        raise InterruptedError

    monkeypatch.setattr("tl_crosscoder.studies.gate_audit.audit.outcomes", asked)
    with pytest.raises(InterruptedError):
        audited("causal", drop=None)
    assert found["drop"] == DROP  # of readout_store


def test_too_few_matched_sets_for_any_verdict_are_refused_before_any_training():
    # Of 18 sets the best rank has p = 1 / 19 = .053.
    with pytest.raises(ValueError, match=r"n_matched=18 sets no rank has a p below 0\.053.*19 sets or more"):
        audited("causal", n_matched=18)


def test_a_task_for_models_without_a_chat_template_is_refused_before_any_training():
    pair = readout_pair(heard=True)
    pair.tokenizer.chat_template = None
    store = readout_store(readout_pair(heard=True))
    with pytest.raises(ValueError, match=r"no chat template.*copy the fine-tuned model's"):
        gate_audit(
            store,
            lambda *_: pytest.fail("trained"),
            seeds=(0, 1),
            pair=pair,
            task=ExactMatch("letters", ASKED, answers_to(ASKED)),
        )
