import json

import numpy as np
import pandas as pd
import pytest
import torch

from tests.models.fake_pair import ASSISTANT, USER, FakePair, byte_tokenizer
from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.dictionary.sparsity import ReLU
from tl_crosscoder.figures import NotDrawn
from tl_crosscoder.models.capture import capture
from tl_crosscoder.models.corpus import Corpus
from tl_crosscoder.models.drop import Drop
from tl_crosscoder.studies import StudyResult
from tl_crosscoder.studies.template_tokens import template_tokens

TOKENIZER = byte_tokenizer()


class OneHotPair(FakePair):
    """A token's activation says which it is: <user> on axis 0, <assistant> on axis 1, any other on axis 2."""

    def capture(self, batch):
        kind = torch.full_like(batch.ids, 2)
        kind[batch.ids == USER], kind[batch.ids == ASSISTANT] = 0, 1
        return torch.eye(4)[kind][:, :, None].expand(-1, -1, 2, -1).clone()


def reader() -> Crosscoder:
    """Latent 0 fires on <user>, 1 on <assistant>, 2 on everything else, 3 on all, 4 never."""
    crosscoder = Crosscoder(4, 5, ReLU())
    with torch.no_grad():
        crosscoder.W_enc_rows.zero_()
        for latent, axes in enumerate(([0], [1], [2], [0, 1, 2], [])):
            crosscoder.W_enc_rows[latent, 1, axes] = 1
        crosscoder.W_dec.fill_(1)
    return crosscoder.eval()


def table(called=(0, 1)):
    classes = ["tuned_only" if j in called else "shared" for j in range(5)]
    columns = {"class": classes, "rank_score": [5.0, 4, 3, 2, 1], "n_fired": 9.0, "max_act": 1.0}
    return pd.DataFrame(columns, index=pd.RangeIndex(5, name="latent"))


def store(corpus):
    return capture(OneHotPair(TOKENIZER), corpus, drop=Drop(sinks=None), progress=False)


@pytest.fixture(scope="module")
def chats():
    # of each chat <user>ab<end><assistant>c<end> is kept: 4 of 7 are the template's, 2 the user's, 1 the assistant's
    said = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "c"}]
    return store(Corpus.from_chats([said] * 12, TOKENIZER) + Corpus.from_texts(["some text"], TOKENIZER))


def study(acts, **options):
    return template_tokens(reader(), acts, table(), **{"least": 10, "progress": False} | options)


def test_fractions_are_those_counted_by_hand(chats):
    latents = study(chats).latents.set_index("latent")
    assert latents["n_chat"].to_dict() == {0: 12, 1: 12, 2: 60, 3: 84}
    # latent 2: of <ab end c end>, two are the template's
    assert latents["template_fraction"].to_dict() == pytest.approx({0: 1, 1: 1, 2: 2 / 5, 3: 4 / 7})
    assert latents["user_fraction"].to_dict() == pytest.approx({0: 0, 1: 0, 2: 2 / 5, 3: 2 / 7})
    assert latents["assistant_fraction"].to_dict() == pytest.approx({0: 0, 1: 0, 2: 1 / 5, 3: 1 / 7})
    assert latents.loc[3, "template_enrichment"] == pytest.approx(1)  # fires everywhere: by chance
    assert latents.loc[0, "template_enrichment"] == pytest.approx(7 / 4)


def graded() -> Crosscoder:
    """One latent that fires with 1 on <user>, .5 on <assistant> and .05 on everything else."""
    crosscoder = Crosscoder(4, 1, ReLU())
    with torch.no_grad():
        crosscoder.W_enc_rows.zero_()
        crosscoder.W_enc_rows[0, 1, :3] = torch.tensor([1.0, 0.5, 0.05])
        crosscoder.W_dec.fill_(1)
    return crosscoder.eval()


def test_weak_and_strong_firings_are_counted_apart(chats):
    frame = pd.DataFrame({"class": ["tuned_only"], "n_fired": 9.0, "max_act": 1.0})
    result = template_tokens(graded(), chats, frame, least=10, progress=False)
    rows = result.strengths[result.strengths["latents"] == "tuned-only latents"].set_index("strength")
    # of each of 12 chats <user>ab<end><assistant>c<end>: a, b, c and two <end> are weak, two of these five the template's
    assert rows["n"].to_dict() == {"to .1": 60, ".1 to .4": 0, ".4 to .7": 12, "above .7": 12}
    assert rows["share"].to_dict() == pytest.approx(
        {"to .1": 2 / 5, ".1 to .4": np.nan, ".4 to .7": 1, "above .7": 1}, nan_ok=True
    )
    assert (
        "(to .1 of the largest activation) 40% are there, of the strong ones (above .7) 100%."
        in result.verdict
    )


