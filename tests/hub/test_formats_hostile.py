"""Files of others that are hostile: refused with a reason, and no canary is ever made."""

import json
import os
import pickle  # noqa: TID251 - to write what must never be run
import struct
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import format_writers as writers
import pytest
import torch

from tl_crosscoder.errors import CorruptFile, CrosscoderError, UnreadableFormat
from tl_crosscoder.hub.inspect import inspect
from tl_crosscoder.hub.load import load


class Payload:
    """Makes the canary when it is unpickled by whoever runs what it asks for."""

    def __init__(self, canary, how):
        self.canary, self.how = str(canary), how

    def __reduce__(self):
        if self.how == "os.system":
            return os.system, (f"touch {self.canary}",)
        if self.how == "eval":
            return eval, (f"open({self.canary!r}, 'w')",)
        return Path.touch, (Path(self.canary),)


@pytest.mark.parametrize("how", ["os.system", "eval", "a method"])
@pytest.mark.parametrize("where", ["a tensor's place", "beside the tensors", "the whole"])
def test_a_payload_is_never_run(tmp_path, how, where):
    canary, folder = tmp_path / "canary", tmp_path / "c"
    written, payload = writers.kissane(folder), Payload(canary, how)
    content = {
        "a tensor's place": {**written.tensors, "b_enc": payload},
        "beside the tensors": {**written.tensors, "note": payload},
        "the whole": payload,
    }
    torch.save(content[where], folder / "cc_weights.pt")
    for read in (lambda: load(folder, scale=1), lambda: inspect(folder)):
        with pytest.raises(CorruptFile, match="which no tensors need; it was not run"):
            read()
    assert not canary.exists()


def test_the_environment_cannot_turn_the_protection_off(tmp_path):
    canary, folder = tmp_path / "canary", tmp_path / "c"
    written = writers.kissane(folder)
    torch.save({**written.tensors, "b_enc": Payload(canary, "os.system")}, folder / "cc_weights.pt")
    code = f"from tl_crosscoder.hub.load import load\nload({str(folder)!r}, scale=1)"
    environment = {**os.environ, "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert "CorruptFile" in ran.stderr
    assert not canary.exists()


def test_the_code_of_a_repository_is_never_run(tmp_path):
    written = writers.antebe(tmp_path / "c")
    assert (written.path / "dfc.py").exists()
    load(written.path, scale=1)
    inspect(written.path)
    assert not (written.path / "canary").exists()


def archive(path, program, entries=(), compress=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compress) as made:
        made.writestr("a/data.pkl", program)
        for name, data in entries:
            made.writestr(name, data)


def tensor_program(shape, strides, numel=4):
    """torch.save's own program for one tensor, written by hand."""
    storage = (
        b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK"
        + bytes([numel])
        + b"tQ"
    )
    numbers = lambda ns: b"(" + b"".join(b"\x8a\x08" + struct.pack("<q", n) for n in ns) + b"t"
    call = b"\x80\x02}X\x05\x00\x00\x00W_encctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\x00"
    return call + numbers(shape) + numbers(strides) + b"\x89ccollections\nOrderedDict\n)RtRs."


ONE = [("a/data/0", b"\0" * 16)]
LONG, REPEATED = tensor_program((10**9, 5, 10**6), (5, 1, 5)), tensor_program((10**6, 10**6, 2), (0, 0, 0))
ARCHIVES = {
    "not an archive": (lambda p: p.write_bytes(b"<html>not found</html>"), "not an archive"),
    "an old pickle": (lambda p: p.write_bytes(pickle.dumps({"W_enc": 1})), "not an archive"),
    "compressed": (lambda p: archive(p, b"}." * 10, compress=zipfile.ZIP_DEFLATED), "is compressed"),
    "two programs": (lambda p: archive(p, b"}.", [("b/data.pkl", b"}.")]), "want one program"),
    "a program too long": (lambda p: archive(p, b"N0" * (1 << 20) + b"}."), "want one program of at most"),
    "a shape beyond its numbers": (lambda p: archive(p, LONG, ONE), "over a storage of 4"),
    "a shape that repeats one number": (lambda p: archive(p, REPEATED, ONE), "over a storage of 4"),
    "a program cut short": (lambda p: archive(p, b"\x80\x02}X\x05\x00\x00\x00W_"), "cannot be followed"),
    "a memo that is not there": (lambda p: archive(p, b"\x80\x02h\x07."), "cannot be followed"),
}  # fmt: skip


@pytest.mark.parametrize("case", ARCHIVES)
def test_hostile_archives_are_refused_with_the_reason(tmp_path, case):
    make, reason = ARCHIVES[case]
    make(tmp_path / "model.pt")
    start = time.perf_counter()
    with pytest.raises(CorruptFile, match=reason):
        load(tmp_path)
    assert time.perf_counter() - start < 5


def with_header(folder, edit):
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    text = edit(header, raw[8 + length :])
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


EMPTY = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}


