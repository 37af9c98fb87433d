"""The folder of checkpoints: what is written is read, what is damaged is noticed, what must stay stays."""

import hashlib
import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch

from tl_crosscoder.errors import CorruptFile, InUse, NotSaved
from tl_crosscoder.training import checkpoint as checkpoints
from tl_crosscoder.training.checkpoint import Checkpoint, best, newest, prune, read, taken, write


def checkpoint(step=5, loss=None, state=None):
    state = {"weights": torch.full((4,), float(step)), "step": step} if state is None else state
    return Checkpoint(
        step=step,
        steps=100,
        training={"a": 1},
        state=state,
        rows=[{"step": step, "loss": 0.1}],
        loss=loss,
        machine={},
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def steps(folder: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in sorted(folder.iterdir())]


def test_what_is_read_is_what_was_written(tmp_path):
    shared = torch.arange(3)
    state = {
        "float32": torch.tensor([[1.5, -0.0], [float("inf"), float("nan")]]),
        "bfloat16": torch.tensor([0.1], dtype=torch.bfloat16),
        "bool": torch.tensor([True, False]),
        "bytes": torch.tensor([0, 255], dtype=torch.uint8),
        "number": torch.tensor(7.0, dtype=torch.float64),
        "empty": torch.zeros(0, 2),
        "turned": torch.arange(6).view(2, 3).T,
        "twice": {"a": shared, "b": shared},
        "none": {},
        "values": {"large": 2**127, "small": 0.1, "no": None, "text": "ü", "list": [1, 2]},
        "infinite": -math.inf,
    }
    before = checkpoint(12, loss=0.25, state=state)
    after = read(write(before, tmp_path))

    def same(a, b):
        if isinstance(a, dict):
            return list(a) == list(b) and all(same(a[name], b[name]) for name in a)
        if not isinstance(a, torch.Tensor):
            return a == b
        bits = [t.contiguous().view(-1).view(torch.uint8).tolist() if t.numel() else [] for t in (a, b)]
        return a.dtype == b.dtype and a.shape == b.shape and bits[0] == bits[1]

    assert same(before.state, after.state)
    assert {**vars(after), "state": 0} == {**vars(before), "state": 0}
    assert sorted(contents(tmp_path)) == [
        "step-00000012/checkpoint.json",
        "step-00000012/state.safetensors",
    ]


def test_every_flipped_bit_is_noticed_and_the_checkpoint_before_is_used(tmp_path):
    write(checkpoint(5), tmp_path)
    folder = write(checkpoint(10), tmp_path)
    for path in (folder / "state.safetensors", folder / "checkpoint.json"):
        whole = path.read_bytes()
        for place in range(0, len(whole), 3):
            spoiled = bytearray(whole)
            spoiled[place] ^= 1 << (place % 8)
            path.write_bytes(spoiled)
            found, damaged = newest(tmp_path)
            assert found.step == 5, (path.name, place)
            assert len(damaged) == 1 and damaged[0].startswith("step-00000010 is damaged and was passed over")
        path.write_bytes(whole)
    assert newest(tmp_path)[0].step == 10


@pytest.mark.parametrize("name", ["state.safetensors", "checkpoint.json"])
@pytest.mark.parametrize("left", [None, 0, 60])
def test_a_missing_empty_or_cut_file_is_noticed(tmp_path, name, left):
    write(checkpoint(5), tmp_path)
    path = write(checkpoint(10), tmp_path) / name
    path.write_bytes(path.read_bytes()[: left or 0])
    if left is None:
        path.unlink()
    assert newest(tmp_path)[0].step == 5
    shutil.rmtree(tmp_path / "step-00000005")
    with pytest.raises(CorruptFile, match=r"no checkpoint in .* is whole: step-00000010 is damaged"):
        newest(tmp_path)


def test_without_a_checkpoint_there_is_nothing_to_go_on_from(tmp_path):
    (tmp_path / "step-notes").mkdir()
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(FileNotFoundError, match=r"no checkpoint in .*without resume"):
            newest(folder)


def test_a_checkpoint_of_a_newer_library_is_not_passed_over(tmp_path, monkeypatch):
    write(checkpoint(5), tmp_path)
    monkeypatch.setattr(checkpoints, "FORMAT_VERSION", 3)
    write(checkpoint(10), tmp_path)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"format_version 3 is newer than 2.*upgrade"):
        newest(tmp_path)


def test_a_checkpoint_of_version_1_is_read(tmp_path):
    """As it was written: one file, its hash and its tensors beside the other values."""
    folder = write(checkpoint(5), tmp_path)
    about = json.loads((folder / "checkpoint.json").read_text())
    del about["digest"]
    about |= {"format_version": 1, **about.pop("files")["state.safetensors"]}
    text = json.dumps(about, sort_keys=True)
    about["digest"] = hashlib.sha256(text.encode()).hexdigest()
    (folder / "checkpoint.json").write_text(json.dumps(about, indent=1))
    assert newest(tmp_path)[0].state["weights"].tolist() == [5, 5, 5, 5]
    assert set(about) == {
        "step", "steps", "training", "state", "rows", "loss", "machine", "format_version", "sha256", "tensors", "digest"
    }  # fmt: skip


