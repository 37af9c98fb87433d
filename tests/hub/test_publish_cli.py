"""tl-crosscoder publish, as a user meets it."""

import json
import sys

import pytest

import tl_crosscoder as tlc
from tests.hub.published import run_folder
from tl_crosscoder import cli

pytestmark = [
    pytest.mark.allow_hosts(["127.0.0.1", "::1"]),
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),
]


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """(exit code, standard output, standard error) of `publish` on a finished run, with more arguments."""
    run = run_folder(tmp_path / "a run")

    def once(*more, run=run):
        monkeypatch.setattr(sys, "argv", ["tl-crosscoder", "publish", str(run), "me/cc", *more])
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code or 0
        out, err = capsys.readouterr()
        return code, out, err

    return once


def test_a_dry_run_shows_card_files_sizes_and_checks_and_sends_nothing(hub, call):
    code, out, err = call("--dry-run", "--license", "mit", "--report")
    assert code == 0, err
    assert "# A tiny pair" in out and "license: mit" in out
    assert "model.safetensors" in err and "kB" in err and "report/" in err and "2 files" in err
    assert "✓ nothing secret or local" in err and "nothing was sent; leave out --dry-run" in err
    assert hub.requests == []


def test_a_dry_run_that_would_be_refused_exits_with_1(hub, call):
    code, _, err = call("--dry-run")
    assert code == 1
    assert "✗ licence" in err and "it would be refused" in err
    assert hub.requests == []


def test_publishing_prints_where_it_is_and_how_to_load_it(hub, call):
    code, out, err = call(
        "--license", "mit", "--base-model", "me/base@v1", "--base-model", "me/tuned", "--language", "en"
    )
    assert code == 0, err
    sha = hub.repositories["me/cc"].head.sha
    assert f"published: {hub.url}/me/cc/tree/{sha}" in out
    assert f'tlc.from_pretrained("me/cc@{sha}")' in out
    assert tlc.from_pretrained(f"me/cc@{sha}").d_sae == 16
    assert hub.repositories["me/cc"].private
    assert b"- me/tuned" in hub.repositories["me/cc"].head.files["README.md"]


def test_json_is_one_object_on_standard_output(hub, call):
    code, out, _ = call("--license", "mit", "--json", "--public")
    assert code == 0
    done = json.loads(out[out.index("{") :])
    assert done["commit"] == hub.repositories["me/cc"].head.sha and done["private"] is False
    assert done["files"]["config.json"] > 0 and all(check["name"] for check in done["checks"])
    assert not hub.repositories["me/cc"].private


@pytest.mark.parametrize(
    ("fault", "exit_code", "words"),
    [
        (
            {"pattern": "repos/create", "status": 503, "times": 99},
            4,
            "HubUnreachable: publishing me/cc: the Hub answered 503",
        ),
        ({"pattern": "/commit/", "status": 412, "times": 99}, 4, "HubConflict: someone else changed me/cc"),
        ({"pattern": "/commit/", "status": 409, "times": 99}, 4, "HubConflict: someone else changed me/cc"),
        ({"pattern": "/commit/", "status": 403}, 4, "HubError: publishing me/cc: your token may not"),
    ],
)
def test_a_fault_is_one_clear_sentence_and_exit_code_4(hub, call, fault, exit_code, words):
    hub.fail(**fault)
    code, _, err = call("--license", "mit")
    assert (code, words in err) == (exit_code, True), err
    assert "Traceback" not in err
    assert set(hub.repositories.get("me/cc", hub.add("me/x", {})).head.files) <= {".gitattributes"}


@pytest.mark.usefixtures("hub")
def test_wrong_usage_exits_with_2(call, tmp_path):
    code, _, err = call("--license", "mit", run=tmp_path / "nothing")
    assert code == 2 and "nothing is not there; wanted a run folder" in err
    code, _, err = call("--license", "mit", "--base-model", "me/base")
    assert code == 2 and "base_model wants both models" in err
