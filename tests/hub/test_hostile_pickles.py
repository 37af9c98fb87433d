"""Every way in which a pickle can ask for more than tensors: refused by name, and no canary is ever made."""

import json
import os
import struct
import subprocess
import sys
import zipfile

import format_writers as writers
import pytest
import torch

from tl_crosscoder.errors import CorruptFile, CrosscoderError, UnreadableFormat
from tl_crosscoder.hub.formats.contents import Contents
from tl_crosscoder.hub.formats.opened import open_weights
from tl_crosscoder.hub.formats.pickles import Outlined
from tl_crosscoder.hub.inspect import inspect
from tl_crosscoder.hub.load import load


def word(text):
    raw = text.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def name(module, attribute):
    return f"c{module}\n{attribute}\n".encode()


def programs(canary):
    """By what they try -> the program, and what the refusal says."""
    touch = word(f"touch {canary}")
    system, run = name("posix", "system"), b"asks for 'posix.system'"
    other = name("collections", "OrderedDict")
    digits = b"\x8b" + struct.pack("<i", 10**5) + b"\x7f" * 10**5
    storage = lambda kind, record: b"(" + word("storage") + kind + word(record) + word("cpu") + b"K\x04tQ"
    tensor = lambda stored, shape: (
        name("torch._utils", "_rebuild_tensor_v2") + b"(" + stored + b"K\x00" + shape + b"(K\x01t\x89}tR"
    )
    floats = name("torch", "FloatStorage")
    held = lambda made: b"\x80\x02}" + word("W_enc") + made + b"s."
    return {
        "a call": (b"\x80\x02" + system + touch + b"\x85R.", run),
        "a call by names on the stack": (b"\x80\x04" + word("posix") + word("system") + b"\x93" + touch + b"\x85R.", run),
        "a call of an old protocol": (b"(S'touch " + str(canary).encode() + b"'\niposix\nsystem\n.", b"uses STRING"),
        "an instance of an old protocol": (b"(" + touch + b"iposix\nsystem\n.", b"uses INST"),
        "an object of an old protocol": (b"(" + system + touch + b"o.", run),
        "a class made without its constructor": (b"\x80\x02" + floats + b")\x81.", b"uses NEWOBJ"),
        "a number for a function": (b"\x80\x02\x82\x01.", b"uses EXT1"),
        "deep inside": (held(b"}" + word("a") + b"](" + system + touch + b"\x85Res"), run),
        "inside a storage": (held(tensor(storage(system, "0"), b"(K\x04t")), run),
        "inside a shape": (held(tensor(storage(floats, "0"), system + touch + b"\x85R")), run),
        "as a state": (b"\x80\x02" + other + b")R" + system + touch + b"\x85Rb.", run),
        "a method of what is known": (b"\x80\x04" + word("torch") + word("nn.Module") + b"\x93.", b"asks for 'torch.nn.Module'"),
        "a name that looks known": (b"\x80\x02" + name("torch._utils", "_rebuild_tensor_v2\0") + b".", b"asks for"),
        "a storage that is none": (held(tensor(storage(other, "0"), b"(K\x04t")), b"cannot be followed"),
        "a record that is not there": (held(tensor(storage(floats, "../../../etc/passwd"), b"(K\x04t")), b"no storage"),
        "more numbers than are held": (held(tensor(storage(floats, "0"), b"(K\x05t")), b"over a storage of 4"),
        "a negative shape": (held(tensor(storage(floats, "0"), b"(J\xff\xff\xff\xfft")), b"cannot be followed"),
        "a list for a key": (b"\x80\x02}]K\x01s.", b"cannot be followed"),
        "a number of a million digits": (b"\x80\x02}" + word("a") + digits + b"s.", b"uses LONG4"),
    }  # fmt: skip


def archive(path, program, entries=(("a/data/0", b"\0" * 16),)):
    with zipfile.ZipFile(path, "w") as made:
        for entry, data in (("a/data.pkl", program), ("a/version", b"3\n"), *entries):
            made.writestr(entry, data)
    return path


@pytest.mark.parametrize("case", programs(""))
def test_a_program_that_asks_for_more_than_tensors_is_refused_by_name_and_not_run(tmp_path, case):
    program, reason = programs(tmp_path / "canary")[case]
    archive(tmp_path / "model.pt", program)
    for read in (load, inspect):
        with pytest.raises(CorruptFile) as refused:
            read(tmp_path)
        assert reason.decode() in str(refused.value)
    assert not (tmp_path / "canary").exists()


