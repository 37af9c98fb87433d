"""Nothing secret and nothing local goes out with a publication."""

import getpass
import json
from pathlib import Path

import pandas as pd
import pyarrow.parquet
import pytest

import tl_crosscoder as tlc
from tests.hub.published import EXTRA, run_folder, small_crosscoder, small_table
from tl_crosscoder.hub.secrets import find_secrets

TOKEN = "hf_" + "aB3" * 11 + "x"  # of the shape of one, and nobody's
pytestmark = [
    pytest.mark.allow_hosts(["127.0.0.1", "::1"]),
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),
]

LOCAL = {
    "a Hugging Face token": f"say {TOKEN} twice",
    "an API key": "key=sk-" + "Ab1_" * 8,
    "a GitHub token": "ghp_" + "a1B2" * 9,
    "an AWS key": "AKIA" + "ABCD1234" * 2,
    "a private key": "-----BEGIN OPENSSH PRIVATE KEY-----",
    "the home folder": f"{Path.home()}/models/tuned",
}


@pytest.mark.parametrize("what", LOCAL)
def test_a_secret_in_the_config_stops_it_before_anything_is_sent(hub, what):
    with pytest.raises(ValueError, match=f"nothing secret or local: config.json: {what}") as caught:
        tlc.publish(small_crosscoder(), "me/cc", license="mit", extra=EXTRA | {"note": LOCAL[what]})
    assert hub.requests == []
    assert TOKEN not in str(caught.value)


@pytest.mark.parametrize("place", ["report", "table", "notes of the table", "verdict"])
def test_a_secret_is_found_wherever_it_stands(tmp_path, place):
    run = run_folder(tmp_path / "run")
    table = small_table()
    if place == "report":
        (run / "report" / "latents" / "0.html").write_text(f"<p>{TOKEN}</p>")
    if place == "table":
        table["label"] = [TOKEN] + ["moon"] * 15
    if place == "notes of the table":
        table.attrs["metrics"] = table.attrs["metrics"] | {"from": TOKEN}
    table.to_parquet(run / "latents.parquet")
    metrics = {"verdict": ["found", TOKEN]} if place == "verdict" else None
    would = tlc.publish(run, "me/cc", license="mit", report=True, dry_run=True, metrics=metrics)
    [check] = would.refused
    assert "a Hugging Face token, hf_aB3…" in check.text


@pytest.mark.parametrize(
    "columns",
    [
        {"x": [TOKEN]},
        {"x": pd.Categorical([TOKEN])},
        {"x": [[TOKEN]]},
        {"x": [{"said": TOKEN}]},
        {"x": [TOKEN.encode()]},
        {TOKEN: [1.0]},
    ],
    ids=["words", "categories", "lists", "mappings", "bytes", "the column's name"],
)
def test_a_secret_is_found_in_whatever_kind_of_column_it_stands(tmp_path, columns):
    table = pd.DataFrame(columns).assign(number=1.5)
    table.to_parquet(tmp_path / "t.parquet")
    parquet = pyarrow.parquet.read_table(tmp_path / "t.parquet").replace_schema_metadata()
    pyarrow.parquet.write_table(parquet, tmp_path / "t.parquet")  # the notes name the columns too
    assert find_secrets(tmp_path) == ["t.parquet: a Hugging Face token, hf_aB3…"]


def test_a_secret_is_found_in_the_name_of_a_file(tmp_path):
    (tmp_path / f"{TOKEN}.txt").write_text("nothing")
    assert find_secrets(tmp_path) == [f"{TOKEN}.txt: a Hugging Face token, hf_aB3…"]


def test_nothing_is_published_through_a_link(hub, tmp_path):
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "diary.txt").write_text("dear diary")
    for number, target in enumerate(("private", "private/diary.txt")):
        run = run_folder(tmp_path / f"run{number}")
        (run / "report" / "more").symlink_to(tmp_path / target)
        with pytest.raises(ValueError, match="more is a link"):
            tlc.publish(run, "me/cc", license="mit", report=True)
    assert hub.requests == []


def test_what_the_user_says_may_go_goes(hub):
    settings = {"license": "mit", "extra": {"note": TOKEN}}
    assert tlc.publish(small_crosscoder(), "me/cc", dry_run=True, **settings).refused
    assert tlc.publish(small_crosscoder(), "me/cc", allow=[TOKEN], **settings).commit
    assert hub.repositories["me/cc"]


def test_words_that_only_look_like_it_pass(tmp_path):
    for number, words in enumerate(
        [
            "hf_transfer",
            "/rooted/in",
            "sk-learn",
            f"x{Path.home()}",
            "the user of /usr/home",
            "AKIA",
            "a" * 40,
        ]
    ):
        (tmp_path / f"{number}.txt").write_text(words)
    assert find_secrets(tmp_path) == []


def test_a_path_of_this_user_is_found_in_any_spelling(tmp_path):
    user = getpass.getuser()
    for number, words in enumerate(
        [f"/home/{user}/x", json.dumps(f"C:\\Users\\{user}\\x"), f"file:///Users/{user}", str(Path.home())]
    ):
        (tmp_path / f"{number}.txt").write_text(words)
    assert {line.partition(":")[0] for line in find_secrets(tmp_path)} == {"0.txt", "1.txt", "2.txt", "3.txt"}


def test_the_token_in_use_is_in_nothing_that_was_published(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = tlc.publish(run_folder(tmp_path / "run"), "me/cc", license="mit", report=True)
    [token] = hub.users
    assert done.commit and len(done.files) > 6
    local = [token, str(Path.home()), str(tmp_path), f"/{getpass.getuser()}/"]
    for path, data in hub.repositories["me/cc"].head.files.items():
        assert not [words for words in local if words.encode() in data], path
