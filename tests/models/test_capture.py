import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from fake_pair import BOS, END, FakePair, byte_tokenizer
from tiny_models import BOS as LLAMA_BOS
from tiny_models import tiny_llama_model

from tl_crosscoder.errors import EmptyData, NonFiniteActs, PairMismatch, ShapeMismatch
from tl_crosscoder.models.activations import PairedActivations
from tl_crosscoder.models.capture import capture
from tl_crosscoder.models.corpus import Corpus
from tl_crosscoder.models.drop import Drop
from tl_crosscoder.models.pair import ModelPair
from tl_crosscoder.models.stream import stream
from tl_crosscoder.models.tokens import TokenBatch

SMALL = {"max_tokens": 64, "shard_tokens": 100, "progress": False}


def one_by_one(pair, corpus, drop):
    """The definition: each sequence alone, each token looked at in turn.  {(sequence, position): activations}"""
    rows, norms = {}, []
    for sequence in range(len(corpus)):
        acts = pair.capture(corpus.batch([sequence]))[0]
        flags = corpus.flags_of(sequence)
        for position in range(len(acts)):
            special, template = bool(flags["special"][position]), bool(flags["template"][position])
            if drop.first and position == 0:
                continue
            if drop.special and special and (not template or position == 0):
                continue
            if (drop.template and template) or (drop.preamble and flags["preamble"][position]):
                continue
            rows[sequence, position] = acts[position]
            norms.append(acts[position].norm(dim=-1))
    limit = float("inf") if drop.sinks is None else drop.sinks * torch.stack(norms).median(dim=0).values
    return {place: x for place, x in rows.items() if (x.norm(dim=-1) <= limit).all()}


def places(store):
    return [
        place
        for part in store.located(17)
        for place in zip(part.sequence.tolist(), part.position.tolist(), strict=True)
    ]


def files(folder):
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()
    }


@pytest.mark.parametrize(
    "drop",
    [
        Drop(),
        Drop(first=False, special=False, sinks=None),
        Drop(first=False, sinks=None),
        Drop(template=True, preamble=True),
        Drop(sinks=1.02),
    ],
)
@pytest.mark.parametrize("on_disk", [True, False])
def test_a_store_holds_exactly_the_tokens_that_stay_each_once(pair, corpus, drop, on_disk, tmp_path):
    expected = one_by_one(pair, corpus, drop)
    store = capture(pair, corpus, tmp_path / "store" if on_disk else None, drop=drop, **SMALL)
    assert len(store) == len(expected) and sorted(places(store)) == sorted(expected)
    for part in store.located(50):
        for x, sequence, position in zip(part.x, part.sequence.tolist(), part.position.tolist(), strict=True):
            assert torch.allclose(x, expected[sequence, position], rtol=0, atol=1e-5)


def test_position_zero_and_a_sink_inside_the_text_are_dropped_in_both_models_and_counted(
    corpus, tiny_tokenizer
):
    sink = tiny_tokenizer.convert_tokens_to_ids(
        "T"
    )  # six documents start with it, one token of each is huge in tuned only
    pair = FakePair(tiny_tokenizer, trouble={sink: 500.0})
    store = capture(pair, corpus, None, **SMALL)
    n_sinks = int((corpus.ids == sink).sum())
    assert n_sinks == 6
    assert store.manifest["dropped"] == {"first": len(corpus), "sink": n_sinks}
    assert len(store) == corpus.n_tokens - len(corpus) - n_sinks
    assert all(corpus.ids_of(sequence)[position] != sink for sequence, position in places(store))
    assert max(float(x.norm(dim=-1).max()) for x in store.batches()) < 3 * max(store.manifest["medians"])
    kept = capture(pair, corpus, None, drop=Drop(sinks=None), **SMALL)
    assert len(kept) == len(store) + n_sinks


