import numpy as np
import pytest
import torch

from tests.models.fake_pair import FakePair, byte_tokenizer
from tl_crosscoder.models.capture import capture
from tl_crosscoder.models.corpus import Corpus
from tl_crosscoder.models.drop import Drop
from tl_crosscoder.studies.gate_audit.arms import arm, noise_root


@pytest.fixture(scope="module")
def store():
    pair = FakePair(byte_tokenizer())
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("abcdefgh"), 40)) for _ in range(60)]
    corpus = Corpus.from_texts(texts, pair.tokenizer, windows=False)
    return capture(pair, corpus, drop=Drop(sinks=None), shard_tokens=900, progress=False)


def whole(store, size=4096):
    return torch.cat(list(store.batches(size)))


def test_the_target_arm_is_the_pair_and_identity_is_base_twice_to_the_bit(store):
    assert arm(store, "target") is store
    x = whole(arm(store, "identity"))
    assert torch.equal(x[:, 0], x[:, 1]) and torch.equal(x[:, 0], whole(store)[:, 0])


@pytest.mark.parametrize("name", ["noise", "disjoint"])
def test_an_arm_is_the_same_however_it_is_read(store, name):
    there = arm(store, name, seed=1)
    assert torch.equal(whole(there), whole(there, 37)) and torch.equal(
        whole(there), whole(arm(store, name, seed=1))
    )
    assert not torch.equal(whole(there), whole(arm(store, name, seed=2)))
    shuffled = torch.cat(list(there.shuffled(64, 0)))
    assert shuffled.sort(0).values.equal(whole(there).sort(0).values)
    sequence = there.sequences[3]
    assert torch.equal(there.rows_of(sequence).x[:, 0], store.rows_of(sequence).x[:, 0])


def test_white_noise_has_the_size_of_the_difference_and_the_other_its_covariance(store):
    x = whole(store).double()
    covariance = torch.cov((x[:, 1] - x[:, 0]).T, correction=0)
    root = noise_root(store, "covariance").double()
    torch.testing.assert_close(root @ root.T, covariance, atol=1e-4, rtol=1e-4)
    white = noise_root(store, "scale").double()
    assert (white @ white.T).trace().item() == pytest.approx(covariance.trace().item(), rel=1e-4)
    added = whole(arm(store, "noise", noise="covariance")).double()
    drawn = torch.cov((added[:, 1] - added[:, 0]).T, correction=0)
    assert (drawn - covariance).norm() < 0.15 * covariance.norm()


def test_disjoint_pairs_tokens_of_two_halves_that_share_no_conversation(store):
    there = arm(store, "disjoint", seed=1)
    assert len(there) == pytest.approx(len(store) / 2, rel=0.1)
    x, base = whole(there), {tuple(row.tolist()) for row in whole(store)[:, 0]}
    assert all(tuple(row.tolist()) in base for row in x[:, 1])
    other = sorted(set(store.sequences) - set(there.sequences))
    elsewhere = {tuple(row.tolist()) for row in whole(store.subset(other))[:, 0]}
    assert all(tuple(row.tolist()) in elsewhere for row in x[:, 1])
    # zipped at random: where base and tuned come from says nothing about each other
    assert abs(np.corrcoef(x[:, 0, 0], x[:, 1, 0])[0, 1]) < 0.1


def test_unknown_arms_and_noises_are_named(store):
    # the checker that runs in tests refuses them by their annotation; without it the functions do
    for call in (lambda: arm(store, "silence"), lambda: noise_root(store, "pink")):
        with pytest.raises((KeyError, TypeError), match=r"silence|pink"):
            call()
