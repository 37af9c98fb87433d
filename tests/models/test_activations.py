import json
import struct
from collections import Counter

import pytest
import torch
from fake_pair import FakePair, byte_tokenizer

from tl_crosscoder.errors import CorruptFile, EmptyData, PairMismatch
from tl_crosscoder.models.activations import PairedActivations
from tl_crosscoder.models.capture import capture


@pytest.fixture
def folder(pair, corpus, tmp_path):
    capture(pair, corpus, tmp_path / "store", max_tokens=64, shard_tokens=100, progress=False)
    return tmp_path / "store"


@pytest.fixture
def store(folder):
    return PairedActivations.open(folder)


@pytest.fixture
def shard(folder):
    return folder / "shard-00001.safetensors"


def multiset(x):
    return sorted(map(tuple, x.flatten(1).tolist()))


def rewrite_header(path, change):
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = change(raw[8 : 8 + length].decode())
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode() + raw[8 + length :])


def test_every_token_is_read_once_an_epoch_whatever_the_batch_size(store):
    everything = multiset(torch.cat(list(store)))
    for batch_size in (1, 7, 64, 1000):
        for buffer_rows in (1, 50, 10_000):
            batches = store.shuffled(batch_size, seed=0, buffer_rows=buffer_rows, block_rows=8)
            epoch = list(batches)
            assert multiset(torch.cat(epoch)) == everything
            assert len(epoch) == len(batches)
            assert {len(x) for x in epoch[:-1]} <= {batch_size}


def test_dropping_the_last_batch_leaves_whole_batches_and_repeats_no_token(store):
    batches = store.shuffled(64, drop_last=True, buffer_rows=100)
    epoch = list(batches)
    assert len(epoch) == len(batches) == len(store) // 64 and {len(x) for x in epoch} == {64}
    everything = Counter(multiset(torch.cat(list(store))))
    assert Counter(multiset(torch.cat(epoch))) <= everything


def test_the_seed_and_the_epoch_decide_the_order(store):
    def order(seed, epoch=0):
        batches = store.shuffled(32, seed)
        batches.epoch = epoch
        return torch.cat(list(batches))

    batches = store.shuffled(32, seed=3)
    first, second = torch.cat(list(batches)), torch.cat(list(batches))
    assert torch.equal(first, order(3)) and torch.equal(second, order(3, epoch=1))
    assert not torch.equal(first, second) and not torch.equal(first, order(4))


def test_a_batch_mixes_sequences_from_all_shards(store):
    batch = next(iter(store.shuffled(100, seed=0, block_rows=8)))
    found = {tuple(row) for row in batch.flatten(1).tolist()}
    shares = [
        len(found & set(multiset(shard.acts(0, len(shard)).float()))) / len(shard) for shard in store.shards
    ]
    assert min(shares) > 0.1  # 100 of 372 rows: 0.27 expected from each


def test_sequential_batches_are_the_located_rows_and_fill_up(store):
    for size in (1, 33, 5000):
        batches, located = list(store.batches(size)), list(store.located(size))
        assert all(torch.equal(x, part.x) for x, part in zip(batches, located, strict=True))
        assert [len(x) for x in batches[:-1]] == [size] * (
            len(store) // size if len(store) % size else len(store) // size - 1
        )
    assert len(store) == sum(map(len, store.batches(33)))


def test_rows_of_a_sequence_are_its_tokens_in_order(store):
    for sequence in range(len(store.corpus)):
        rows = store.rows_of(sequence)
        assert rows.position.tolist() == list(range(1, int(store.corpus.lengths[sequence])))
        assert rows.sequence.tolist() == [sequence] * len(rows.x)
    with pytest.raises(IndexError, match=r"the corpus has 0\.\."):
        store.rows_of(len(store.corpus))


def test_subsets_share_the_shards_and_part_the_tokens(store):
    left, right = store.split(0.75, seed=1)
    assert len(left) + len(right) == len(store) and left.shards is store.shards
    assert multiset(torch.cat([*left, *right])) == multiset(torch.cat(list(store)))
    sequences = {int(s) for part in left.located() for s in part.sequence}
    assert not sequences & {int(s) for part in right.located() for s in part.sequence}
    assert multiset(torch.cat(list(left.shuffled(16)))) == multiset(torch.cat(list(left)))
    again = left.subset(sorted(sequences)[:2])
    assert {int(s) for part in again.located() for s in part.sequence} == set(sorted(sequences)[:2])
    assert len(right.rows_of(min(sequences)).x) == 0
    with pytest.raises(EmptyData):
        store.subset([])


def test_a_store_on_disk_reads_like_one_in_memory(pair, corpus, store):
    made = capture(pair, corpus, None, max_tokens=64, shard_tokens=100, progress=False)
    for here, there in zip(made.located(33), store.located(33), strict=True):
        assert torch.equal(here.x, there.x) and torch.equal(here.position, there.position)
        assert torch.equal(here.sequence, there.sequence)
    assert torch.equal(torch.cat(list(made.shuffled(32))), torch.cat(list(store.shuffled(32))))
    assert (store.d_in, store.n_models, len(store)) == (4, 2, len(made))
    assert store.corpus.sha256 == corpus.sha256


def test_any_flipped_bit_of_a_shard_is_found_and_the_shard_named(folder, shard):
    raw = bytearray(shard.read_bytes())
    for at in range(0, len(raw), 64):
        raw[at] ^= 1 << at % 8
        shard.write_bytes(raw)
        with pytest.raises(CorruptFile, match=r"shard-00001\.safetensors.*only this shard is made anew"):
            PairedActivations.open(folder)
        raw[at] ^= 1 << at % 8
    shard.write_bytes(raw)
    PairedActivations.open(folder)