def test_chat_format_tokens_stay_and_bos_goes_by_default(pair, tiny_tokenizer):
    chats = Corpus.from_chats(
        [[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]], tiny_tokenizer
    )
    assert chats.ids_of(0)[0] == BOS and chats.ids_of(0)[-1] == END
    assert [position for _, position in places(capture(pair, chats, None, progress=False))] == list(
        range(1, 9)
    )
    without = capture(pair, chats, None, drop=Drop(template=True), progress=False)
    assert [position for _, position in places(without)] == [2, 3, 6, 7]


def test_a_batch_of_ids_is_a_corpus_and_padding_never_enters():
    ids = torch.tensor([[50, 51, 52, 0, 0], [60, 61, 62, 63, 64]])
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    for batch in (TokenBatch.from_ids(ids, mask), TokenBatch.from_ids(ids, mask).padded("left")):
        store = capture(FakePair(), batch, None, progress=False)
        assert sorted(places(store)) == [(0, 1), (0, 2), (1, 1), (1, 2), (1, 3), (1, 4)]
    with pytest.raises(ValueError, match="without a tokenizer"):
        _ = store.tokenizer


def test_ids_without_padding_are_a_batch_of_real_tokens_with_the_special_ones_marked(pair):
    ids = torch.tensor([[BOS, 50, 51], [BOS, END, 60]], dtype=torch.int32)
    store = capture(pair, ids, None, progress=False)
    assert sorted(places(store)) == [(0, 1), (0, 2), (1, 2)]  # END is special
    assert store.corpus.flags_of(1)["special"].tolist() == [True, True, False]
    with pytest.raises(TypeError, match=r"got texts, as .*'Hello'.*Corpus\.from_texts"):
        capture(pair, ["Hello", "there"], None, progress=False)
    with pytest.raises(ShapeMismatch, match=r"got \[3\]; one text's ids are ids\[None\]"):
        capture(pair, ids[0], None, progress=False)
    with pytest.raises(TypeError, match="wanted integer ids"):
        capture(pair, ids.float(), None, progress=False)


class Upgraded(FakePair):
    """The pair under another version of torch, its adapter under another name."""

    def __init__(self, tokenizer, torch, adapter_name):
        super().__init__(tokenizer)
        self.torch, self.adapter_name = torch, adapter_name

    def description(self):
        told = super().description()
        return told | {"torch": self.torch, "tuned": told["tuned"] | {"adapter_name": self.adapter_name}}


def test_a_capture_goes_on_under_another_version_of_the_libraries(corpus, tiny_tokenizer, tmp_path):
    capture(Upgraded(tiny_tokenizer, "2.6", "one"), corpus, tmp_path, **SMALL)
    (tmp_path / "shard-00001.safetensors").unlink()
    store = capture(Upgraded(tiny_tokenizer, "2.7", "two"), corpus, tmp_path, **SMALL)
    assert store.manifest["pair"]["torch"] == "2.6", "what the first shards were made with stays recorded"
    store.check_against(Upgraded(tiny_tokenizer, "2.7", "two"))
    capture(FakePair(tiny_tokenizer), corpus, tmp_path, **SMALL)


