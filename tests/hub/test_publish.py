"""Publishing to a Hub that is really there, on loopback, and loading what was published."""

import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

import tl_crosscoder as tlc
from tests.hub.published import EXTRA, FIGURES, METRICS, run_folder, small_crosscoder, small_table
from tl_crosscoder.errors import HubConflict, HubError, HubUnreachable
from tl_crosscoder.hub.download import commit_of, download
from tl_crosscoder.hub.manifest import read_manifest, verify
from tl_crosscoder.hub.save import read_config

pytestmark = [
    pytest.mark.allow_hosts(["127.0.0.1", "::1"]),
    pytest.mark.filterwarnings(
        "ignore:Use 'content=:DeprecationWarning"
    ),  # the client's own, when it uploads
]


def published(**more):
    settings = {"license": "mit", "extra": EXTRA, "table": small_table(), "metrics": METRICS} | more
    return tlc.publish(settings.pop("what", None) or small_crosscoder(), "me/cc", **settings)


def on_the_hub(hub, name="me/cc"):
    return {
        path: data for path, data in hub.repositories[name].head.files.items() if path != ".gitattributes"
    }


def test_one_commit_holds_everything_and_loads_bit_equal(hub, tmp_path):
    done = tlc.publish(run_folder(tmp_path / "run"), "me/cc", license="mit", report=True)
    repository = hub.repositories["me/cc"]
    assert len(repository.commits) == 2  # the Hub's own first one, and ours
    assert done.commit == repository.head.sha
    files = on_the_hub(hub)
    assert set(files) == {
        "README.md", "config.json", "model.safetensors", "latents.parquet", "manifest.json",
        "sae_lens/cfg.json", "sae_lens/sae_weights.safetensors", "report/index.html", "report/latents/0.html",
    }  # fmt: skip
    assert done.files == {path: len(data) for path, data in files.items()}
    loaded, ours = tlc.from_pretrained("me/cc"), small_crosscoder()
    assert loaded.config == ours.config
    for name, tensor in ours.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    folder = download("me/cc", ["*.json", "*.parquet"])
    assert commit_of(folder) == done.commit
    assert read_config(folder)["extra"] == EXTRA | {"metrics": FIGURES}
    table = pd.read_parquet(folder / "latents.parquet")
    pd.testing.assert_frame_equal(table, small_table())
    assert table.attrs["metrics"] == FIGURES


def test_what_is_saved_locally_is_what_is_published(hub, tmp_path):
    published()
    local = tlc.save(small_crosscoder(), tmp_path / "local", extra=EXTRA | {"metrics": FIGURES})
    for name in ("config.json", "model.safetensors"):
        assert on_the_hub(hub)[name] == (local / name).read_bytes()


def test_the_manifest_lists_every_file_with_its_sha256(hub, tmp_path):
    published()
    for path, data in on_the_hub(hub).items():
        (tmp_path / "all" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "all" / path).write_bytes(data)
    verify(tmp_path / "all")
    assert set(read_manifest(tmp_path / "all" / "manifest.json")) == set(on_the_hub(hub)) - {"manifest.json"}


def test_a_dry_run_sends_nothing_and_tells_everything(hub):
    would = published(dry_run=True, license=None)
    assert hub.requests == []
    assert would.commit is None and would.url is None
    assert [check.name for check in would.refused] == ["licence"]
    done = published()
    assert would.files.keys() == done.files.keys()
    assert would.files["model.safetensors"] == done.files["model.safetensors"]


def test_without_a_licence_nothing_is_sent(hub):
    with pytest.raises(ValueError, match=r"licence: None is none; give one, such as license='apache-2.0'"):
        published(license=None)
    assert hub.requests == []


def test_nan_weights_are_never_sent(hub):
    bad = small_crosscoder()
    with torch.no_grad():
        bad.W_dec[0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="W_dec holds NaN or Inf"):
        published(what=bad)
    assert hub.requests == []


def test_it_is_private_unless_asked_otherwise(hub):
    published()
    assert hub.repositories["me/cc"].private
    with pytest.raises(
        HubError, match=r"me/cc exists and is private, and you asked for public.*Nothing was published"
    ):
        published(private=False, what=small_crosscoder(1))
    assert len(hub.repositories["me/cc"].commits) == 2


def test_a_public_repository_does_not_take_what_should_be_private(hub):
    hub.add("me/cc", {".gitattributes": b""})
    with pytest.raises(HubError, match="exists and is public, and you asked for private"):
        published()
    assert set(hub.repositories["me/cc"].head.files) == {".gitattributes"}


