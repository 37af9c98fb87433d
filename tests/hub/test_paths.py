"""A path that holds no crosscoder: every verb says what came, what was wanted and what to do."""

import shutil
import sys
from pathlib import Path

import pytest

import tl_crosscoder as tlc
from tests.hub.published import run_folder, small_crosscoder
from tl_crosscoder import cli
from tl_crosscoder.errors import UnreadableFormat
from tl_crosscoder.hub.inspect import inspect
from tl_crosscoder.hub.save import save


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """(exit code, error) of a verb, run where the paths of this module are."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("words")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.md").write_text("words")
    save(small_crosscoder(), tmp_path / "good")
    monkeypatch.chdir(tmp_path)

    def once(*arguments):
        monkeypatch.setattr(sys, "argv", ["tl-crosscoder", *arguments])
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code or 0
        return code, capsys.readouterr().err

    return once


VERBS = {
    "inspect": lambda path: ["inspect", path],
    "convert": lambda path: ["convert", path, "out"],
    "publish": lambda path: ["publish", path, "me/cc", "--license", "mit", "--dry-run"],
    "compare, first": lambda path: ["compare", path, "good"],
    "compare, second": lambda path: ["compare", "good", path],
}
CAME = {
    "missing": ("not there", "no file or folder"),
    "empty": ("is empty", "no .safetensors"),
    "file": ("is a file", "wanted weights"),
    "other": ("holds notes.md", "no .safetensors"),
}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("came", CAME)
def test_every_verb_says_what_came_and_what_was_wanted(call, verb, came, tmp_path):
    code, error = call(*VERBS[verb](came))
    assert code in (2, 3), error
    assert came in error and any(words in error for words in CAME[came])
    assert "wanted" in error or "owner/repo" in error  # the remedy
    assert "Errno" not in error and "Traceback" not in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("out", ["file", "file/x", "other"])
@pytest.mark.parametrize("to", ["tl-crosscoder", "sae-lens", "dictionary_learning"])
def test_a_place_that_is_taken_is_left_alone_and_named(call, out, to, tmp_path):
    code, error = call("convert", "good", out, "--to", to)
    assert code == 2, error
    assert out.split("/")[0] in error and "Errno" not in error
    assert (tmp_path / "file").read_text() == "words"
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["notes.md"]


@pytest.mark.parametrize("verb", VERBS)
def test_what_may_not_be_read_is_said_in_words(call, verb, monkeypatch):
    """A root user may read everything, so the system's refusal is raised here instead."""
    refused = PermissionError(13, "Permission denied", "locked")
    for place in ("hub.inspect.inspect", "hub.load.load", "hub.publish.publish"):
        monkeypatch.setattr(f"tl_crosscoder.{place}", lambda *_, **__: (_ for _ in ()).throw(refused))
    code, error = call(*VERBS[verb]("good"))
    assert code == 2
    assert "locked: you may not read or write it; change its permissions" in error and "Errno" not in error


def test_a_run_folder_stands_for_its_crosscoder(tmp_path):
    run = run_folder(tmp_path / "run")
    assert tlc.origin(tlc.load(run)).conventions.hook == "blocks.13.hook_resid_post"
    assert inspect(run).conventions.d_sae == 16
    shutil.rmtree(run / "crosscoder")
    with pytest.raises(UnreadableFormat, match=r"no \.safetensors"):
        tlc.load(run)


@pytest.mark.allow_hosts(["127.0.0.1", "::1"])
def test_a_repository_can_be_compared_as_a_folder_can(hub, call):
    hub.add("me/cc", {path.name: path.read_bytes() for path in Path("good").iterdir() if path.is_file()})
    code, error = call("compare", "me/cc", "good", "--draws", "1", "--quiet")
    assert code == 0, error
    code, error = call("compare", "me/nothing", "good")
    assert code == 4 and "there is no me/nothing, or it is private" in error
