import json
import re

import numpy as np
import pandas as pd
import pytest
import torch

from tests.studies.planted import (
    LATENTS,
    latents_of_interest,
    planted_crosscoder,
    planted_pair,
)
from tests.studies.planted import (
    PLANTED as PLANTED_LATENT,
)
from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.dictionary.sparsity import ReLU
from tl_crosscoder.errors import EmptyData
from tl_crosscoder.models.corpus import Corpus
from tl_crosscoder.models.drop import Drop
from tl_crosscoder.models.pair import ModelPair
from tl_crosscoder.studies import substitution_table as module
from tl_crosscoder.studies.conditions import Reading
from tl_crosscoder.studies.dictionaries import Dictionary
from tl_crosscoder.studies.substitution import substitution


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
    assert result.table["recovered"].isna().all() and "nothing to win back" in result.verdict


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
    assert re.search(r"win back: the \d+ highest-ranked (99|100)% \(\d+% to \d+%\)", result.verdict)


def test_the_same_seed_gives_the_same_table(planted, corpus):
    assert study(planted, corpus).table.equals(study(planted, corpus).table)


def test_an_empty_selection_is_refused(planted):
    with pytest.raises(EmptyData):
        study(planted, Corpus.from_texts([""], planted[0].tokenizer))


def test_attention_sinks_and_first_tokens_keep_the_tuned_activations(planted, corpus):
    # with sinks left out, as in capture, the planted embedding is never replaced: nothing is missing
    values = kl(study(planted, corpus, drop=Drop()))
    assert values["none"] == pytest.approx(0, abs=1e-6)


def every(planted, corpus, **options):
    return study(planted, corpus, conditions="every", **options)


def test_every_condition_of_the_paper_is_there_and_the_tuned_activations_cost_nothing(planted, corpus):
    values = kl(every(planted, corpus))
    assert values["tuned"] == pytest.approx(0, abs=1e-6)
    assert values["base"] > 1e-3
    for name in (
        "bias",
        "all with bias",
        "delta_norm above 0.7",
        "random 2 of all",
        "random 2 of the specific",
    ):
        assert name in values
    assert values["delta_norm above 0.7"] < 0.01 * values["none"]  # that is the planted latent


def test_base_is_the_base_model_end_to_end(planted, corpus):
    pair, _ = planted
    total, count, against = 0.0, 0, 0.0
    for i in range(len(corpus)):
        batch = corpus.batch([i])
        both = [
            torch.distributions.Categorical(logits=pair.run(batch, side=side)[0, 1:-1].double())
            for side in ("tuned", "base")
        ]
        total += torch.distributions.kl_divergence(*both).sum().item()
        against -= both[1].log_prob(batch.ids[0, 2:]).sum().item()
        count += len(both[0].logits)
    row = every(planted, corpus).table.query("tokens == 'all'").set_index("condition").loc["base"]
    assert row["kl"] == pytest.approx(total / count, rel=1e-5)
    assert row["nll"] == pytest.approx(against / count, rel=1e-5)
    assert row["kl_base"] == pytest.approx(0, abs=1e-9)
    assert 0 <= row["agreement"] < 1


def test_the_untouched_model_agrees_with_itself_and_the_change_costs_likelihood_of_its_choice(
    planted, corpus
):
    rows = every(planted, corpus).table.query("tokens == 'all'").set_index("condition")
    assert rows.loc["tuned", "agreement"] == 1
    assert rows.loc["none", "nll_argmax"] > rows.loc["tuned", "nll_argmax"]


def test_the_bias_is_the_missing_part_of_a_reconstruction_that_is_perfect_up_to_it(planted, corpus):
    pair, crosscoder = planted
    biased = Crosscoder(pair.d_in, LATENTS, ReLU())
    with torch.no_grad():
        for name, value in crosscoder.named_parameters():
            biased.get_parameter(name).copy_(value)
        biased.b_dec[1] += 0.5
    values = kl(every((pair, biased.eval()), corpus))
    plain = kl(every(planted, corpus))
    assert values["all"] == pytest.approx(plain["all"], abs=1e-6)  # biases are not part of it
    assert values["all with bias"] > 10 * values["all"] + 1e-6  # here the models have none
    assert values["bias"] > 0 and values["bias"] != pytest.approx(values["none"], rel=1e-3)


def test_additive_sets_keep_what_the_base_decoder_writes(planted, corpus):
    # the planted latent has no base decoder, so adding is all there is; the bottom half writes the same twice
    values = kl(every(planted, corpus))
    assert values["delta_norm top, additive"] != pytest.approx(
        values["delta_norm bottom, additive"], rel=1e-3
    )
    assert values["delta_norm bottom, additive"] != pytest.approx(values["delta_norm bottom"], rel=1e-3)
    alone = kl(every(planted, corpus, n_specific=2))
    assert alone["delta_norm top, additive"] == pytest.approx(alone["delta_norm top"], abs=1e-7)


