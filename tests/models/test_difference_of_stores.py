import pytest
import torch
from fake_pair import FakePair, byte_tokenizer

from tl_crosscoder.dictionary.difference import difference
from tl_crosscoder.dictionary.normalizer import Normalizer
from tl_crosscoder.models.capture import capture
from tl_crosscoder.models.corpus import Corpus
from tl_crosscoder.models.stream import stream
from tl_crosscoder.training.data import Resumable, refuse_store


@pytest.fixture
def pair():
    return FakePair(byte_tokenizer())


@pytest.fixture
def corpus(pair):
    texts = [f"text {n} " * (n % 5 + 1) for n in range(12)]
    return Corpus.from_texts(texts, pair.tokenizer)


def minus(x):
    return x[:, 1:] - x[:, :1]


def test_a_store_of_differences_is_read_as_the_store_is(pair, corpus):
    store = capture(pair, corpus, progress=False)
    differences = difference(store)
    whole = torch.cat(list(store))
    assert (len(differences), differences.n_models, differences.d_in) == (len(store), 1, store.d_in)
    assert torch.equal(torch.cat(list(differences)), minus(whole))
    assert torch.equal(torch.cat(list(differences.batches(7))), minus(whole))
    located, theirs = list(differences.located(64)), list(store.located(64))
    assert all(torch.equal(a.position, b.position) for a, b in zip(located, theirs, strict=True))
    assert torch.equal(torch.cat([part.x for part in located]), minus(whole))
    ours, parts = differences.split(0.5, seed=1), store.split(0.5, seed=1)
    for a, b in zip(ours, parts, strict=True):
        assert torch.equal(torch.cat(list(a)), minus(torch.cat(list(b))))
    assert Normalizer.fit(differences, max_tokens=20).mean.shape == (1, store.d_in)
    with pytest.raises(TypeError, match=r"pass store\.shuffled"):
        refuse_store(differences)


@pytest.mark.parametrize("live", [False, True])
def test_shuffled_differences_go_on_where_they_stopped(pair, corpus, live):
    def batches():
        if live:
            return stream(pair, corpus, batch_size=8)
        return capture(pair, corpus, progress=False).shuffled(8)

    ours = difference(batches()) if live else difference(capture(pair, corpus, progress=False)).shuffled(8)
    assert isinstance(ours, Resumable)
    reading, expected = iter(ours), [minus(x) for x in batches()]
    assert all(torch.equal(next(reading), expected[i]) for i in range(3))
    state, other = ours.state_dict(), difference(batches())
    other.load_state_dict(state)
    rest = list(other)
    assert len(rest) == len(expected) - 3 > 0
    assert all(torch.equal(a, b) for a, b in zip(rest, expected[3:], strict=True))
