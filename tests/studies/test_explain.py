"""A store whose latents fire on known tokens: descriptions, passages and scores are then known too."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from tests.analysis.crosscoders import random_crosscoder
from tests.models.fake_pair import FakePair, byte_tokenizer
from tests.studies.planted import LATENTS, planted_crosscoder, planted_pair
from tl_crosscoder.analysis.logit_effects import COLUMNS
from tl_crosscoder.models.capture import capture
from tl_crosscoder.models.corpus import Corpus
from tl_crosscoder.models.drop import Drop
from tl_crosscoder.studies import StudyResult
from tl_crosscoder.studies.explain import _accuracy, explain
from tl_crosscoder.studies.judge import Claim, TokenJudge, Verdict
from tl_crosscoder.studies.passages import AFTER, BEFORE, BINS, Passages

PLANTED = 0


@pytest.fixture(scope="module")
def planted():
    """60 texts of random letters, "x" in half of them: the planted latent fires there with 1 and nowhere else."""
    pair, shift, _ = planted_pair()
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("abcdefgh"), 30)) for _ in range(60)]
    texts = [t[:15] + "x" + t[15:] if i % 2 else t for i, t in enumerate(texts)]
    corpus = Corpus.from_texts(texts, byte_tokenizer(), context=64, windows=False)
    store = capture(pair, corpus, drop=Drop(sinks=None), progress=False)
    return planted_crosscoder(pair, shift), store


@pytest.fixture(scope="module")
def contextual():
    """Latents that fire on one token in forty, by what came before as much as by the token itself."""
    rng = np.random.default_rng(1)
    texts = ["".join(rng.choice(list("abcdefgh"), 60)) for _ in range(60)]
    corpus = Corpus.from_texts(texts, byte_tokenizer(), context=64, windows=False)
    store = capture(FakePair(byte_tokenizer()), corpus, drop=Drop(sinks=None), progress=False)
    crosscoder = random_crosscoder(d_in=4, d_sae=LATENTS, threshold=None, normalizer=False)
    x = torch.cat(list(store.batches())).double()
    with torch.no_grad():
        crosscoder.b_enc -= crosscoder.pre_acts(x).quantile(0.975, dim=0)
    return crosscoder, store


class Fixed:
    """A judge that gives ``say(passage, n)``."""

    name = "fixed"

    def __init__(self, say):
        self.say, self.n = say, 0

    def holds(self, claim, passages):  # noqa: ARG002
        found = []
        for passage in passages:
            assert not passage.acts, "the judge must not see activations"
            found.append(self.say(passage, self.n))
            self.n += 1
        return found


def study(planted, **options):
    crosscoder, store = planted
    settings = {"groups": [PLANTED], "per_bin": 10, "n_silent": 10} | options
    return explain(crosscoder, store, settings.pop("groups"), **settings)


def test_the_planted_latent_is_described_by_its_token_and_told_apart_perfectly(planted):
    result = study(planted)
    row = result.table.loc[0]
    assert row["description"] == "fires on ‹x›" and row["score_random"] == 1
    assert row["n_firing"] == 10 and row["n_random"] == 10
    assert row["n_similar"] == 0 and math.isnan(row["score_similar"])  # it fires on every x


def test_one_answer_to_everything_scores_one_half_exactly(planted):
    for said in (True, False):
        result = study(planted, judge=Fixed(lambda *_, said=said: Verdict(said)), groups=list(range(LATENTS)))
        scores = result.table[["score_random", "score_similar"]].to_numpy(float)
        assert set(scores[~np.isnan(scores)]) == {0.5}


def test_a_random_answer_scores_one_half_on_average(planted):
    rng = np.random.default_rng(0)
    coin = Fixed(lambda *_: Verdict(bool(rng.integers(2))))
    scores = [study(planted, judge=coin, seed=s).table["score_random"].item() for s in range(30)]
    # sd of one score: sqrt(2 · .25 / 10) / 2 = .11; of the mean of 30 .02
    assert np.mean(scores) == pytest.approx(0.5, abs=0.08) and np.std(scores) > 0.03


def test_accuracy_is_the_mean_of_both_sides_by_hand():
    yes, no, lost = Verdict(True), Verdict(False), Verdict(None, "?")
    verdicts = {"high": [yes, yes, no, lost], "random": [no, no, no, yes]}
    assert _accuracy(verdicts, "high", "random") == (pytest.approx((2 / 3 + 3 / 4) / 2), 3, 4)
    assert math.isnan(_accuracy({"high": [yes], "random": [no, no]}, "high", "random")[0])


def test_shown_and_judged_passages_come_from_different_conversations(planted):
    crosscoder, store = planted
    passages = Passages(crosscoder, store, [PLANTED], max_tokens=10**6, seed=0)
    rng = np.random.default_rng(0)
    shown = {p.text for p in passages.strongest(PLANTED, 99)}
    fires = [p for part in passages.firing(PLANTED, 99, rng).values() for p in part]
    assert shown and fires and not shown & {p.text for p in fires}
    assert len(shown) + len(fires) == 30


def test_windows_bins_and_silence_are_those_of_a_loop(contextual):
    crosscoder, store = contextual
    passages = Passages(crosscoder, store, range(LATENTS), max_tokens=10**6, seed=0)
    with torch.no_grad():
        acts = {s: crosscoder.encode(store.rows_of(s).x.double()) for s in store.sequences}
    for latent in range(LATENTS):
        largest = max(float(a[:, latent].max()) for a in acts.values())
        rng = np.random.default_rng(0)
        for name, some in passages.firing(latent, 5, rng).items():
            for p in some:
                low, high = dict(zip(BINS, ((0, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1)), strict=True))[
                    name
                ]
                assert low * largest < max(p.acts) * (1 + 1e-6) and max(p.acts) <= high * largest * (1 + 1e-6)
                assert len(p.tokens) <= BEFORE + 1 + AFTER
        for some in passages.silent(latent, 5, rng).values():
            assert all(max(p.acts) == 0 for p in some)
    key = int(passages.fired[3][0][0])
    sequence, position = divmod(key, 1 << 24)
    rows = store.rows_of(sequence)
    place = rows.position.tolist().index(position)
    middle = passages.passage(3, key).acts[min(position, BEFORE)]
    assert middle == pytest.approx(float(acts[sequence][place, 3]), rel=1e-5)


def test_similar_passages_hold_a_token_that_excites_the_latent_elsewhere(contextual):
    crosscoder, store = contextual
    found = 0
    for latent in range(LATENTS):
        passages = Passages(crosscoder, store, [latent], max_tokens=10**6, seed=0)
        shown = passages.strongest(latent, 10)
        peaks = {p.tokens[int(np.argmax(p.acts))] for p in shown}
        for p in passages.silent(latent, 10, np.random.default_rng(0))["similar"]:
            assert peaks & set(p.tokens)
            found += 1
    assert found > 5


def test_what_the_judge_could_not_answer_is_listed_and_the_rest_counts(planted):
    def say(passage, n):
        return Verdict(None, "hm") if n % 5 == 0 else Verdict("x" in passage.tokens)

    result = study(planted, judge=Fixed(say))
    assert result.table["score_random"].item() == 1
    assert len(result.unusable) == result.table["n_unjudged"].item() == 4
    assert set(result.unusable["said"]) == {"hm"}


def test_what_the_judge_could_not_answer_is_asked_again_and_what_it_answered_is_not(planted, tmp_path):
    asked = []

    def moody(works):
        def say(passage, _):
            asked.append(works)
            return Verdict("x" in passage.tokens) if works else Verdict(None, "busy")

        return Fixed(say)

    first = study(planted, judge=moody(False), parts=tmp_path)
    again = study(planted, judge=moody(True), parts=tmp_path)
    n = len(asked)
    third = study(planted, judge=moody(True), parts=tmp_path)
    assert (first.table["n_unjudged"] > 0).all() and (again.table["n_unjudged"] == 0).all()
    assert len(asked) == n and third.to_json() == again.to_json()


def test_a_latent_that_could_not_be_described_is_described_another_time(planted, tmp_path):
    class Moody(TokenJudge):
        works = False

        def describe(self, examples):
            return super().describe(examples) if self.works else None

    first = study(planted, explainer=Moody(), parts=tmp_path)
    assert first.table["description"].item() == "" and first.table["score_random"].isna().all()
    Moody.works = True
    again = study(planted, explainer=Moody(), parts=tmp_path)
    assert again.table["description"].item() == "fires on ‹x›" and again.table["score_random"].item() == 1


def test_a_latent_that_never_fires_has_no_score_and_stops_nothing(planted):
    crosscoder, _ = planted
    silent = crosscoder.b_enc.detach()[1].clone()
    with torch.no_grad():
        crosscoder.b_enc[1] = -1e6
    try:
        result = study(planted, groups={"chosen": [PLANTED], "dead": [1]})
    finally:
        with torch.no_grad():
            crosscoder.b_enc[1] = silent
    row = result.table.set_index("latent").loc[1]
    assert row["description"] == "" and math.isnan(row["score_random"]) and row["n_firing"] == 0
    assert result.verdict[0].startswith("chosen: detection score 1.00 against random")
    assert result.verdict[1] == "dead: none of 1 latents fires in enough passages to be scored."


def test_another_latents_words_do_not_tell_where_it_fires(planted):
    class Named(TokenJudge):
        """Describes the planted latent truly and any other by a token that is nowhere."""

        def describe(self, examples):
            true = super().describe(examples)
            return true if true and true.words == ("x",) else Claim("fires on ‹?›", ("?",))

    result = study(planted, groups=[PLANTED, 3], explainer=Named())
    row = result.table.set_index("latent").loc[PLANTED]
    assert row["score_random"] == 1 and row["score_shuffled"] == 0.5


def test_a_group_mean_has_students_interval_over_latents(contextual):
    result = study(contextual, groups={"all": range(LATENTS)})
    scores = result.table["score_random"].dropna().to_numpy(float)
    assert len(scores) > 3
    row = result.groups.query("against == 'random'").iloc[0]
    spread = stats.t.ppf(0.975, len(scores) - 1) * scores.std(ddof=1) / len(scores) ** 0.5
    assert (row["mean"], row["low"], row["n"]) == pytest.approx(
        (scores.mean(), scores.mean() - spread, len(scores))
    )


def test_it_goes_on_where_it_was_and_reads_back(planted, tmp_path):
    judge = Fixed(lambda p, _: Verdict("x" in p.tokens))
    first = study(planted, judge=judge, parts=tmp_path)
    asked = judge.n
    again = study(planted, judge=judge, parts=tmp_path)
    assert judge.n == asked and again.to_json() == first.to_json()
    back = StudyResult.from_dict(first.to_dict())
    assert back.verdict == first.verdict and first.panel().figure.startswith("<svg")


def test_latents_that_are_not_there_are_refused(planted):
    for bad in ([], [LATENTS]):
        with pytest.raises(IndexError, match="explain wants latents"):
            study(planted, groups=bad)


def test_what_a_latent_promotes_stands_in_the_table(planted):
    rows = [
        (PLANTED, "tuned", path, "promotes", rank, f" {path}{rank}", 1.0)
        for path in ("direct", "causal")
        for rank in range(4)
    ]
    rows += [
        (1, "base", "direct", "promotes", 0, "\n", 1.0),
        (1, "base", "direct", "suppresses", 0, "no", -1.0),
    ]
    effects = pd.DataFrame(rows, columns=COLUMNS)
    table = study(planted, groups=[PLANTED, 1], effects=effects).table.set_index("latent")
    # of both kinds the measured one, its first three; whitespace is made visible
    assert table.loc[PLANTED, ["promotes_base", "promotes_tuned"]].tolist() == [
        "",
        "‹ causal0› ‹ causal1› ‹ causal2›",
    ]
    assert table.loc[1, ["promotes_base", "promotes_tuned"]].tolist() == ["‹↵›", ""]
    assert "promotes_base" not in study(planted).table


def test_a_rule_with_other_settings_describes_anew(planted, tmp_path):
    plain = study(planted, groups=[1, 2, 3], parts=tmp_path)
    short = study(planted, groups=[1, 2, 3], explainer=TokenJudge(most=1), parts=tmp_path)
    assert (plain.table["description"].str.count("‹") > 1).any()
    assert (short.table["description"].str.count("‹") <= 1).all()