def test_a_killed_capture_goes_on_and_ends_with_the_same_bytes(corpus, tiny_tokenizer, tmp_path):
    pair = FakePair(tiny_tokenizer)
    capture(pair, corpus, tmp_path / "whole", **SMALL)
    calls, shards = pair.calls, len(list((tmp_path / "whole").glob("shard-*")))
    assert shards >= 4
    for killed_at in (2, calls // 2, calls - 1):
        folder = tmp_path / f"killed{killed_at}"
        dying = FakePair(tiny_tokenizer)
        whole_capture = dying.capture

        def capture_until(batch, killed_at=killed_at, dying=dying, whole_capture=whole_capture):
            if dying.calls == killed_at:
                raise KeyboardInterrupt
            return whole_capture(batch)

        dying.capture = capture_until
        with pytest.raises(KeyboardInterrupt):
            capture(dying, corpus, folder, **SMALL)
        fresh = FakePair(tiny_tokenizer)
        capture(fresh, corpus, folder, **SMALL)
        assert files(folder) == files(tmp_path / "whole")
        assert killed_at < calls // 2 or fresh.calls < calls, "finished shards are not captured again"


CHILD = """
import sys, time
from fake_pair import FakePair, byte_tokenizer
from tl_crosscoder.models.capture import capture
from tl_crosscoder.models.corpus import Corpus

class Slow(FakePair):
    def capture(self, batch):
        time.sleep(0.02)
        return super().capture(batch)

tokenizer = byte_tokenizer()
corpus = Corpus.from_texts(["abcdefgh" * 400], tokenizer, context=32)
print("ready", flush=True)
capture(Slow(tokenizer), corpus, sys.argv[1], max_tokens=64, shard_tokens=200, progress=False)
"""


@pytest.mark.slow
def test_a_capture_killed_by_the_system_at_any_time_ends_with_the_same_bytes(tmp_path):
    def run(folder, seconds=None):
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, folder], stdout=subprocess.PIPE, env=environment, text=True
        )
        assert child.stdout.readline() == "ready\n"
        if seconds is not None:
            time.sleep(seconds)
            child.kill()
        child.stdout.close()
        return child.wait()

    assert run(tmp_path / "whole") == 0
    kills = [run(tmp_path / "killed", seconds) for seconds in (0.05, 0.4, 0.7)]
    assert set(kills) <= {0, -signal.SIGKILL} and -signal.SIGKILL in kills
    assert run(tmp_path / "killed") == 0
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


def test_a_file_left_half_written_is_written_again(pair, corpus, tmp_path, monkeypatch):
    capture(pair, corpus, tmp_path / "whole", **SMALL)
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk gone")))
    with pytest.raises(OSError, match="disk gone"):
        capture(pair, corpus, tmp_path / "half", **SMALL)
    assert not list((tmp_path / "half").iterdir())
    monkeypatch.undo()
    capture(pair, corpus, tmp_path / "half", **SMALL)
    assert files(tmp_path / "half") == files(tmp_path / "whole")


def test_a_deleted_shard_alone_is_made_again_bit_for_bit(corpus, tiny_tokenizer, tmp_path):
    capture(FakePair(tiny_tokenizer), corpus, tmp_path, **SMALL)
    before = files(tmp_path)
    (tmp_path / "shard-00001.safetensors").unlink()
    pair = FakePair(tiny_tokenizer)
    capture(pair, corpus, tmp_path, **SMALL)
    assert files(tmp_path) == before
    assert pair.calls <= 1 + 3  # one probe of the shapes, and the batches of one shard


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "bfloat16"}, "dtype = 'float32', this call has 'bfloat16'"),
        ({"drop": Drop(sinks=4.0)}, "drop.sinks = 3.0, this call has 4.0"),
        ({"shard_tokens": 90}, "shard_tokens = 100, this call has 90"),
        ({"pair": {"weights": "b"}}, "pair.base.fingerprint = 'basea', this call has 'baseb'"),
        ({"pair": {"d_in": 5}}, "pair.d_in = 4, this call has 5"),
        (
            {"hook": "blocks.2.hook_resid_post"},
            "pair.hook = 'blocks.1.hook_resid_post', this call has 'blocks.2",
        ),
        ({"tokenizer": 1}, "tokenizer_sha256"),
        ({"corpus": 300}, "corpus_sha256"),
    ],
)
def test_a_folder_is_not_mixed_with_another_capture(corpus, tiny_tokenizer, tmp_path, change, message):
    capture(FakePair(tiny_tokenizer), corpus, tmp_path, **SMALL)
    before = files(tmp_path)
    change = dict(change)
    tokenizer = byte_tokenizer(further=change.pop("tokenizer", 0))
    other = FakePair(tokenizer, **change.pop("pair", {}))
    other.hook = change.pop("hook", other.hook)
    data = corpus.take(change.pop("corpus", corpus.n_tokens))
    with pytest.raises(PairMismatch) as refused:
        capture(other, data, tmp_path, **SMALL | change)
    assert message in str(refused.value) and "or another folder" in str(refused.value)
    assert files(tmp_path) == before and other.calls == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_is_named_with_its_place(corpus, tiny_tokenizer, tmp_path, value):
    token = tiny_tokenizer.convert_tokens_to_ids(
        "Q"
    )  # "Question 1?": position 2 of each chat, after BOS and <|user|>
    pair = FakePair(tiny_tokenizer, trouble={token: value})
    chat = corpus.sources.index("chats")
    with pytest.raises(NonFiniteActs) as found:
        capture(pair, corpus, tmp_path, **SMALL)
    message = str(found.value)
    assert "in the tuned model at 'blocks.1.hook_resid_post'" in message
    assert any(f"sequence {s} (chats), position 2, shard-0000" in message for s in range(chat, len(corpus)))