def test_the_first_token_is_counted_apart_where_it_was_kept(chats):
    assert study(chats).latents["bos_fraction"].isna().all()  # the capture left it out
    said = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "c"}]
    whole = capture(
        OneHotPair(TOKENIZER),
        Corpus.from_chats([said] * 12, TOKENIZER),
        drop=Drop(first=False, special=False, sinks=None),
        progress=False,
    )
    latents = study(whole).latents.set_index("latent")
    # <bos> is on axis 2 like any other token: latent 2 fires there and five times after, latent 3 there and on seven
    assert latents["bos_fraction"].to_dict() == pytest.approx({0: 0, 1: 0, 2: 1 / 6, 3: 1 / 8})
    assert latents["template_fraction"].to_dict() == pytest.approx({0: 1, 1: 1, 2: 2 / 5, 3: 4 / 7})


def test_each_slot_has_its_token_and_the_latents_that_fire_there(chats):
    slots = study(chats).slots.set_index("slot")
    assert slots["token"].tolist() == ["(elsewhere)", "<|user|>", "<|end|>", "<|assistant|>", "<|end|>"]
    assert slots["share_of_tokens"].tolist() == pytest.approx([0, *[1 / 7] * 4])
    assert slots["called"].tolist() == pytest.approx([0, 0.5, 0, 0.5, 0])


def test_the_called_latents_stand_beside_the_shared_ones_with_intervals(chats):
    result = study(chats)
    rows = result.table.set_index("latents")
    assert rows.loc["tuned-only latents", ["n", "mostly", "third"]].tolist() == [2, 1, 1]
    assert rows.loc["shared", ["n", "mostly", "third"]].tolist() == [2, 0.5, 1]
    assert rows.loc["shared", "mostly_low"] < 0.5 < rows.loc["shared", "mostly_high"]
    assert "100%" in result.verdict and "57% of the chat tokens" in result.verdict


def test_the_table_may_come_in_any_order_and_not_in_part(chats):
    backwards = template_tokens(reader(), chats, table().iloc[::-1], least=10, progress=False)
    pd.testing.assert_frame_equal(backwards.table, study(chats).table)
    with pytest.raises(ValueError, match="a row for each of 5 latents, in any order, got 4"):
        template_tokens(reader(), chats, table().iloc[1:], least=10, progress=False)


def test_without_a_tuned_only_latent_the_highest_ranked_stand_in(chats):
    result = template_tokens(reader(), chats, table(called=()), n_top=1, least=10, progress=False)
    assert result.latents.loc[result.latents["called"], "latent"].tolist() == [0]
    assert "none is tuned-only" in result.verdict


def test_too_few_firings_are_counted_and_give_no_number(chats):
    result = study(chats, least=1000)
    assert result.counts["too_few"] == 2 and np.isnan(result.table["mostly"]).all()
    assert "none fired 1000 times" in result.verdict


def test_latents_that_fire_too_rarely_in_chats_are_not_passed_over_in_silence(chats):
    result = template_tokens(
        reader(), chats, table(called=(0, 2)), least=20, progress=False
    )  # 0 fires 12 times, 2 sixty
    assert "; 1 more, which fired fewer than 20 times in chats, do not count" in result.verdict
    assert "do not count" not in study(chats).verdict


def test_text_without_a_template_is_a_result_that_says_so():
    result = study(store(Corpus.from_texts(["plain text"], byte_tokenizer(template=None))))
    assert "no token of a chat template" in result.verdict
    assert result.table["n"].tolist() == [0, 0, 0]
    with pytest.raises(NotDrawn):
        result.plot()
    assert StudyResult.from_dict(json.loads(result.to_json())).verdict == result.verdict


def test_the_result_is_read_back_and_draws_the_same(chats):
    result = study(chats)
    assert StudyResult.from_dict(json.loads(result.to_json())).plot().svg() == result.plot().svg()