def test_two_trainings_never_save_into_one_folder(tmp_path):
    with taken(tmp_path), pytest.raises(InUse, match=r"is being written to by process \d+"), taken(tmp_path):
        pass
    assert not list(tmp_path.iterdir())
    with taken(tmp_path):
        pass


def test_the_newest_and_the_best_stay(tmp_path):
    # No loss before the second half; the lowest is that of step 60.
    for step, loss in [(20, None), (40, None), (60, 0.3), (80, 0.5), (90, 0.4), (100, 0.45)]:
        write(checkpoint(step, loss), tmp_path)
        prune(tmp_path, keep_last=2, last=step)
    assert steps(tmp_path) == [60, 90, 100]
    assert best(tmp_path).step == 60
    write(checkpoint(110, 0.2), tmp_path)
    prune(tmp_path, keep_last=1, last=110)
    assert steps(tmp_path) == [110]


def test_what_was_just_written_stays_and_later_checkpoints_that_were_passed_over_go(tmp_path):
    """Step 30 was damaged, the training went on from 20 and was stopped at 25."""
    write(checkpoint(20), tmp_path)
    (write(checkpoint(30, 0.1), tmp_path) / "state.safetensors").write_bytes(b"")
    write(checkpoint(25), tmp_path)
    prune(tmp_path, keep_last=1, last=25)
    assert steps(tmp_path) == [25]
    assert newest(tmp_path)[0].step == 25


def test_the_best_is_the_newest_while_none_has_a_loss(tmp_path):
    write(checkpoint(20), tmp_path)
    write(checkpoint(40), tmp_path)
    assert best(tmp_path).step == 40


def test_a_damaged_checkpoint_is_never_the_best(tmp_path):
    (write(checkpoint(60, 0.1), tmp_path) / "checkpoint.json").write_text("{}")
    write(checkpoint(80, 0.5), tmp_path)
    assert best(tmp_path).step == 80


def test_files_are_on_the_disk_before_the_folder_takes_its_name(tmp_path, monkeypatch):
    done, fsync, rename = [], os.fsync, os.rename

    def synced(handle):
        done.append(("fsync", Path(f"/proc/self/fd/{handle}").readlink().name))
        fsync(handle)

    def renamed(old, new):
        done.append(("rename", Path(new).name))
        rename(old, new)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "rename", renamed)
    write(checkpoint(5), tmp_path)
    at = done.index(("rename", "step-00000005"))
    moved = done.index(("rename", "state.safetensors"))
    assert done[:moved] == [("fsync", "state.safetensors")]
    assert set(done[moved + 1 : at - 1]) == {("fsync", "state.safetensors"), ("fsync", "checkpoint.json")}
    assert done[at - 1] == ("fsync", "step-00000005")
    assert done[at + 1] == ("fsync", tmp_path.name)


@pytest.mark.parametrize(
    ("error", "raised"),
    [(OSError(28, "No space left on device"), NotSaved), (KeyboardInterrupt(), KeyboardInterrupt)],
)
def test_a_save_that_fails_anywhere_changes_nothing(tmp_path, monkeypatch, error, raised):
    write(checkpoint(5), tmp_path)
    before, failures = contents(tmp_path), []
    for module, name in [
        (os, "mkdir"), (os, "fsync"), (os, "rename"), (checkpoints, "save_file"), (Path, "write_text")
    ]:  # fmt: skip
        call = getattr(module, name)
        for stop in range(1, 4):
            calls = 0

            def counted(*arguments, call=call, stop=stop, **options):
                nonlocal calls
                calls += 1
                if calls == stop:
                    raise error
                return call(*arguments, **options)

            with monkeypatch.context() as patch:
                patch.setattr(module, name, counted)
                try:
                    write(checkpoint(10), tmp_path)
                except raised:
                    failures.append(name)
                    assert contents(tmp_path) == before, (name, stop)
                    assert steps(tmp_path) == [5]
                else:
                    shutil.rmtree(tmp_path / "step-00000010")
    assert {"mkdir", "fsync", "rename", "save_file", "write_text"} == set(failures)
    assert failures.count("fsync") == 3


def test_an_error_names_the_folder_and_the_room(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(
        NotSaved,
        match=r"step-00000005 could not be written .*No space.* needs 16 bytes and more, [\d,]+ are free",
    ):
        write(checkpoint(5), tmp_path)


def test_what_a_killed_save_left_is_taken_away(tmp_path):
    write(checkpoint(5), tmp_path)
    for left in (
        ".step-00000010-abc/step-00000010",
        ".step-00000005-removed",
        "crashed/.step-00000005-xyz.old",
        "another/.step-00000010-parts",  # of a training whose folder lies in this one, and which may be running
    ):
        (tmp_path / left).mkdir(parents=True)
    (tmp_path / "notes.txt").write_text("mine")
    with taken(tmp_path):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "another",
        "crashed",
        "notes.txt",
        "step-00000005",
    ]
    assert not list((tmp_path / "crashed").iterdir())
    assert list((tmp_path / "another").iterdir())


def test_a_folder_where_a_file_is_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ValueError, match=r"no checkpoint can be written to .*choose another"),
        taken(tmp_path / "file" / "checkpoints"),
    ):
        pass