def test_no_environment_makes_torch_run_any_of_them(tmp_path):
    """Both walls apart: the walk, and torch's own, reached without the walk, in a process that is told to trust every file."""
    for number, (program, _) in enumerate(programs(tmp_path / "canary").values()):
        (tmp_path / str(number)).mkdir()
        archive(tmp_path / str(number) / "model.pt", program)
    code = f"""
import json, torch
from pathlib import Path
from tl_crosscoder.hub.formats.contents import Contents
from tl_crosscoder.hub.formats.opened import open_weights
from tl_crosscoder.hub.load import load
said = []
for folder in sorted(Path({str(tmp_path)!r}).iterdir()):
    for read in (lambda: load(folder), lambda: open_weights(Contents(folder / "model.pt", {{}}, {{}}))):
        try:
            read()
            said.append("loaded")
        except Exception as error:
            said.append(type(error).__name__)
print(json.dumps(said))
"""
    environment = {**os.environ, "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}
    ran = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    said = json.loads(ran.stdout.splitlines()[-1])
    assert set(said[::2]) == {"CorruptFile"}  # the walk refuses every one
    assert "loaded" not in said  # and so does torch, which reads them as archives of its own
    assert not (tmp_path / "canary").exists()


def test_torch_alone_would_have_run_it(tmp_path):
    """The canary is a canary: what is refused here does run where nobody refuses."""
    program, _ = programs(tmp_path / "canary")["a call"]
    archive(tmp_path / "model.pt", program)
    torch.load(tmp_path / "model.pt", weights_only=False)  # noqa: TID251 - to see that the payload is one
    assert (tmp_path / "canary").exists()


def copied_entry(path):
    """A second name for the same bytes: the archive claims what it does not hold."""
    program = b"\x80\x02}."
    archive(path, program, [(f"a/data/{n}", b"\0" * 4096) for n in range(8)])
    raw = bytearray(path.read_bytes())
    first = raw.index(b"PK\x01\x02")
    place = struct.pack("<I", struct.unpack("<I", raw[first + 42 : first + 46])[0])
    at = first
    while (at := raw.find(b"PK\x01\x02", at + 1)) > 0:
        raw[at + 42 : at + 46] = place
        raw[at + 20 : at + 28] = struct.pack("<II", 1 << 30, 1 << 30)  # a gigabyte each
    path.write_bytes(bytes(raw))


def test_an_archive_that_claims_more_than_it_holds_is_refused(tmp_path):
    copied_entry(tmp_path / "model.pt")
    assert (tmp_path / "model.pt").stat().st_size < 50_000
    with pytest.raises(CorruptFile, match="claims more bytes than the file has"):
        load(tmp_path)


def test_an_archive_with_a_name_twice_is_refused(tmp_path):
    with pytest.warns(UserWarning, match="Duplicate name"):
        archive(tmp_path / "model.pt", b"\x80\x02}.", [("a/data/0", b"x"), ("a/data/0", b"y")])
    with pytest.raises(CorruptFile, match="holds a name twice"):
        load(tmp_path)


def test_entries_that_climb_out_of_the_archive_write_nothing(tmp_path):
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    archive(folder / "model.pt", b"\x80\x02}.", [("../../out", b"x"), (str(tmp_path / "absolute"), b"x")])
    with pytest.raises(UnreadableFormat):
        load(folder)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "b", "model.pt"]


def test_links_are_read_as_what_they_lead_to_or_not_at_all(tmp_path):
    written = writers.kissane(tmp_path / "real")
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "cc_weights.pt").symlink_to(written.path / "cc_weights.pt")  # as the Hub's cache has every file
    assert load(linked, scale=1).d_sae == writers.F
    (linked / "cc_weights.pt").unlink()
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for ever
    for target in (tmp_path / "pipe", tmp_path / "nowhere", linked):
        (linked / "cc_weights.pt").symlink_to(target)
        with pytest.raises(CrosscoderError):
            load(linked, scale=1)
        (linked / "cc_weights.pt").unlink()
    (linked / "cc_weights.pt").symlink_to("/etc/passwd")
    with pytest.raises(CorruptFile) as refused:
        load(linked, scale=1)
    assert "root:" not in str(refused.value)  # of what it leads to nothing is told


def test_what_torch_reads_is_held_to_what_the_walk_saw(tmp_path):
    torch.save({"W_enc": torch.zeros(2, 3)}, tmp_path / "model.pt")
    for seen in (Outlined("F32", (3, 2), "", 0, True), Outlined("F64", (2, 3), "", 0, True)):
        with pytest.raises(CorruptFile, match="is not the tensor that its program describes"):
            open_weights(Contents(tmp_path / "model.pt", {"W_enc": seen}, {}))
