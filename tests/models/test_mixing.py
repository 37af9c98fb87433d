import json
from itertools import islice, pairwise

import numpy as np
import pytest
import torch
from fake_pair import FakePair
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, load_file, save, save_file
from tiny_models import BOS as LLAMA_BOS
from tiny_models import tiny_llama_model

from tl_crosscoder.errors import CorruptFile, NonFiniteActs
from tl_crosscoder.models.activations import PairedActivations
from tl_crosscoder.models.capture import capture
from tl_crosscoder.models.corpus import Corpus
from tl_crosscoder.models.drop import Drop
from tl_crosscoder.models.mixing import MixedBatches, spread
from tl_crosscoder.models.pair import ModelPair
from tl_crosscoder.models.stream import stream
from tl_crosscoder.models.tokens import TokenBatch

SMALL = {"max_tokens": 64, "shard_tokens": 100}
LONG = {"max_tokens": 200, "shard_tokens": 1000}
# batch, buffer: a batch a filling, several, odd ones, a batch larger than the buffer, and everything in one filling
SIZES = [(32, 32), (32, 100), (7, 50), (7, 93), (40, 13), (64, 10_000)]


class Numbered(MixedBatches):
    """Blocks of the given sizes whose rows are 0, 1, 2, ...; ``read`` lists the blocks that were read."""

    def __init__(self, sizes, batch_size, buffer_rows, drop_last=False, seed=0):
        super().__init__(batch_size, seed, buffer_rows, drop_last)
        self.blocks = torch.arange(sum(sizes)).float().reshape(-1, 1, 1).split(sizes)
        self.sizes, self.read = sizes, []

    @property
    def _n_blocks(self):
        return len(self.sizes)

    @property
    def _rows_at_most(self):
        return sum(self.sizes) + 3  # some were expected and did not come

    def _read(self, block):
        self.read.append(block)
        return self.blocks[block]

    def _data(self):
        return {"sizes": self.sizes}

    def like(self):
        return type(self)(self.sizes, self.batch_size, self._room, self.drop_last, self.seed)


def as_lists(batches):
    return [x.flatten().tolist() for x in batches]


