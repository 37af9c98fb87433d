import torch

from tests.models.fake_pair import byte_tokenizer
from tl_crosscoder.models.corpus import Corpus
from tl_crosscoder.studies.predictions import counted_predictions, first_of_each_run, scores


def test_first_of_each_run_counts_every_turn_anew():
    where = torch.tensor([[0, 1, 1, 1, 0, 1, 1, 0], [1, 0, 0, 0, 0, 0, 1, 1]]).bool()
    want = torch.tensor([[0, 1, 1, 0, 0, 1, 1, 0], [1, 0, 0, 0, 0, 0, 1, 1]]).bool()
    assert torch.equal(first_of_each_run(where, where, 2), want)


def test_a_token_left_out_of_a_turn_does_not_begin_another():
    said = [("user", "a"), ("assistant", "0123456789ABCDEF")]
    corpus = Corpus.from_chats([[{"role": r, "content": c} for r, c in said]], byte_tokenizer())
    batch = corpus.batch([0])
    kept = batch.attention_mask.clone()
    kept[0, 10] = False  # an attention sink in the middle of the answer
    counted = counted_predictions(batch, kept)
    first = counted["first 9"][0].nonzero()[:, 0].tolist()
    assert first == [4, 5, 6, 7, 8, 9, 11, 12, 13]
    assert counted["rest"][0].nonzero()[:, 0].tolist() == [*range(14, 21)]


def test_the_first_nine_of_a_chat_written_by_hand():
    # <bos><user>a<end><assistant>0123456789AB<end><user>b<end><assistant>xy<end>, a byte a token
    said = [("user", "a"), ("assistant", "0123456789AB"), ("user", "b"), ("assistant", "xy")]
    corpus = Corpus.from_chats([[{"role": r, "content": c} for r, c in said]], byte_tokenizer())
    batch = corpus.batch([0])
    counted = counted_predictions(batch, batch.attention_mask)
    places = {name: where[0].nonzero()[:, 0].tolist() for name, where in counted.items()}
    # position 4 holds <assistant> and predicts "0"; the first turn's 12 words and its end are 4..16
    assert places["all"] == [*range(4, 17), *range(21, 24)]
    assert places["first 9"] == [*range(4, 13), *range(21, 24)]
    assert places["rest"] == [*range(13, 17)]

    counted = counted_predictions(batch, batch.attention_mask, published=True)
    places = {name: where[0].nonzero()[:, 0].tolist() for name, where in counted.items()}
    # as the paper counts: the first ten of a turn, less the one made at <assistant>
    assert places["all"] == [*range(4, 17), *range(21, 24)]
    assert places["first 9"] == [*range(5, 14), *range(22, 24)]
    assert places["rest"] == [*range(14, 17)]


def test_scores_are_those_of_torch_distributions():
    g = torch.Generator().manual_seed(0)
    logits = [torch.randn(5, 7, generator=g) for _ in range(3)]
    true = torch.randint(7, (5,), generator=g)
    got = scores(*(x.log_softmax(-1) for x in logits), true)
    tuned, base, patched = (torch.distributions.Categorical(logits=x.double()) for x in logits)
    want = {
        "kl": torch.distributions.kl_divergence(tuned, patched),
        "kl_base": torch.distributions.kl_divergence(base, patched),
        "nll": -patched.log_prob(true),
        "nll_argmax": -patched.log_prob(tuned.probs.argmax(-1)),
        "agreement": (tuned.probs.argmax(-1) == patched.probs.argmax(-1)).double(),
    }
    assert set(got) == set(want)
    for name, values in want.items():
        torch.testing.assert_close(got[name], values, rtol=1e-5, atol=1e-6)
