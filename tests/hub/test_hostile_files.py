"""Files that are truncated, altered or hostile: each is refused with its reason, quickly, and nothing else happens."""

import json
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.dictionary.sparsity import BatchTopK
from tl_crosscoder.errors import CorruptFile
from tl_crosscoder.hub.save import load, save


@pytest.fixture
def folder(tmp_path):
    crosscoder = Crosscoder(3, 4, BatchTopK(2))
    crosscoder.sparsity.threshold.fill_(0.5)
    return save(crosscoder, tmp_path / "c")


def split(raw):
    length = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def joined(header, data):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def edit_header(change):
    def edit(raw):
        header, data = split(raw)
        header.pop("__metadata__", None)
        return joined(change(header) or header, data)

    return edit


def edit_entry(name, **changes):
    return edit_header(lambda header: header[name].update(changes))


def with_value(value):
    """The first float of the data replaced."""

    def edit(raw):
        header, data = split(raw)
        return joined(header, struct.pack("<f", value) + data[4:])

    return edit


def duplicate_key(raw):
    header, data = split(raw)
    header.pop("__metadata__", None)
    text = json.dumps(header).encode()
    return joined(text[:-1] + b"," + text[1:], data)


def extra_tensor(name):
    return edit_header(
        lambda header: header.update({name: {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}})
    )


def non_positive_scale(raw):
    header, data = split(raw)
    start = header["scale"]["data_offsets"][0]
    return joined(header, data[:start] + struct.pack("<f", -1.0) + data[start + 4 :])


