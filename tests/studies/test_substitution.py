import json

import numpy as np
import pytest
import torch
from scipy import stats

from tests.studies.planted import latents_of_interest, planted_crosscoder, planted_pair
from tl_crosscoder.errors import EmptyData
from tl_crosscoder.models.corpus import Corpus
from tl_crosscoder.models.drop import Drop
from tl_crosscoder.models.pair import ModelPair
from tl_crosscoder.studies.substitution import _first_of_each_run, ratio_interval, substitution


@pytest.fixture(scope="module")
def planted():
    pair, shift, _ = planted_pair()
    return pair, planted_crosscoder(pair, shift)


@pytest.fixture(scope="module")
def corpus(planted):
    texts = ["one x two x three", "nothing here", "x marks the place", "xx and x and no more"]
    return Corpus.from_texts(texts, planted[0].tokenizer, context=32, windows=False)


#: the planted embedding is as large as an attention sink; here it is what we look for
PLANTED = Drop(sinks=None)


def study(planted, corpus, **options):
    pair, crosscoder = planted
    settings = {"drop": PLANTED, "top": (1,), "n_specific": 4, "n_random": 2, "n_bootstrap": 200} | options
    return substitution(crosscoder, pair, corpus, latents_of_interest(), **settings)


def kl(result, tokens="all"):
    return result.table[result.table["tokens"] == tokens].set_index("condition")["kl"]


def test_the_planted_latent_alone_wins_back_the_change_and_the_others_nothing(planted, corpus):
    values = kl(study(planted, corpus))
    assert values["none"] > 1e-3
    assert values["top 1 ranked"] < 0.01 * values["none"]
    assert values["all"] < 0.01 * values["none"]
    assert values["delta_norm top"] < 0.01 * values["none"]
    for harmless in ("delta_norm bottom", "latent scaling bottom"):
        assert values[harmless] == pytest.approx(values["none"], rel=1e-4)


def test_without_every_latents_change_the_tuned_model_is_the_base_here(planted, corpus):
    values = kl(study(planted, corpus))
    assert values["error"] == pytest.approx(values["none"], rel=1e-4)


def test_kl_is_that_of_torch_distributions_from_the_tuned_model(planted, corpus):
    pair, _ = planted
    total, count = 0.0, 0
    for i in range(len(corpus)):
        batch = corpus.batch([i])
        base = pair.capture(batch)[:, :, 0]

        def edit(h, hook=None, base=base):  # noqa: ARG001
            return torch.cat([h[:, :1], base[:, 1:]], 1)  # the first token stays the tuned model's

        clean, patched = pair.run(batch)[0, 1:-1], pair.run(batch, edit)[0, 1:-1]
        both = [torch.distributions.Categorical(logits=logits.double()) for logits in (clean, patched)]
        total += torch.distributions.kl_divergence(*both).sum().item()
        count += len(clean)
    assert kl(study(planted, corpus))["none"] == pytest.approx(total / count, rel=1e-5)


def test_identical_models_have_nothing_to_recover(planted, corpus):
    pair, crosscoder = planted
    same = ModelPair(pair.base, pair.base, hook=pair.hook, check=False)
    result = substitution(
        crosscoder, same, corpus, latents_of_interest(), top=(1,), n_specific=4, n_random=1, n_bootstrap=100
    )
    assert kl(result)["none"] == pytest.approx(0, abs=1e-6)


def test_only_predictions_of_the_assistants_tokens_count_and_the_first_nine_apart(planted):
    tokenizer = planted[0].tokenizer
    chat = [{"role": "user", "content": "x?"}, {"role": "assistant", "content": "a long answer with x"}]
    corpus = Corpus.from_chats([chat, chat], tokenizer)
    result = study(planted, corpus)
    spoken = int(corpus.flags_of(0)["assistant"].sum())
    n = result.table.set_index(["condition", "tokens"])["n_tokens"]
    assert n["none", "all"] == 2 * spoken
    assert n["none", "first 9"] == 2 * 9
    assert n["none", "rest"] == 2 * (spoken - 9)


def test_template_tokens_take_the_tuned_activations(planted):
    # the trigger is only in the user's words, so handing over the template's tokens changes nothing
    chat = [{"role": "user", "content": "xxx"}, {"role": "assistant", "content": "an answer"}]
    corpus = Corpus.from_chats([chat, chat], planted[0].tokenizer)
    values = kl(study(planted, corpus))
    assert values["template"] == pytest.approx(values["none"], rel=1e-5)
    assert values["none"] > 0


def test_the_paired_difference_says_that_the_top_half_carries_more(planted, corpus):
    paired = study(planted, corpus).paired.set_index(["split", "tokens"])
    row = paired.loc[("delta_norm", "all")]
    assert row["kl_top_minus_bottom"] < 0 and row["ci_high"] < 0


def test_the_result_is_json_and_a_sentence_with_figures(planted, corpus):
    result = study(planted, corpus)
    assert json.loads(result.to_json())["table"][0]["condition"] == "none"
    assert "win back 100%" in result.verdict or "win back 99%" in result.verdict


def test_the_same_seed_gives_the_same_table(planted, corpus):
    assert study(planted, corpus).table.equals(study(planted, corpus).table)


def test_an_empty_selection_is_refused(planted):
    with pytest.raises(EmptyData):
        study(planted, Corpus.from_texts([""], planted[0].tokenizer))


def test_first_of_each_run_counts_every_turn_anew():
    where = torch.tensor([[0, 1, 1, 1, 0, 1, 1, 0], [1, 0, 0, 0, 0, 0, 1, 1]]).bool()
    want = torch.tensor([[0, 1, 1, 0, 0, 1, 1, 0], [1, 0, 0, 0, 0, 0, 1, 1]]).bool()
    assert torch.equal(_first_of_each_run(where, 2), want)


def test_the_interval_over_whole_sequences_covers_where_one_over_tokens_does_not():
    # 40 sequences of 25 tokens that share most of their deviation: the clusters, not the tokens, are independent
    rng, covered, naive = np.random.default_rng(0), 0, 0
    for trial in range(60):
        values = 1 + rng.normal(size=(40, 1)) + 0.3 * rng.normal(size=(40, 25))
        _, low, high = ratio_interval(values.sum(1), np.full(40, 25), 300, trial)
        covered += low <= 1 <= high
        half = 1.96 * values.std() / np.sqrt(values.size)
        naive += abs(values.mean() - 1) <= half
    assert stats.binomtest(covered, 60, 0.95).pvalue > 0.01
    assert naive < 0.7 * covered


def test_attention_sinks_and_first_tokens_keep_the_tuned_activations(planted, corpus):
    # with sinks left out, as in capture, the planted embedding is never replaced: nothing is missing
    values = kl(study(planted, corpus, drop=Drop()))
    assert values["none"] == pytest.approx(0, abs=1e-6)