def bias(**changes):
    return lambda h, _: json.dumps(h | {"encoder.bias": {**h["encoder.bias"], **changes}}).encode()


HEADERS = {
    "a key twice": (lambda h, _: json.dumps(h)[:-1].encode() + b"," + json.dumps(h)[1:].encode(), "a key appears twice"),
    "a huge header": (lambda h, _: json.dumps(h).encode() + b" " * (1 << 21), "largest allowed"),
    "a million tensors": (lambda h, _: json.dumps(h | {f"t{i}": {} for i in range(10**5)}).encode(), "largest allowed"),
    "a name that climbs": (lambda h, _: json.dumps(h | {"../../x": EMPTY}).encode(), "unknown tensor"),
    "a name with NUL": (lambda h, _: json.dumps(h | {"a\0b": EMPTY}).encode(), "unknown tensor"),
    "weights of integers": (bias(dtype="I64"), "wants a float dtype"),
    "another shape": (bias(shape=[3, 4]), "wants the shape"),
}  # fmt: skip


@pytest.mark.parametrize("case", HEADERS)
def test_hostile_headers_of_other_formats_are_refused(tmp_path, case):
    edit, reason = HEADERS[case]
    writers.dictionary_learning(tmp_path / "c", batch_topk=False)
    with_header(tmp_path / "c", edit)
    with pytest.raises(CrosscoderError, match=reason):
        load(tmp_path / "c")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("make", "name"),
    [
        (writers.dictionary_learning, "encoder.weight"),
        (writers.papergrade, "W_dec"),
        (writers.kissane, "b_dec"),
        (writers.heterogeneous, "decoder.projections.1.weight"),
    ],
)
def test_weights_that_are_no_numbers_are_refused(tmp_path, make, name, value):
    written = make(tmp_path / "c")
    tensors = {
        **written.tensors,
        name: written.tensors[name].index_put((torch.tensor([1]),), torch.tensor(value).double()),
    }
    file = next(p.name for p in written.path.iterdir() if p.suffix in (".safetensors", ".pt"))
    writers.write(written.path, file, tensors)
    with pytest.raises(CorruptFile, match="NaN or Inf"):
        load(written.path, **written.given)


CONFIGS = [
    {"dict_size": 10**30}, {"activation_dim": "../../etc/passwd"}, {"num_layers": -1}, {"encoder_layers": [0, 10**9]},
    {"code_normalization": ["x"]},
    {"k": 10**12}, {"trainer": {"lm_name": {"a": 1}, "layer": "../.."}}, {"encoder_layers": {}}, {"dict_class": [[[]]]},
]  # fmt: skip


@pytest.mark.parametrize("config", CONFIGS)
def test_settings_of_the_wrong_kind_are_refused_or_change_nothing(tmp_path, config):
    written = writers.dictionary_learning(tmp_path / "c", config=config)
    try:
        load(written.path)
    except (CorruptFile, UnreadableFormat):
        return
    assert set(config) <= {"k", "trainer", "dict_class", "code_normalization"}


def test_no_path_named_in_the_settings_is_ever_opened(tmp_path):
    canary = tmp_path / "outside"
    os.mkfifo(canary)  # opening it would wait for ever
    written = writers.kissane(
        tmp_path / "c", config={"weights": str(canary), "site": "../outside", "checkpoint": "../outside"}
    )
    assert load(written.path, scale=1).d_sae == writers.F
    (tmp_path / "c" / "trainer_config.json").symlink_to(canary)
    assert load(written.path, scale=1).d_sae == writers.F


YAML = {
    "an object": ("a: !!python/object/apply:os.system ['touch CANARY']", "unreadable YAML"),
    "references": ("a: &a [1, 2]\nb: &b [*a, *a]\nc: [*b, *b]", "references"),
    "too long": ("a: 1\n" + "#" * (1 << 20), "more than 1048576"),
    "a list": ("- 1", "want a mapping"),
    "not a number": ("a: .nan", "unreadable YAML"),
}


@pytest.mark.parametrize("case", YAML)
def test_hostile_yaml_is_refused(tmp_path, case):
    text, reason = YAML[case]
    written = writers.crosscode(tmp_path / "c")
    (written.path / "model_cfg.yaml").write_text(text.replace("CANARY", str(tmp_path / "canary")))
    with pytest.raises(CorruptFile, match=reason):
        load(written.path)
    assert not (tmp_path / "canary").exists()


def test_names_with_markup_and_control_characters_are_shown_inert(tmp_path):
    evil = "<script>alert(1)</script>\x1b[2J\u202e[bold]"
    writers.kissane(tmp_path / "c", config={"hook_point": evil, "model_name": evil})
    shown = str(inspect(tmp_path / "c"))
    assert "\x1b" not in shown
    assert "\u202e" not in shown
    assert "<script>" in shown  # a terminal has no markup; nothing is silently taken away