def last_in_bfloat16(raw):
    header, data = split(raw)
    header.pop("__metadata__", None)
    last = max(header.values(), key=lambda entry: entry["data_offsets"][1])
    start, stop = last["data_offsets"]
    last.update(dtype="BF16", data_offsets=[start, (start + stop) // 2])
    return joined(header, data[: (start + stop) // 2])


def always(content):
    return lambda _: content


WEIGHTS = {
    "empty": (always(b""), "header of 0 bytes"),
    "cut short": (lambda raw: raw[:-5], "the file at"),
    "cut inside the header": (lambda raw: raw[:60], "header of"),
    "longer than it says": (lambda raw: raw + b"\0", "the file at"),
    "a header of 2^63 bytes": (lambda raw: struct.pack("<Q", 1 << 63) + raw[8:], "largest allowed"),
    "a header beyond the cap": (always(joined(b" " * (1 << 20) + b"{}", b"")), "largest allowed"),
    "a hundred thousand tensors": (
        edit_header(lambda h: h.update({f"t{i}": {} for i in range(10**5)})),
        "largest allowed",
    ),
    "not JSON": (always(joined(b"{oops}", b"")), "Expecting"),
    "not UTF-8": (always(joined(b'{"\xff": 1}', b"")), "utf-8"),
    "a list": (always(joined(b"[]", b"")), "want a JSON object, got a list"),
    "deep": (always(joined(b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}", b"")), "nested too deeply"),
    "a key twice": (duplicate_key, "a key appears twice"),
    "a name with NUL": (extra_tensor("a\0b"), "unexpected"),
    "a name that climbs": (extra_tensor("../../etc/passwd"), "unexpected"),
    "a tensor missing": (
        edit_header(lambda h: {k: v for k, v in h.items() if k != "b_enc"}),
        "missing \\['b_enc'\\]",
    ),
    "an entry that is no tensor": (edit_header(lambda h: h.update(b_enc=7)), "describes no tensor"),
    "another shape": (edit_entry("W_dec", shape=[4, 3, 2]), "wants the shape \\[4, 2, 3\\]"),
    "a negative shape": (edit_entry("b_enc", shape=[-4]), "describes no tensor"),
    "integers": (edit_entry("b_enc", dtype="I32"), "dtype"),
    "an unknown dtype": (edit_entry("b_enc", dtype=["F32"]), "describes no tensor"),
    "mixed dtypes": (last_in_bfloat16, "differ in dtype"),
    "offsets that are words": (edit_entry("b_enc", data_offsets=["0", "16"]), "describes no tensor"),
    "negative offsets": (edit_entry("b_enc", data_offsets=[-16, 0]), "describes no tensor"),
    "huge offsets": (edit_entry("b_enc", data_offsets=[10**30, 10**30 + 16]), "overlap or leave a gap"),
    "overlapping tensors": (edit_entry("b_enc", data_offsets=[0, 16]), "overlap or leave a gap"),
    "NaN weights": (with_value(float("nan")), "holds NaN or Inf"),
    "Inf weights": (with_value(float("inf")), "holds NaN or Inf"),
    "a scale below zero": (non_positive_scale, "scale is not above 0"),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_hostile_weights_are_refused_with_the_reason(folder, case):
    change, reason = WEIGHTS[case]
    path = folder / "model.safetensors"
    path.write_bytes(change(path.read_bytes()))
    start = time.perf_counter()
    with pytest.raises(CorruptFile, match=reason):
        load(folder)
    assert time.perf_counter() - start < 5


def edit_config(change):
    def edit(text):
        config = json.loads(text)
        return json.dumps(change(config) or config)

    return edit


def edit_crosscoder(**changes):
    return edit_config(lambda config: config["crosscoder"].update(changes))


CONFIGS = {
    "empty": (always(""), "Expecting value"),
    "a list": (always("[]"), "want a JSON object"),
    "too large": (lambda text: text + " " * (1 << 20), "more than 1048576 bytes"),
    "deep": (always('{"a":' * 100_000 + "1" + "}" * 100_000), "nested too deeply"),
    "a key twice": (lambda text: '{"extra": {}, ' + text.lstrip()[1:], "a key appears twice"),
    "NaN": (lambda text: text.replace('"d_in": 3', '"d_in": NaN'), "NaN is not a number"),
    "Infinity": (lambda text: text.replace('"d_in": 3', '"d_in": -Infinity'), "-Infinity is not a number"),
    "1e999": (lambda text: text.replace('"norm": 1.0', '"norm": 1e999'), "1e999 is not a number"),
    "ten thousand digits": (lambda text: text.replace('"d_in": 3', f'"d_in": {"9" * 10_000}'), "digits"),
    "an unknown field": (edit_config(lambda c: c.update(callback="os.system")), "\\['callback'\\]"),
    "a missing field": (edit_config(lambda c: {k: v for k, v in c.items() if k != "axes"}), "\\['axes'\\]"),
    "no version": (edit_config(lambda c: c.update(format_version=None)), "format_version None"),
    "a version that is true": (edit_config(lambda c: c.update(format_version=True)), "format_version True"),
    "other axes": (
        edit_config(lambda c: c["axes"].update(W_enc="d_sae d_in model")),
        "not what this format writes",
    ),
    "a crosscoder that is a path": (
        edit_config(lambda c: c.update(crosscoder="../c")),
        "not what this format writes",
    ),
    "a huge dictionary": (edit_crosscoder(d_sae=10**15), "d_sae is 1000000000000000"),
    "a large dictionary without weights": (edit_crosscoder(d_sae=1 << 26), "wants the shape"),
    "a width that is true": (edit_crosscoder(d_in=True), "d_in is True"),
    "a negative width": (edit_crosscoder(d_in=-3), "d_in is -3"),
    "an unknown setting": (edit_crosscoder(hidden=3), "no setting 'hidden'"),
    "an unknown sparsity": (edit_crosscoder(sparsity={"name": "os.system"}), "no sparsity named 'os.system'"),
    "a sparsity that is a list": (edit_crosscoder(sparsity=[1]), "want a description"),
    "a sparsity with too much": (edit_crosscoder(sparsity={"name": "relu", "k": 1}), "no argument 'k'"),
    "a k beyond the dictionary": (edit_crosscoder(sparsity={"name": "topk", "k": 99}), "got k=99"),
    "an unknown norm": (edit_crosscoder(code_norm="l7"), "code_norm"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_hostile_configs_are_refused_with_the_reason(folder, case):
    change, reason = CONFIGS[case]
    path = folder / "config.json"
    path.write_text(change(path.read_text()))
    with pytest.raises(CorruptFile, match=reason):
        load(folder)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_changed_bytes_load_whole_or_are_refused(folder, data):
    name = data.draw(st.sampled_from(["config.json", "model.safetensors"]))
    path = folder / name
    good = path.read_bytes()
    bad = bytearray(good)
    for _ in range(data.draw(st.integers(1, 4))):
        bad[data.draw(st.integers(0, min(len(bad), 700) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(bad[: data.draw(st.integers(0, len(bad)))] if data.draw(st.booleans()) else bad))
    try:
        crosscoder = load(folder)
    except CorruptFile:
        pass
    else:
        assert all(tensor.isfinite().all() for tensor in crosscoder.state_dict().values())
    finally:
        path.write_bytes(good)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load(tmp_path)


def test_a_pickle_is_never_opened(folder):
    torch.save({"W_enc": torch.zeros(2)}, folder / "model.safetensors")
    with pytest.raises(CorruptFile):
        load(folder)


def test_no_hostile_file_takes_memory(folder):
    """In a process of its own, after one good load: what refusing all of them adds to the most it ever held."""
    path = folder / "model.safetensors"
    good, places = path.read_bytes(), []
    for number, (change, _) in enumerate(WEIGHTS.values()):
        place = folder.parent / f"bad{number}"
        place.mkdir()
        (place / "config.json").write_bytes((folder / "config.json").read_bytes())
        (place / "model.safetensors").write_bytes(change(good))
        places.append(str(place))
    largest = max((Path(place) / "model.safetensors").stat().st_size for place in places)
    code = f"""
import json, resource
from tl_crosscoder.errors import CorruptFile
from tl_crosscoder.hub.save import load
most = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
load({str(folder)!r})
before, refused = most(), 0
for place in {places!r}:
    try:
        load(place)
    except CorruptFile:
        refused += 1
print(json.dumps([refused, most() - before]))
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    refused, grown = json.loads(ran.stdout.splitlines()[-1])
    assert refused == len(WEIGHTS)
    assert grown < largest + 50e6