def by_hand(sizes, batch_size, buffer_rows, drop_last, seed, epoch):
    """The definition, a row at a time."""
    starts = np.cumsum([0, *sizes])
    room = max(buffer_rows, batch_size)
    rng = np.random.default_rng([seed, epoch])
    order = spread(len(sizes), -(-(sum(sizes) + 3) // room), rng)
    coming = [row for block in order for row in range(starts[block], starts[block + 1])]
    held, batches = [], []
    while True:
        while coming and len(held) < room:
            held.append(coming.pop(0))
        last, held = len(held) < room, [held[i] for i in rng.permutation(len(held))]
        while len(held) >= batch_size or (last and held and not drop_last):
            batches.append(held[:batch_size])
            held = held[batch_size:]
        if last:
            return batches


def written_and_read(state):
    """The state through a JSON text and a safetensors file."""
    place = state["place"]
    waiting = place and place.pop("waiting")
    file = save({} if waiting is None else {"waiting": waiting})
    again, tensors = json.loads(json.dumps(state, allow_nan=False)), load(file)
    if place is not None:
        again["place"]["waiting"] = tensors.get("waiting")
    return again


def resumed_everywhere(make, batches, n_epochs=2):
    """For each batch of so many epochs, what comes after it, uninterrupted and from its state: (expected, found)."""
    run, states = [], []
    for _ in range(n_epochs):
        for x in batches:
            run.append(x)
            states.append(written_and_read(batches.state_dict()))
    for number, state in enumerate(states, 1):
        again = make()
        again.load_state_dict(state)
        left = len(run) - number
        found = []
        while len(found) < left:
            found += islice(again, left - len(found))
        yield run[number:], found


def assert_same(expected, found):
    assert len(expected) == len(found)
    for one, other in zip(expected, found, strict=True):
        assert one.dtype == other.dtype == torch.float32 and torch.equal(one, other)


SHAPES = (
    st.lists(st.integers(0, 9), min_size=1, max_size=9).filter(any),
    st.integers(1, 12),
    st.integers(1, 20),
    st.booleans(),
)


@given(*SHAPES, st.integers(0, 3))
@settings(max_examples=50)
def test_batches_are_those_made_by_hand_each_row_once_an_epoch(
    sizes, batch_size, buffer_rows, drop_last, seed
):
    batches = Numbered(sizes, batch_size, buffer_rows, drop_last, seed)
    for epoch in range(2):
        found = as_lists(batches)
        assert found == by_hand(sizes, batch_size, buffer_rows, drop_last, seed, epoch)
        seen = [row for batch in found for row in batch]
        assert len(set(seen)) == len(seen) == sum(sizes) - (sum(sizes) % batch_size if drop_last else 0)
        assert all(len(batch) == batch_size for batch in found[:-1])


@given(*SHAPES)
@settings(max_examples=50, deadline=None)
def test_from_the_state_after_any_batch_the_same_batches_follow(sizes, batch_size, buffer_rows, drop_last):
    batches = Numbered(sizes, batch_size, buffer_rows, drop_last)
    for expected, found in resumed_everywhere(batches.like, batches):
        assert as_lists(expected) == as_lists(found)


@given(*SHAPES)
@settings(max_examples=50)
def test_resuming_reads_no_more_than_one_filling_again(sizes, batch_size, buffer_rows, drop_last):
    batches, states, seen = Numbered(sizes, batch_size, buffer_rows, drop_last), [], []
    for _ in batches:
        states.append(batches.state_dict())
        seen.append(len(batches.read))
    for state, n_read in zip(states[:-1], seen, strict=False):
        again, to_come = batches.like(), batches.read[n_read:]
        again.load_state_dict(state)
        list(again)
        n_twice = len(again.read) - len(to_come)
        assert again.read[n_twice:] == to_come
        # All but the first and the last block of a filling lie in it whole; empty ones may come before and after them.
        twice = [sizes[block] for block in again.read[:n_twice] if sizes[block]]
        assert sum(twice[1:-1]) <= max(batch_size, buffer_rows)


def test_an_epochs_end_leads_into_the_next_epoch_and_a_fresh_state_into_the_first():
    batches = Numbered([4, 4, 4], 5, 6)
    again = batches.like()
    again.load_state_dict(batches.state_dict())
    epochs = [as_lists(batches) for _ in range(3)]
    assert as_lists(again) == epochs[0]
    last_given, exhausted = batches.like(), batches.like()
    iterator = iter(last_given)
    for _ in epochs[0]:
        next(iterator)
    list(exhausted)
    for state in (last_given.state_dict(), exhausted.state_dict()):
        again.load_state_dict(state)
        assert again.epoch == 1 and again.state_dict() == state
        assert [as_lists(again), as_lists(again)] == epochs[1:]


def test_the_epoch_after_a_resumed_one_is_the_next_and_an_assigned_one_begins_at_its_start():
    batches = Numbered([4, 4, 4], 2, 6)
    epochs = [as_lists(batches) for _ in range(3)]
    batches.epoch = 0
    started = iter(batches)
    next(started)
    again = batches.like()
    again.load_state_dict(batches.state_dict())
    assert again.epoch == batches.epoch == 1
    assert [as_lists(again), as_lists(again), again.epoch] == [epochs[0][1:], epochs[1], 2]
    again.load_state_dict(batches.state_dict())
    again.epoch = 2
    assert again.state_dict()["place"] is None and as_lists(again) == epochs[2]


def test_a_reading_that_failed_leaves_the_state_of_the_last_batch(monkeypatch):
    batches = Numbered([3] * 8, 4, 8)
    whole = as_lists(batches.like())
    seen = []

    def read(block):
        if len(seen) == 2:
            raise OSError("gone")
        return batches.blocks[block]

    monkeypatch.setattr(batches, "_read", read)
    with pytest.raises(OSError, match="gone"):
        for x in batches:
            seen.append(x.flatten().tolist())
    again = batches.like()
    again.load_state_dict(batches.state_dict())
    assert seen + as_lists(again) == whole


@given(st.integers(1, 1000), st.integers(1, 20), st.integers(0, 5))
def test_any_run_of_the_order_of_blocks_is_spread_over_all_of_them(n, stretches, seed):
    order = spread(n, stretches, np.random.default_rng(seed))
    assert sorted(order) == list(range(n))
    if stretches == 1:
        return
    size = -(-n // stretches)
    for at in range(0, n - size + 1, max(1, size // 3)):
        run = np.sort(order[at : at + size])
        below = np.arange(
            1, size + 1
        )  # how many of the run are at most its i-th; an even share would be (run + 1) size / n
        assert np.abs(below - (run + 1) * size / n).max() < 4  # of 1,000 in 13 stretches drawn freely: 20


def test_the_order_of_blocks_is_another_for_every_seed():
    orders = [tuple(spread(200, 10, np.random.default_rng(seed))) for seed in range(20)]
    assert len(set(orders)) == 20
    first = [frozenset(order[:20]) for order in orders]  # what the first filling would hold
    assert len(set(first)) == 20 and len(frozenset.union(*first)) > 100


@pytest.fixture
def sinks(tiny_tokenizer):
    """A pair in which each "T", one in six of the texts, is a sink: how many rows stay is known only after capture."""
    return FakePair(tiny_tokenizer, trouble={tiny_tokenizer.convert_tokens_to_ids("T"): 500.0})


@pytest.mark.parametrize(("batch_size", "buffer_rows"), SIZES)
@pytest.mark.parametrize("drop_last", [False, True])
def test_a_store_and_a_stream_give_the_same_batches_every_epoch(
    sinks, corpus, batch_size, buffer_rows, drop_last
):
    store = capture(sinks, corpus, None, progress=False, **SMALL)
    assert len(store) < store.manifest["candidates"]
    stored = store.shuffled(batch_size, 3, buffer_rows=buffer_rows, drop_last=drop_last)
    streamed = stream(
        sinks,
        corpus,
        batch_size=batch_size,
        buffer_tokens=buffer_rows,
        seed=3,
        drop_last=drop_last,
        **SMALL,
    )
    epochs = [list(stored) for _ in range(3)]
    for epoch in epochs:
        assert_same(epoch, list(streamed))
        assert len(epoch) == len(stored) and sum(map(len, epoch)) == len(store) - drop_last * (
            len(store) % batch_size
        )
    assert not torch.equal(epochs[0][0], epochs[1][0])


def test_a_store_on_disk_and_a_stream_of_two_language_models_agree_by_default(tmp_path):
    pair = ModelPair(tiny_llama_model(0), tiny_llama_model(1), hook="blocks.1.hook_resid_post")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 60, (40, 24), generator=generator)
    ids[:, 0] = LLAMA_BOS
    lengths = torch.randint(1, 25, (40,), generator=generator)  # some have nothing but their first token
    flags = {"special_ids": (LLAMA_BOS,)}
    corpus = Corpus.from_batch(TokenBatch.from_ids(ids, torch.arange(24) < lengths[:, None], **flags))
    assert (corpus.lengths == 1).any()
    drop = Drop(special=True, sinks=1.2)
    capture(pair, corpus, tmp_path, drop=drop, max_tokens=30, progress=False)
    store = PairedActivations.open(tmp_path)
    assert store.manifest["dropped"]["sink"]
    stored, streamed = (
        store.shuffled(16, seed=1),
        stream(pair, corpus, batch_size=16, seed=1, drop=drop, max_tokens=30),
    )
    assert len(streamed._groups) > sum(rows > 0 for rows in map(len, store.shards))
    for _ in range(2):
        assert_same(list(stored), list(streamed))


def test_a_stored_epoch_of_bfloat16_is_the_streamed_one_rounded(pair, corpus):
    store = capture(pair, corpus, None, dtype="bfloat16", progress=False, **SMALL)
    exact = stream(pair, corpus, batch_size=32, buffer_tokens=100, **SMALL)
    assert_same([x.bfloat16().float() for x in exact], list(store.shuffled(32, buffer_rows=100)))


@pytest.fixture
def short(corpus):
    return corpus.take(200)


@pytest.mark.parametrize(("batch_size", "buffer_rows"), SIZES)
@pytest.mark.parametrize("kind", ["store", "bfloat16", "view", "blocks", "stream"])
def test_training_data_go_on_after_any_batch_of_two_epochs(sinks, short, kind, batch_size, buffer_rows):
    if kind == "stream":
        sizes = {"batch_size": batch_size, "buffer_tokens": buffer_rows}
        make = lambda: stream(sinks, short, seed=2, **sizes, **SMALL)
    else:
        dtype = "bfloat16" if kind == "bfloat16" else "float32"
        store = capture(sinks, short, None, dtype=dtype, progress=False, **SMALL)
        store = store.split(0.7)[0] if kind == "view" else store
        block_rows = 11 if kind == "blocks" else None
        make = lambda: store.shuffled(batch_size, 2, buffer_rows=buffer_rows, block_rows=block_rows)
    for expected, found in resumed_everywhere(make, make()):
        assert_same(expected, found)


def test_a_stream_goes_on_from_the_state_of_a_store_and_the_other_way_round(sinks, short):
    store = capture(sinks, short, None, progress=False, **SMALL)
    stored = lambda: store.shuffled(7, 2, buffer_rows=50)
    streamed = lambda: stream(sinks, short, batch_size=7, buffer_tokens=50, seed=2, **SMALL)
    for make, other in ((stored, streamed), (streamed, stored)):
        for expected, found in resumed_everywhere(other, make(), n_epochs=1):
            assert_same(expected, found)


def test_a_resumed_stream_captures_one_filling_again_and_no_more(sinks, corpus):
    batches = stream(sinks, corpus, batch_size=7, buffer_tokens=90, **SMALL)
    sinks.calls, calls, states = 0, [0], []
    for _ in batches:
        calls.append(sinks.calls)
        states.append(batches.state_dict())
    a_filling = max(after - before for before, after in pairwise(calls)) + 1
    assert 1 < a_filling <= calls[-1] / 2, "a filling is several groups, and the epoch several fillings"
    for seen, state in zip(calls[1:-1], states[:-1], strict=True):
        again = stream(sinks, corpus, batch_size=7, buffer_tokens=90, **SMALL)
        sinks.calls = 0
        again.load_state_dict(state)
        list(again)
        assert sinks.calls - (calls[-1] - seen) <= a_filling


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_stream_resumed_on_a_gpu_stays_there(sinks, short):
    sinks.table = sinks.table.cuda()
    capture_there, sinks.capture = sinks.capture, lambda batch: capture_there(batch.to("cuda"))
    make = lambda: stream(sinks, short, batch_size=7, buffer_tokens=50, **SMALL)
    for expected, found in resumed_everywhere(make, make()):
        assert_same(expected, found)
        assert all(x.device.type == "cuda" for x in expected)


MADE = {"batch_size": 32, "seed": 0, "buffer_rows": 100}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 16}, "batch_size = 32; these have 16"),
        ({"seed": 5}, "seed = 0; these have 5"),
        ({"buffer_rows": 64}, "buffer_rows = 100; these have 64"),
        ({"drop_last": True}, "drop_last = False; these have True"),
        ({"block_rows": 8}, "blocks = 'captured together'; these have 8"),
    ],
)
def test_the_state_of_other_batches_is_refused_with_both_values(pair, corpus, change, message):
    store = capture(pair, corpus, None, progress=False, **SMALL)
    state = store.shuffled(**MADE).state_dict()
    other = store.shuffled(**MADE | change)
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(state)
    assert other.epoch == 0 and other.state_dict()["place"] is None
    with pytest.raises(ValueError, match=r"a state with \['step'\]; wanted the recipe, epoch and place"):
        other.load_state_dict({"step": 3})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"take": 300}, "corpus_sha256 = '"),
        ({"weights": "b"}, "models.base = 'basea'; these have 'baseb'"),
        ({"max_tokens": 32}, "max_tokens = 64; these have 32"),
        ({"shard_tokens": 90}, "shard_tokens = 100; these have 90"),
        ({"drop": Drop(sinks=4.0)}, "drop.sinks = 3.0; these have 4.0"),
        ({"dtype": "bfloat16"}, "dtype = 'float32'; these have 'bfloat16'"),
    ],
)
def test_the_state_of_other_data_is_refused_with_both_values(pair, corpus, tiny_tokenizer, change, message):
    state = stream(pair, corpus, batch_size=32, **SMALL).state_dict()
    change = dict(change)
    other, data = FakePair(tiny_tokenizer, weights=change.pop("weights", "a")), corpus
    data = corpus.take(change.pop("take", corpus.n_tokens))
    stored = capture(other, data, None, progress=False, **SMALL | change).shuffled(32)
    loaders = [stored]
    if "dtype" not in change:
        loaders.append(stream(other, data, batch_size=32, **SMALL | change))
    for batches in loaders:
        with pytest.raises(ValueError, match=message):
            batches.load_state_dict(state)


