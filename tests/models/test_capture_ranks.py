"""A capture by several processes is that of one, and goes on whichever of them is killed."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import tl_crosscoder
from tests.models.fake_pair import FakePair, byte_tokenizer
from tests.training.ranks import on_processes
from tl_crosscoder.errors import CorruptFile, InUse, NonFiniteActs, PairMismatch
from tl_crosscoder.lock import alone_in
from tl_crosscoder.models.activations import PairedActivations
from tl_crosscoder.models.capture import capture
from tl_crosscoder.models.corpus import Corpus
from tl_crosscoder.ranks import Alone
from tl_crosscoder.training.sharding import joined

SMALL = {"max_tokens": 64, "shard_tokens": 100, "progress": False}


def files(folder):
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()
    }


def texts(n=120):
    return [f"document {i} says something about the number {i * 7}" + "!" * (i % 9) for i in range(n)]


def run(folder, *, pair=None, **options):
    pair = pair or FakePair(byte_tokenizer())
    with joined() as shard:
        data = Corpus.from_texts(options.pop("texts", texts()), pair.tokenizer)
        store = capture(pair, data, folder, **SMALL | options, ranks=shard.every)
        return len(store), pair.calls


class Dying(FakePair):
    """One rank of which is killed before its n-th batch."""

    def __init__(self, at):
        super().__init__(byte_tokenizer())
        self.at = at

    def capture(self, batch):
        if self.calls == self.at and os.environ.get("RANK") == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        return super().capture(batch)


def run_and_die(folder, at):
    return run(folder, pair=Dying(at))


def run_with_answers(folder):
    return run(folder, prompts=["Hi", "What?", "Why?"])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    run(folder)
    return folder


@pytest.mark.parametrize("size", [2, 3])
def test_processes_leave_the_files_of_one_and_share_the_work(whole, tmp_path, size):
    told = on_processes(run, size, tmp_path)
    assert files(tmp_path) == files(whole)
    _, alone = run(tmp_path / "alone")
    assert len({rows for rows, _ in told}) == 1
    assert sum(calls for _, calls in told) == alone + size - 1, (
        "each further process looks at the shapes once"
    )
    assert max(calls for _, calls in told) < alone


def test_answers_are_made_once_and_read_by_all(tmp_path):
    on_processes(run_with_answers, 2, tmp_path / "two")
    run_with_answers(tmp_path / "one")
    assert files(tmp_path / "two") == files(tmp_path / "one")


@pytest.mark.parametrize(("at", "size"), [(1, 2), (5, 2), (9, 3), (9, 1)])
def test_killed_in_one_process_it_goes_on_with_any_number(whole, tmp_path, at, size):
    with pytest.raises(RuntimeError, match="rank 1: it died"):
        on_processes(run_and_die, 2, tmp_path, at)
    kept = {path.name for path in tmp_path.glob("shard-*.safetensors")}
    n = len(list(whole.glob("shard-*")))
    assert 0 < len(kept) < n
    with pytest.raises(CorruptFile, match=rf"holds {len(kept)} of {n} shards: its capture was interrupted"):
        PairedActivations.open(tmp_path)
    for half in (".tmpAbC123", "shard-00007.safetensors.tmp"):
        (tmp_path / half).write_bytes(b"half")
    written = {name: (tmp_path / name).stat().st_mtime_ns for name in kept}
    on_processes(run, size, tmp_path)
    assert files(tmp_path) == files(whole)
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in kept} == written


def run_as_another_pair(folder):
    try:
        run(folder, pair=FakePair(byte_tokenizer(), weights="b"))
    except PairMismatch as error:
        return str(error)


def test_another_pair_is_refused_by_all(whole):
    first, second = on_processes(run_as_another_pair, 2, whole)
    assert first == second and "pair.base.fingerprint = 'basea', this call has 'baseb'" in first


def run_ill(folder, bad):
    """Of 30 texts some have an ill token; each process alone may skip two."""
    tokenizer = byte_tokenizer()
    token = tokenizer.convert_tokens_to_ids("Q")
    data = ["abcdefgh" * 12 + ("Q" if i in bad else "") for i in range(30)]
    try:
        return run(
            folder,
            pair=FakePair(tokenizer, trouble={token: float("nan")}),
            texts=data,
            on_nonfinite="skip",
        )[0]
    except NonFiniteActs as error:
        return str(error)
    except RuntimeError as error:
        return str(error)


def test_what_processes_skip_is_counted_together(tmp_path):
    """2,880 tokens and some: 2 may be skipped."""
    assert on_processes(run_ill, 2, tmp_path / "few", (3,))[0] == run_ill(tmp_path / "one", (3,))
    assert files(tmp_path / "few") == files(tmp_path / "one")
    first, second = on_processes(run_ill, 2, tmp_path / "many", (3, 4, 5, 6))
    assert "tokens are not finite and at most 2 of 2," in first + second
    assert "another process stopped" in first + second or "tokens are not finite" in min(first, second)


def test_a_second_capture_of_a_folder_is_refused_and_a_finished_one_is_opened(whole, tmp_path):
    with alone_in(tmp_path), pytest.raises(InUse, match="is being written to by process"):
        run(tmp_path)
    with alone_in(whole):
        assert run(whole)[1] == 0


def test_several_processes_want_a_folder():
    with pytest.raises(ValueError, match="2 processes capture together into a folder"):
        pair = FakePair(byte_tokenizer())
        capture(pair, Corpus.from_texts(texts(3), pair.tokenizer), None, ranks=Alone(2))


def test_an_entry_that_is_none_is_named(whole, tmp_path):
    with pytest.raises(RuntimeError):
        on_processes(run_and_die, 2, tmp_path, 9)
    entry = next(tmp_path.glob("shard-*.json"))
    entry.write_text('{"file": "../x"}')
    with pytest.raises(CorruptFile, match=r"shard-\d+\.json is no entry of shard \d+\.  Delete it"):
        run(tmp_path)
    entry.unlink()
    run(tmp_path)
    assert files(tmp_path) == files(whole)


@pytest.mark.slow
def test_torchrun_captures_what_one_process_captures(tmp_path):
    data = Path(tl_crosscoder.__file__).parent / "data"
    models = [str(data / "tiny" / "base")] * 2
    text = ["--text", str(data / "text" / "glosses.txt"), "--text", str(data / "text" / "jargon.txt")]
    command = [
        "-m",
        "tl_crosscoder",
        "capture",
        *models,
        "--hook",
        "blocks.1.hook_resid_post",
        *text,
        "--json",
    ]
    several = ["-m", "torch.distributed.run", "--nproc-per-node", "2"]
    told = []
    for start, out in ([], "one"), (several, "two"):
        done = subprocess.run(
            [sys.executable, *start, *command, "--quiet", "--out", str(tmp_path / out)],
            capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, cwd=Path(__file__).parents[2],
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        told.append(json.loads(done.stdout))  # said once
    assert told[0] == told[1] and told[0]["tokens"] > 65_536
    assert files(tmp_path / "one") == files(tmp_path / "two")