def test_skipping_drops_the_token_in_both_models_and_changes_nothing_else(tiny_tokenizer):
    corpus = Corpus.from_texts(["abcdefgh" * 400, "abcQdefg"], tiny_tokenizer, context=64)
    token = tiny_tokenizer.convert_tokens_to_ids("Q")
    ill = FakePair(tiny_tokenizer, trouble={token: float("nan")})
    store = capture(ill, corpus, None, on_nonfinite="skip", progress=False)
    well = capture(FakePair(tiny_tokenizer), corpus, None, progress=False)
    assert store.manifest["dropped"] == {"first": len(corpus), "nonfinite": 1}
    kept = [corpus.ids_of(sequence)[position] != token for sequence, position in places(well)]
    assert torch.equal(torch.cat(list(store)), torch.cat(list(well))[torch.tensor(kept)])


def test_skipping_more_than_a_thousandth_is_an_error(corpus, tiny_tokenizer):
    token = tiny_tokenizer.convert_tokens_to_ids("Q")
    pair = FakePair(tiny_tokenizer, trouble={token: float("nan")})
    with pytest.raises(
        NonFiniteActs, match=r"[123] tokens are not finite and at most 0 of \d+ may be skipped"
    ):
        capture(pair, corpus, None, on_nonfinite="skip", **SMALL)


def test_bfloat16_storage_rounds_once_and_is_read_as_float32(pair, corpus, tmp_path):
    exact = torch.cat(list(capture(pair, corpus, None, **SMALL)))
    store = capture(pair, corpus, tmp_path, dtype="bfloat16", **SMALL)
    rounded = torch.cat(list(store))
    assert rounded.dtype == torch.float32 and torch.equal(rounded, exact.bfloat16().float())
    assert torch.equal(torch.cat(list(capture(pair, corpus, None, dtype="bfloat16", **SMALL))), rounded)


def test_both_models_answer_the_prompts_and_the_answers_go_through_both(pair, corpus, tmp_path):
    store = capture(pair, corpus, tmp_path, prompts=["Hi", "What?"], **SMALL)
    assert store.corpus.sources[len(corpus) :] == ("answers_base",) * 2 + ("answers_tuned",) * 2
    answer = store.rows_of(len(corpus))
    alone = pair.capture(store.corpus.batch([len(corpus)]))[0]
    assert torch.allclose(answer.x, alone[answer.position], atol=1e-5)
    assert answer.x.shape[0] == len(alone) - 1
    asked = len(pair.base.seen)
    capture(pair, corpus, tmp_path, prompts=["Hi", "What?"], **SMALL)
    assert len(pair.base.seen) == asked, "an existing store keeps its answers"
    with pytest.raises(PairMismatch, match="prompts_sha256"):
        capture(pair, corpus, tmp_path, prompts=["Hi"], **SMALL)