def test_the_state_of_another_view_is_refused(pair, corpus):
    store = capture(pair, corpus, None, progress=False, **SMALL)
    left, right = store.split(0.7)
    state = left.shuffled(32).state_dict()
    with pytest.raises(ValueError, match=f"rows = {len(left)}; these have {len(right)}"):
        right.shuffled(32).load_state_dict(state)
    one, two = (store.subset([s]) for s in corpus.order()[:2].tolist())
    assert len(one) == len(two)
    with pytest.raises(ValueError, match="runs_sha256"):
        two.shuffled(8).load_state_dict(one.shuffled(8).state_dict())
    with pytest.raises(ValueError, match="blocks = 256; these have 'captured together'"):
        store.shuffled(32).load_state_dict(state)
    assert store.subset(range(len(corpus))).shuffled(32).state_dict() == store.shuffled(32).state_dict()


def test_a_manifest_with_other_shards_than_the_store_has_is_refused(pair, corpus):
    store = capture(pair, corpus, None, progress=False, **SMALL)
    store.manifest["asked"]["shard_tokens"] = 150
    with pytest.raises(CorruptFile, match=r"shards of 150 tokens.*pass block_rows=256"):
        next(iter(store.shuffled(8)))
    assert len(next(iter(store.shuffled(8, block_rows=8)))) == 8