def test_the_change_of_two_sets_adds_up(planted, corpus):
    pair, crosscoder = planted
    batch = corpus.batch([0, 1])
    reading = Reading(Dictionary(crosscoder), pair, batch, PLANTED)
    sets = [torch.zeros(LATENTS, dtype=torch.bool) for _ in range(3)]
    for mask, ids in zip(sets, ([0, 3], [5], [0, 3, 5]), strict=True):
        mask[ids] = True
    one, two, both = (reading.written(mask) for mask in sets)
    torch.testing.assert_close(one + two, both)


def test_random_sets_are_pooled_with_the_spread_of_their_draws(planted, corpus):
    result = every(planted, corpus, n_random=3)
    rows = result.table.query("tokens == 'all'").set_index("condition")
    assert rows.loc["random 2 of the specific", "draws_sd"] > 0  # some draws hold the planted latent
    assert rows["draws_sd"].drop([n for n in rows.index if n.startswith("random")]).isna().all()
    assert rows.loc["random 2 of all", "n_latents"] == 2


def test_kept_conditions_are_found_again_in_whatever_order_they_are_asked(planted, corpus, tmp_path):
    pair, crosscoder = planted
    table = latents_of_interest()
    table.loc[1, "rank_score"] = 2.0  # the first changes nothing, the second is the planted one
    options = {"drop": PLANTED, "n_random": 0, "n_bootstrap": 50, "parts": tmp_path}
    for top in ((1, 2), (2, 1)):
        values = kl(substitution(crosscoder, pair, corpus, table, top=top, **options))
        assert values["top 2 ranked"] < 0.01 * values["none"] < 0.5 * values["top 1 ranked"]


def test_a_dictionary_of_the_difference_is_asked_the_same(planted, corpus):
    pair, crosscoder = planted
    shift = crosscoder.W_dec.detach()[PLANTED_LATENT, 1]
    difference = Crosscoder(pair.d_in, 2, ReLU(), n_models=1)
    with torch.no_grad():
        difference.W_enc_rows.zero_()
        difference.W_enc_rows[0, 0] = shift / shift.square().sum()
        difference.W_dec.zero_()
        difference.W_dec[0, 0] = shift
    table = pd.DataFrame(
        {"n_fired": [5.0, 5.0], "max_act": [1.0, 0.5]}, index=pd.RangeIndex(2, name="latent")
    )
    result = substitution(
        difference.eval(),
        pair,
        corpus,
        table,
        ranking="max_act",
        top=(1,),
        n_random=1,
        drop=PLANTED,
        conditions="every",
    )
    values = kl(result)
    assert values["none"] > 1e-3 and values["all"] < 1e-5 and values["top 1 ranked"] < 1e-5
    assert "delta_norm top" not in values and result.paired.empty


def test_a_killed_study_goes_on_with_what_is_missing(planted, corpus, tmp_path, monkeypatch):
    whole, calls, real = study(planted, corpus, max_tokens=40), [], module.scores

    def killed(*args):
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(module, "scores", killed)
    with pytest.raises(KeyboardInterrupt):
        study(planted, corpus, max_tokens=40, parts=tmp_path)
    again = study(planted, corpus, max_tokens=40, parts=tmp_path)
    assert again.to_json() == whole.to_json()
    n_batches = len(list(corpus.batches(40)))
    n_conditions = len({*whole.table["condition"]}) + 1  # the random set is drawn twice
    assert (
        n_batches > 1 and len(calls) == n_batches * n_conditions + 1
    )  # the part under way was lost, no other
    monkeypatch.setattr(module, "scores", None)
    assert study(planted, corpus, max_tokens=40, parts=tmp_path).to_json() == whole.to_json()


def test_text_without_a_template_has_no_template_tokens_to_put_in(planted, corpus):
    values = kl(study(planted, corpus))
    assert values["template"] == pytest.approx(values["none"], rel=1e-9)


def test_a_text_too_short_to_predict_anything_gives_nan_and_its_count(planted):
    # a sequence of one token, which has no next one, and is a first token besides
    result = study(planted, Corpus.from_sequences([(np.array([7]), np.array([0]))], "nothing"))
    assert (result.table["n_tokens"] == 0).all()
    assert result.table[["kl", "ci_low", "recovered", "nll"]].isna().all(axis=None)
    assert result.verdict.startswith("no prediction could be counted")