def test_verify_false_reads_altered_numbers_but_no_altered_structure(folder, shard):
    raw = bytearray(shard.read_bytes())
    raw[-1] ^= 1
    shard.write_bytes(raw)
    PairedActivations.open(folder, verify=False)
    shard.write_bytes(raw[:-1])
    with pytest.raises(CorruptFile, match="cut short or added to"):
        PairedActivations.open(folder, verify=False)


def test_missing_empty_and_exchanged_shards_are_refused(folder, shard):
    whole = shard.read_bytes()
    shard.write_bytes(b"")
    with pytest.raises(CorruptFile, match="a file of 0"):
        PairedActivations.open(folder)
    shard.write_bytes((folder / "shard-00000.safetensors").read_bytes())
    with pytest.raises(CorruptFile, match="shard-00001"):
        PairedActivations.open(folder)
    shard.unlink()
    with pytest.raises(CorruptFile, match=r"is missing.*run capture again"):
        PairedActivations.open(folder)
    shard.write_bytes(whole)
    PairedActivations.open(folder)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda header: header + " " * 2**20, "largest allowed"),
        (lambda header: '{"acts":{},' + header[1:], "a key appears twice"),
        (lambda header: header.replace('"acts"', '"../acts"'), "unexpected"),
        (lambda header: header.replace('"sequence"', '"sequence2"'), "unexpected"),
        (lambda header: header.replace('"F32"', '"F64"'), "describes no tensor"),
        (lambda header: header.replace('"shape":[', '"shape":[-1,'), "describes no tensor"),
        (lambda header: header.replace('"shape":[', '"shape":[true,'), "describes no tensor"),
        (lambda header: header.replace('"shape":[', '"shape":["x",1000000000000,'), "describes no tensor"),
        (lambda header: header.replace("[0,", "[4,"), "describes no tensor"),
        (lambda header: header.replace('"F32"', "NaN"), "NaN is not a number"),
        (lambda header: header.replace('"F32"', "1e999"), "1e999 is not a number"),
        (lambda header: header.rstrip()[:-1], "unreadable JSON"),
        (lambda _: "[" * 5000, "nested too deeply"),
        (lambda _: "[]", "want a JSON object"),
    ],
)
def test_a_hostile_header_is_refused_before_safetensors_sees_it(folder, shard, change, reason):
    rewrite_header(shard, change)
    with pytest.raises(CorruptFile, match=reason):
        PairedActivations.open(folder, verify=False)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"format": "other"}, "not the manifest of activations"),
        ({"format_version": 2}, "format version 2; this library reads 1"),
        ({"surprise": 1}, "wanted exactly"),
        ({"d_in": 0}, "sizes above 0"),
        ({"d_in": "4"}, "wanted a value of type int"),
        ({"dtype": "float64"}, "wanted one of float32"),
        ({"n_shards": 99}, "its capture was interrupted"),
        ({"corpus_sha256": "0" * 64}, "is not the corpus"),
        ({"file": "../shard-00000.safetensors"}, "shard 0 is '../shard"),
        ({"rows": 10**12}, "the manifest says"),
    ],
)
def test_a_hostile_or_unfinished_manifest_is_refused(folder, change, reason):
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    entry = manifest["shards"][0]
    (entry if set(change) <= {"file", "rows"} else manifest).update(change)
    path.write_text(json.dumps(manifest))
    with pytest.raises(CorruptFile, match=reason):
        PairedActivations.open(folder)


def test_a_folder_without_a_manifest_is_no_store(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no manifest\.json"):
        PairedActivations.open(tmp_path)


def test_activations_know_the_pair_they_came_from(store, tiny_tokenizer):
    store.check_against(FakePair(tiny_tokenizer))
    store.check_against(FakePair(None))
    with pytest.raises(PairMismatch, match=r"pair\.base\.fingerprint = 'basea'; this pair has 'baseb'"):
        store.check_against(FakePair(tiny_tokenizer, weights="b"))
    with pytest.raises(PairMismatch, match="tokenizer_sha256"):
        store.check_against(FakePair(byte_tokenizer(further=1)))
    other = FakePair(tiny_tokenizer)
    other.hook = "blocks.2.hook_resid_post"
    with pytest.raises(
        PairMismatch, match=r"pair\.hook = 'blocks\.1\.hook_resid_post'; this pair has 'blocks\.2"
    ):
        store.check_against(other)


def test_activations_know_the_crosscoder_that_was_trained_on_them(store, tiny_tokenizer):
    described = FakePair(tiny_tokenizer).description()
    store.check_made_by(described)
    store.check_made_by(described | {"torch": "0.1"})
    with pytest.raises(PairMismatch, match=r"base\.fingerprint = 'basea'; the crosscoder .* of 'baseb'"):
        store.check_made_by(FakePair(tiny_tokenizer, weights="b").description())
    with pytest.raises(PairMismatch, match=r"tuned\.fingerprint = 'tuneda'; .* of 'basea'"):
        store.check_made_by(described | {"tuned": described["base"]})
    with pytest.raises(PairMismatch, match=r"hook = 'blocks\.1\.hook_resid_post'; .* of 'blocks\.0"):
        store.check_made_by(described | {"hook": "blocks.0.hook_resid_post"})
    with pytest.raises(PairMismatch, match="of None"):
        store.check_made_by({})