@pytest.fixture
def long(tiny_tokenizer):
    """3,208 tokens after position 0, of which three are 0.1 %, and among them one "Q", in the last window."""
    return Corpus.from_texts(["abcdefgh" * 400, "abcQdefg"], tiny_tokenizer, context=64)


def place_of_q(corpus, tokenizer):
    return corpus.ids_of(len(corpus) - 1).tolist().index(tokenizer.convert_tokens_to_ids("Q"))


@pytest.fixture
def ill(long, tiny_tokenizer, tmp_path):
    """The store of ``long`` on disk, its "Q" NaN in the tuned model."""
    capture(FakePair(tiny_tokenizer), long, tmp_path, progress=False, **LONG)
    path = tmp_path / "shard-00003.safetensors"
    tensors = load_file(path)
    last = tensors["sequence"] == len(long) - 1
    row = int((last & (tensors["position"] == place_of_q(long, tiny_tokenizer))).nonzero())
    tensors["acts"][row, 1, 2] = float("nan")
    save_file(tensors, path)
    return PairedActivations.open(tmp_path, verify=False)


def test_a_row_that_is_not_finite_is_named_with_its_place_and_the_remedy(ill, long, tiny_tokenizer):
    sequence, position = len(long) - 1, place_of_q(long, tiny_tokenizer)
    place = rf"sequence {sequence} \(text\), position {position}, shard-00003\.safetensors"
    with pytest.raises(NonFiniteActs, match=rf"tuned model at 'blocks\.1\.hook_resid_post': {place}.*'skip'"):
        list(ill.shuffled(64))
    with pytest.raises(NonFiniteActs, match=place):
        list(ill.subset([sequence]).shuffled(64, block_rows=3))