def test_publishing_the_same_again_makes_no_commit(hub):
    first = published()
    assert published().commit == first.commit
    assert len(hub.repositories["me/cc"].commits) == 2
    assert hub.asked("POST .*/commit/") == 1


def test_publishing_again_replaces_the_whole_and_keeps_files_of_others(hub, tmp_path):
    run = run_folder(tmp_path / "run")
    first = tlc.publish(run, "me/cc", license="mit", report=True)
    repository = hub.repositories["me/cc"]
    repository.commit(repository.head.files | {"notes.md": b"mine"}, "by hand", "me")
    second = tlc.publish(small_crosscoder(1), "me/cc", license="mit")
    files = on_the_hub(hub)
    assert not [path for path in files if path.startswith("report/")] and "latents.parquet" not in files
    assert files["notes.md"] == b"mine"
    # a commit is for ever: the first publication is still there under its own name
    assert torch.equal(tlc.from_pretrained("me/cc", revision=first.commit).W_dec, small_crosscoder(0).W_dec)
    assert torch.equal(tlc.from_pretrained(f"me/cc@{second.commit}").W_dec, small_crosscoder(1).W_dec)


def test_a_repository_with_something_else_in_it_is_not_written_over(hub):
    hub.add("me/cc", {"model.safetensors": b"years of work"}, private=True)
    with pytest.raises(
        HubError, match=r"holds 'model.safetensors', which was not published from here; choose another"
    ):
        published()
    assert hub.repositories["me/cc"].head.files == {"model.safetensors": b"years of work"}


def test_a_readme_that_the_hub_made_is_in_nobodys_way(hub):
    hub.add("me/cc", {"README.md": b"---\nlicense: mit\n---\n"}, private=True)
    published()
    assert b"# A tiny pair" in on_the_hub(hub)["README.md"]


def test_of_two_who_publish_at_once_one_is_told_and_nothing_is_mixed(hub):
    published(what=small_crosscoder(0))

    def overtake():
        theirs["done"] = published(what=small_crosscoder(1))

    theirs = {}
    hub.fail("POST /api/models/me/cc/commit/", "first", action=overtake)
    with pytest.raises(
        HubConflict, match=r"someone else changed me/cc while this was being published; it is now at"
    ) as caught:
        published(what=small_crosscoder(2))
    assert theirs["done"].commit[:8] in str(caught.value)
    assert len(hub.repositories["me/cc"].commits) == 3
    assert torch.equal(tlc.from_pretrained("me/cc").W_dec, small_crosscoder(1).W_dec)
    published(what=small_crosscoder(2))
    assert torch.equal(tlc.from_pretrained("me/cc").W_dec, small_crosscoder(2).W_dec)


STEPS = ["POST /api/repos/create", "GET /api/models/me/cc", "preupload", "batch", "PUT /large", "/commit/"]


@pytest.mark.parametrize(("step", "status"), list(zip(STEPS, [429, 500, 502, 503, 504, 429], strict=True)))
def test_a_busy_hub_is_asked_again(hub, step, status):
    hub.fail(step, status=status, headers={"Retry-After": "0"})
    done = published()
    assert done.commit == hub.repositories["me/cc"].head.sha
    assert len(hub.repositories["me/cc"].commits) == 2


@pytest.mark.parametrize("step", STEPS)
def test_what_was_done_and_not_answered_is_not_done_twice(hub, step):
    hub.fail(step, "lost")
    done = published()
    assert [commit.sha for commit in hub.repositories["me/cc"].commits][1:] == [done.commit]
    assert len(hub.repositories) == 1


@pytest.mark.parametrize(
    ("status", "words"),
    [(503, r"answered 503 for \d+ s; try again later"), (429, "no more requests for now")],
)
def test_a_hub_that_stays_busy_is_given_up_and_nothing_is_half_there(hub, status, words):
    hub.fail("POST .*/commit/", status=status, times=99)
    with pytest.raises(HubError, match=f"publishing me/cc: .*{words}"):
        published()
    assert hub.asked("POST .*/commit/") == 4  # WAITS has three
    assert set(hub.repositories["me/cc"].head.files) == {".gitattributes"}
    hub.faults.clear()
    published()  # the same command goes on from there


def test_a_hub_that_asks_for_an_hour_is_not_waited_for(hub):
    hub.fail("POST /api/repos/create", status=429, times=9, headers={"Retry-After": "3600"})
    with pytest.raises(HubError, match="try again in 3600 s"):
        published()
    assert hub.asked("POST /api/repos/create") == 1