def test_no_answer_to_a_held_out_prompt_is_trained_on(pair, tmp_path):
    # Both models answer every prompt, and half of the prompts are asked twice.
    pair.base.script = pair.tuned.script = [[70, 71, END]]
    prompts = [f"Question {n % 6}?" for n in range(9)]
    nothing = Corpus.from_texts(["Some text."], pair.tokenizer)
    store = capture(pair, nothing, tmp_path, prompts=prompts, **SMALL)
    for seed in range(5):
        sides = store.split(0.7, seed)
        texts = [{tuple(store.corpus.ids_of(s).tolist()) for s in side.sequences} for side in sides]
        assert texts[0] and texts[1] and not texts[0] & texts[1]
        assert len(sides[0].sequences) + len(sides[1].sequences) == 1 + 2 * 9
    with pytest.raises(EmptyData, match="the 2 sequences are 1 conversation"):
        store.subset(store.sequences[1:2] + store.sequences[10:11]).split(0.5)


def test_the_manifest_says_what_was_captured_and_how(pair, corpus, tmp_path):
    store = capture(pair, corpus, tmp_path, **SMALL)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest == store.manifest
    assert manifest["hook"] == pair.hook and manifest["pair"] == pair.description()
    assert manifest["rows"] == len(store) == sum(entry["rows"] for entry in manifest["shards"])
    assert sum(entry["sequences"] for entry in manifest["shards"]) == len(corpus)
    assert manifest["rows"] + sum(manifest["dropped"].values()) == corpus.n_tokens
    assert manifest["bos"] == {"id": BOS, "sequences_opened_by_it": len(corpus)}
    assert store.tokenizer.decode([50, 51]) == pair.tokenizer.decode([50, 51])
    assert not any(str(tmp_path) in text.decode("utf-8", "ignore") for text in files(tmp_path).values())


def test_a_policy_that_leaves_nothing_is_refused(pair):
    with pytest.raises(EmptyData, match="leaves none of the 2 tokens"):
        capture(pair, TokenBatch.from_ids(torch.tensor([[50], [51]])), None, progress=False)


def test_streaming_gives_the_tokens_of_the_store_in_another_order_each_epoch(pair, corpus):
    stored = torch.cat(list(capture(pair, corpus, None, **SMALL)))
    batches = stream(pair, corpus, batch_size=32, buffer_tokens=100, seed=5, max_tokens=64)
    epochs = [torch.cat(list(batches)) for _ in range(2)]
    for epoch in epochs:
        assert epoch.shape == stored.shape
        assert torch.allclose(epoch.flatten(1).sort(0).values, stored.flatten(1).sort(0).values, atol=1e-5)
    assert not torch.equal(*epochs)
    batches.epoch = 0
    assert torch.equal(torch.cat(list(batches)), epochs[0])
    assert [len(x) for x in batches][:-1] == [32] * (len(stored) // 32)


def test_two_language_models_are_captured_as_transformers_computes_them(tmp_path):
    base, tuned = tiny_llama_model(0), tiny_llama_model(1)
    pair = ModelPair(base, tuned, hook="blocks.1.hook_resid_post")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 60, (5, 12), generator=generator)
    ids[:, 0] = LLAMA_BOS
    mask = torch.arange(12) < torch.tensor([12, 3, 7, 12, 5])[:, None]
    batch = TokenBatch.from_ids(ids, mask, special_ids=(LLAMA_BOS,))
    capture(pair, batch, tmp_path, drop=Drop(sinks=None), max_tokens=24, shard_tokens=20, progress=False)
    store = PairedActivations.open(tmp_path)
    for sequence in range(5):
        alone = ids[sequence][mask[sequence]][None]
        with torch.no_grad():
            states = [m(alone, output_hidden_states=True).hidden_states[2][0, 1:] for m in (base, tuned)]
        assert torch.allclose(store.rows_of(sequence).x, torch.stack(states, dim=1), atol=1e-5)
    store.check_against(pair)
    with pytest.raises(PairMismatch, match=r"pair\.hook"):
        store.check_against(ModelPair(base, tuned, hook="blocks.0.hook_resid_post"))
    with pytest.raises(PairMismatch, match="fingerprint"):
        store.check_against(ModelPair(tuned, base, hook=pair.hook))
