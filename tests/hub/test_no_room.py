"""A disk that is full: what was there stays whole, and the error says how much is wanted."""

import resource
import signal
import sys

import pytest

import tl_crosscoder as tlc
from tests.hub.published import small_crosscoder
from tl_crosscoder import cli
from tl_crosscoder.errors import NotSaved
from tl_crosscoder.hub.convert import WRITERS, convert
from tl_crosscoder.hub.room import told_of_room


@pytest.fixture
def no_large_files():
    """The system refuses files beyond 4 kB, as it refuses any on a full disk."""
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def on():
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))

    yield on
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, before)


def held(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("to", WRITERS)
def test_what_was_there_before_is_whole_and_the_bytes_are_named(tmp_path, no_large_files, to):
    convert(small_crosscoder(), to, tmp_path / "c")
    before, large = held(tmp_path / "c"), small_crosscoder(d_sae=512)
    no_large_files()
    with pytest.raises(NotSaved, match=r"it needs [\d,]{6,} bytes or so, [\d,]+ are free there"):
        convert(large, to, tmp_path / "c")
    assert held(tmp_path / "c") == before
    assert [path.name for path in tmp_path.iterdir()] == ["c"]  # nothing half done beside it


def test_a_publication_that_finds_no_room_sends_nothing_and_exits_with_5(
    tmp_path, no_large_files, monkeypatch, capsys
):
    tlc.save(small_crosscoder(d_sae=512), tmp_path / "c")
    monkeypatch.setattr(sys, "argv", ["tl-crosscoder", "publish", str(tmp_path / "c"), "me/cc", "--dry-run"])
    no_large_files()
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 5
    assert "could not be written" in capsys.readouterr().err


def test_other_errors_of_the_system_stay_what_they_are(tmp_path):
    with pytest.raises(PermissionError), told_of_room(tmp_path / "a" / "b", 1):
        raise PermissionError(13, "Permission denied", "x")