def test_a_wrong_token_asks_for_a_login(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 34)
    with pytest.raises(HubError, match=r"does not accept the token; log in with `hf auth login`"):
        published()
    assert hub.repositories == {}


def test_somebody_elses_name_is_refused(hub):
    with pytest.raises(
        HubError, match=r"your token may not do this to you/cc; give it the permission to write"
    ):
        tlc.publish(small_crosscoder(), "you/cc", license="mit")
    assert hub.repositories == {}


@pytest.mark.usefixtures("hub")
def test_no_connection_says_so(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubUnreachable, match="publishing me/cc: no answer from the Hub"):
        published()


def test_offline_mode_is_honoured(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(HubUnreachable, match="HF_HUB_OFFLINE is set, and this needs the Hub"):
        published()
    assert hub.requests == []


@pytest.mark.parametrize("name", ["cc", "me/cc/x", "me/../cc", "me/a--b", "https://x/y", "me/ cc", ""])
def test_a_name_that_no_repository_has_is_refused_before_work(hub, name):
    with pytest.raises(ValueError, match="is not the name of a repository, owner/name"):
        tlc.publish(small_crosscoder(), name, license="mit")
    assert hub.requests == []


def test_a_folder_that_is_no_run_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="is empty; wanted a run folder, with crosscoder/ in it"):
        tlc.publish(tmp_path, "me/cc", dry_run=True)
    with pytest.raises(FileNotFoundError, match="no report at"):
        tlc.publish(run_folder(tmp_path / "run", report=False), "me/cc", report=True, dry_run=True)


def test_figures_of_another_table_are_left_out(tmp_path):
    run = run_folder(tmp_path / "run")
    assert "Undoing 1 of 16" in tlc.publish(run, "me/cc", dry_run=True).card
    small_table().iloc[::-1].to_parquet(run / "latents.parquet")
    assert "Undoing 1 of 16" not in tlc.publish(run, "me/cc", dry_run=True).card


@pytest.mark.usefixtures("hub")
def test_what_sae_lens_cannot_express_is_published_without_its_folder():
    one = tlc.Crosscoder(6, 8, tlc.GroupMax(2)).eval()
    done = tlc.publish(one, "me/cc", license="mit")
    [check] = [check for check in done.checks if check.name == "SAE-Lens"]
    assert not check.passed and "left out" in check.text
    assert not [path for path in done.files if path.startswith("sae_lens")]
    assert "SAE-Lens" not in done.card


def test_push_to_hub_and_from_pretrained_are_inverses(hub):
    url = tlc.push_to_hub(small_crosscoder(), "me/cc", license="mit")
    assert url == f"{hub.url}/me/cc/tree/{hub.repositories['me/cc'].head.sha}"
    assert torch.equal(tlc.from_pretrained("me/cc").W_enc, small_crosscoder().W_enc)


def test_another_process_loads_it_and_then_again_offline(hub, tmp_path):
    """The client as it comes, told where its Hub is by the environment alone."""
    published()
    code = (
        "import torch, tl_crosscoder as tlc\n"
        "cc = tlc.from_pretrained('me/cc')\n"
        "print(float(cc.decode(cc.encode(torch.ones(3, 2, 6))).detach().sum()))"
    )
    ours = small_crosscoder()
    expected = float(ours.decode(ours.encode(torch.ones(3, 2, 6))).detach().sum())
    [token] = hub.users
    online = {"HF_ENDPOINT": hub.url, "HF_TOKEN": token}
    for settings in (online, {"HF_HUB_OFFLINE": "1"}):
        environment = {
            "PATH": "/usr/bin:/bin",
            "HF_HOME": str(tmp_path / "home"),
            "OMP_NUM_THREADS": "1",
            **settings,
        }
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert float(done.stdout) == pytest.approx(expected)
    assert hub.asked("GET /large") == 1


def test_nothing_is_asked_of_the_hub_by_work_on_this_machine(hub, tmp_path):
    folder = tlc.save(small_crosscoder(), tmp_path / "cc")
    tlc.from_pretrained(folder)
    tlc.publish(run_folder(tmp_path / "run"), "me/cc", dry_run=True)
    assert hub.requests == []


def test_the_repositorys_first_file_to_be_read_is_the_one_that_downloads_are_counted_by(hub):
    published()
    hub.requests.clear()
    tlc.from_pretrained("me/cc")
    fetched = [request for request in hub.requests if "/resolve/" in request]
    assert json.dumps(fetched).count("/config.json") == 2  # HEAD and GET
    assert not [request for request in fetched if "sae_lens" in request or "report" in request]
    assert Path(fetched[0]).name == "manifest.json"