def test_skipped_rows_leave_both_models_and_nothing_else_changes(ill, long, tiny_tokenizer):
    token = tiny_tokenizer.convert_tokens_to_ids("Q")
    pair = FakePair(tiny_tokenizer, trouble={token: float("inf")})
    skipped = {"on_nonfinite": "skip", **LONG}
    without = capture(pair, long, None, progress=False, **skipped)
    batches = [
        ill.shuffled(64, buffer_rows=500, on_nonfinite="skip"),
        without.shuffled(64, buffer_rows=500),
        stream(pair, long, batch_size=64, buffer_tokens=500, **skipped),
    ]
    for _ in range(2):
        first, *others = [list(each) for each in batches]
        assert sum(map(len, first)) == len(ill) - 1
        for other in others:
            assert_same(first, other)
        assert [each.skipped for each in batches] == [1, 0, 1]


@pytest.mark.parametrize("kind", ["store", "stream"])
def test_resuming_counts_a_skipped_row_once(ill, long, tiny_tokenizer, kind):
    token = tiny_tokenizer.convert_tokens_to_ids("Q")
    pair = FakePair(tiny_tokenizer, trouble={token: float("nan")})

    def make():
        if kind == "store":
            return ill.shuffled(70, buffer_rows=150, on_nonfinite="skip")
        return stream(pair, long, batch_size=70, buffer_tokens=150, on_nonfinite="skip", **LONG)

    batches, counts, states = make(), [], []
    for _ in batches:
        counts.append(batches.skipped)
        states.append(batches.state_dict())
    assert set(counts) == {0, 1}
    for number, state in enumerate(states[:-1], 1):
        again = make()
        again.load_state_dict(state)
        assert [again.skipped for _ in again] == counts[number:]


def test_skipping_more_than_a_thousandth_of_a_store_is_an_error(long, tiny_tokenizer):
    store = capture(FakePair(tiny_tokenizer), long, None, progress=False)
    assert len(store) // 1000 == 3
    store.shards[0].x[[5, 700, 701], 0, 1] = float("-inf")
    batches = store.shuffled(64, on_nonfinite="skip")
    assert sum(map(len, batches)) == sum(map(len, batches)) == len(store) - 3
    store.shards[0].x[2000, 1] = float("nan")
    with pytest.raises(
        NonFiniteActs, match=r"part 0\..*; 4 rows are not finite and at most 3 of 3,\d+ may be"
    ):
        list(batches)


def test_finite_rows_whose_sum_is_not_are_all_read(pair, corpus):
    store = capture(pair, corpus, None, progress=False, **SMALL)
    store.shards[0].x[:] = 3e38
    for policy in ("error", "skip"):
        batches = store.shuffled(32, on_nonfinite=policy)
        assert sum(map(len, batches)) == len(store) and batches.skipped == 0
