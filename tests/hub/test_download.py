"""Downloading: one commit, every byte checked, from the network or the cache, and no path out of the folder."""

import json
import time
from pathlib import Path

import pytest
import torch

import tl_crosscoder as tlc
from tests.hub.published import EXTRA, small_crosscoder
from tl_crosscoder.errors import CorruptFile, HubError, HubUnreachable
from tl_crosscoder.hub.download import commit_of, download, list_files
from tl_crosscoder.hub.inspect import inspect
from tl_crosscoder.hub.manifest import MANIFEST, read_manifest, verify, write_manifest
from tl_crosscoder.hub.save import load
from tl_crosscoder.hub.source import Source, parse_source

pytestmark = pytest.mark.allow_hosts(["127.0.0.1", "::1"])


@pytest.fixture
def there(hub, tmp_path):
    """me/cc on the Hub: a crosscoder with its manifest at the root, and a second one in layer-7/, without."""
    root = tlc.save(small_crosscoder(), tmp_path / "root", extra=EXTRA)
    write_manifest(root)
    tlc.save(small_crosscoder(7), tmp_path / "seven")
    files = {path.name: path.read_bytes() for path in root.iterdir() if path.is_file()}
    files |= {f"layer-7/{p.name}": p.read_bytes() for p in (tmp_path / "seven").iterdir() if p.is_file()}
    return hub.add("me/cc", files | {"README.md": b"# card"})


def is_small(crosscoder, seed=0):
    return torch.equal(crosscoder.W_dec, small_crosscoder(seed).W_dec)


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("me/cc", Source("me/cc")),
        ("me/cc@v1.0", Source("me/cc", "v1.0")),
        ("me/cc:layer-7", Source("me/cc", None, "layer-7")),
        ("me/cc@refs/pr/1:a/b", Source("me/cc", "refs/pr/1", "a/b")),
        ("me/cc:blocks.14.hook_resid_pre", Source("me/cc", None, "blocks.14.hook_resid_pre")),
        ("hf://me/cc@v1/a/b", Source("me/cc", "v1", "a/b")),
        ("hf://me/cc@refs/pr/1/a", Source("me/cc", "refs/pr/1", "a")),
        ("./me/cc", Path("me/cc")),
        ("/me/cc", Path("/me/cc")),
        ("cc", Path("cc")),
        ("a/b/c", Path("a/b/c")),
        (Path("me/cc"), Path("me/cc")),
    ],
)
def test_a_source_is_read_from_its_text(text, meant):
    assert parse_source(text) == meant
    if isinstance(meant, Source) and not str(text).startswith("hf:"):
        assert str(meant) == text


def test_a_folder_that_exists_is_meant_before_a_repository_of_that_name(tmp_path, monkeypatch):
    (tmp_path / "me" / "cc").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert parse_source("me/cc") == Path("me/cc")
    assert parse_source("hf://me/cc") == Source("me/cc")


@pytest.mark.parametrize(
    "text",
    ["me/cc:../x", "me/cc:/etc", "me/cc:a//b", "me/cc:C:\\x", "me/cc:a\x00b", "me/cc@../../x", "hf://me"],
)
def test_a_source_that_climbs_is_refused(text):
    with pytest.raises(ValueError, match=r"not a plain path|no branch, tag or commit|is not hf://"):
        parse_source(text)


def test_every_file_is_of_one_commit_that_the_folder_names(there):
    folder = download("me/cc")
    assert commit_of(folder) == there.head.sha
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "manifest.json",
        "model.safetensors",
    ]
    assert is_small(load(folder))
    assert commit_of(Path("/somewhere/else")) is None


def test_branches_tags_commits_and_subfolders_are_found(there):
    first = there.head
    there.refs["v1"] = first.sha
    there.commit(first.files | {"config.json": b"{}"}, "second", "me")
    for revision in ("v1", first.sha):
        assert commit_of(download(f"me/cc@{revision}")) == first.sha
    folder = download("me/cc@v1:layer-7")
    assert folder.name == "layer-7" and is_small(load(folder), seed=7)
    assert tlc.from_pretrained("me/cc", revision="v1", subfolder="layer-7").d_sae == 16


def test_a_commit_made_meanwhile_is_not_mixed_in(hub, there):
    def overtake():
        there.commit({path: b"later" for path in there.head.files}, "second", "me")

    first = there.head.sha
    hub.fail("HEAD .*model.safetensors", "first", action=overtake)
    assert commit_of(folder := download("me/cc")) == first
    assert is_small(load(folder))


def test_a_flipped_byte_is_noticed_and_fetched_again(hub, there):
    assert "model.safetensors" in there.head.files
    hub.fail("GET /large/.*model.safetensors", "flip")
    assert is_small(tlc.from_pretrained("me/cc"))
    assert hub.asked("GET /large/.*model.safetensors") == 2


@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "config.json", "manifest.json", "layer-7/model.safetensors", "layer-7/config.json"],
)
def test_a_byte_that_stays_flipped_is_refused_and_not_kept(hub, there, name, tmp_path):
    """With and without a manifest; the client alone takes such files."""
    hub.fail(f"GET .*{name.rpartition('/')[2]}", "flip", times=99)
    source = "me/cc:layer-7" if "/" in name else "me/cc"
    with pytest.raises(CorruptFile, match=name.rpartition("/")[2]):
        download(source)
    hub.faults.clear()
    assert is_small(load(download(source)), seed=7 if "/" in name else 0)
    assert there and not list((tmp_path / "cache").rglob("*.incomplete"))


def test_a_cache_that_was_altered_is_mended(hub, there, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)
    folder = download("me/cc")
    blob = (folder / "model.safetensors").resolve()
    blob.write_bytes(blob.read_bytes()[:-1] + b"\xff")
    assert is_small(tlc.from_pretrained(f"me/cc@{there.head.sha}"))
    blob.write_bytes(b"x")
    hub.fail(".", status=503, times=999)
    with pytest.raises(
        HubUnreachable, match=r"1 bytes, where manifest.json lists .*it cannot be fetched again"
    ) as caught:
        tlc.from_pretrained(f"me/cc@{there.head.sha}")
    assert not blob.exists(), caught


@pytest.mark.parametrize("kind", ["cut", "reset"])
def test_a_body_that_breaks_off_is_fetched_to_its_end(hub, there, kind, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)
    hub.fail("GET /large/.*model.safetensors", kind)
    assert is_small(tlc.from_pretrained("me/cc"))
    assert there


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_hub_is_asked_again(hub, there, status, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)
    for request in ("GET /api/models", "HEAD .*config.json", "GET /large"):
        hub.fail(request, status=status)
    assert is_small(tlc.from_pretrained("me/cc"))
    assert there


def test_a_hub_that_is_down_says_so(hub, there, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)
    hub.fail(".", status=503, times=999)
    with pytest.raises(HubUnreachable, match=r"looking up me/cc.*answered 503 for \d+ s"):
        download("me/cc")
    hub.faults.clear()
    download("me/cc")
    hub.fail(".", status=503, times=999)
    assert is_small(tlc.from_pretrained("me/cc"))  # from the cache
    assert there


def test_a_private_or_missing_repository_is_told_with_what_to_do(hub, there, monkeypatch):
    there.private = True
    assert is_small(tlc.from_pretrained("me/cc"))
    monkeypatch.setenv("HF_TOKEN", hub.user("you"))
    with pytest.raises(
        HubError, match=r"looking up me/cc, which is no path here: there is no me/cc, or it is private"
    ):
        download("me/cc")
    with pytest.raises(HubError, match="there is no me/nothing, or it is private"):
        download("me/nothing")
    with pytest.raises(HubError, match="has no such branch, tag or commit"):
        monkeypatch.setenv("HF_TOKEN", next(iter(hub.users)))
        download("me/cc@v9")


def test_a_gated_repository_is_told_with_what_to_do(hub, there, monkeypatch):
    there.gated = True
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match="me/cc is gated; ask for access on its page, log in"):
        download("me/cc")
    assert hub.asked("resolve")


def test_the_token_goes_to_the_hub_and_not_to_its_store(hub, there):
    download("me/cc")
    sent = dict(zip(hub.requests, hub.tokens, strict=True))
    assert there and sent["GET /api/models/me/cc?blobs=true"]
    assert [token for request, token in sent.items() if "/large/" in request] == [""]


@pytest.mark.parametrize("how", ["offline", "dead"])
def test_without_a_connection_the_cache_answers(hub, there, monkeypatch, how):
    download("me/cc")
    before = len(hub.requests)
    if how == "offline":
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    else:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    for source in ("me/cc", f"me/cc@{there.head.sha}"):
        assert is_small(tlc.from_pretrained(source))
    assert len(hub.requests) == before
    with pytest.raises(HubUnreachable, match=r"looking up me/cc:layer-7, which is no path here"):
        download("me/cc:layer-7")


def test_offline_a_file_that_was_never_fetched_is_named(there, monkeypatch):
    download("me/cc", ["config.json"])
    assert there
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(HubUnreachable, match=r"fetching model.safetensors of me/cc: .*lacks a part of me/cc"):
        download("me/cc")


def test_a_commit_in_the_cache_is_not_asked_for_again(hub, there):
    download("me/cc")
    before = len(hub.requests)
    download(f"me/cc@{there.head.sha}")
    assert len(hub.requests) == before


def test_a_file_that_the_manifest_lists_and_the_repository_lacks_is_named(there):
    there.commit({p: data for p, data in there.head.files.items() if p != "model.safetensors"}, "lost", "me")
    with pytest.raises(CorruptFile, match=r"manifest.json lists 'model.safetensors', which .* does not hold"):
        download("me/cc")


def test_what_is_there_is_named_where_nothing_fits(there):
    assert set(list_files(Source("me/cc")).files) == set(there.head.files)
    with pytest.raises(
        HubError, match=r"holds nothing like \*\.pt, but README.md, config.json, layer-7/config.json"
    ):
        download("me/cc", ["*.pt"])
    with pytest.raises(HubError, match=r"me/cc:layer-8 holds no files there, but README.md"):
        download("me/cc:layer-8")


def test_stars_do_not_reach_into_folders(there):
    folder = download("me/cc", ["layer-7/*.json"])
    assert there and not (folder / "config.json").exists()
    assert (folder / "layer-7" / "config.json").is_file()


def test_a_manifest_of_someone_else_is_no_manifest(there):
    there.commit(there.head.files | {MANIFEST: b'{"name": "web app"}'}, "other", "me")
    assert is_small(tlc.from_pretrained("me/cc"))


ENTRY = {"size": 1, "sha256": "0" * 64}


@pytest.mark.parametrize(
    "content",
    [
        {"files": {"../../canary": ENTRY}},
        {"files": {"/etc/passwd": ENTRY}},
        {"files": {"C:/x": ENTRY}},
        {"files": {"a\\..\\b": ENTRY}},
        {"files": {"a\u0000": ENTRY}},
        {"files": {"a/../b": ENTRY}},
        {"files": {"": ENTRY}},
        {"files": {"a": {"size": -1, "sha256": "0" * 64}}},
        {"files": {"a": {"size": True, "sha256": "0" * 64}}},
        {"files": {"a": {"size": 1, "sha256": "x"}}},
        {"files": {"a": ENTRY | {"url": "http://x"}}},
        {"files": ["a"]},
        {"format_version": 2, "files": {}},
    ],
)
def test_a_hostile_manifest_is_refused_before_a_file_is_touched(there, content):
    text = json.dumps({"format": "tl_crosscoder manifest", "format_version": 1} | content)
    there.commit(there.head.files | {MANIFEST: text.encode()}, "hostile", "me")
    with pytest.raises(CorruptFile, match=MANIFEST):
        download("me/cc")


def test_the_manifest_of_a_folder_is_what_it_holds(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a").write_bytes(b"")
    (tmp_path / "sub" / "b c.txt").write_text("x")
    listed = read_manifest(write_manifest(tmp_path))
    # the well-known sha256 of nothing
    assert listed["a"].sha256 == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert {path: entry.size for path, entry in listed.items()} == {"a": 0, "sub/b c.txt": 1}
    verify(tmp_path)
    first = (tmp_path / MANIFEST).read_bytes()
    assert write_manifest(tmp_path).read_bytes() == first
    (tmp_path / "sub" / "b c.txt").write_text("y")
    with pytest.raises(CorruptFile, match=r"b c.txt: sha256 .* was altered"):
        verify(tmp_path)


def test_a_hub_that_stays_down_is_given_up_after_a_time_that_a_person_waits(hub, there, monkeypatch, caplog):
    """With a clock that only sleeping moves: 23 s in the client itself for one file, then our own waits."""
    clock = [0.0]
    monkeypatch.setattr("time.sleep", lambda seconds: clock.__setitem__(0, clock[0] + seconds))
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    monkeypatch.setattr("tl_crosscoder.hub.faults.WAITS", (1.0, 2.0, 4.0, 8.0))
    for request in ("GET /api/models", "HEAD .*/resolve/", "GET /large"):
        hub.faults.clear()
        hub.fail(request, status=503, times=999)
        clock[0] = 0.0
        with pytest.raises(HubUnreachable, match=r"answered 503 for \d\d s; try again later"):
            download("me/cc")
        assert clock[0] <= 60, request
        assert "the Hub answered 503; asking again in 1 s" in caplog.text
    assert there


@pytest.mark.parametrize("how", ["the listing", "the header of a file"])
def test_a_hub_that_takes_the_question_and_never_answers_is_given_up(hub, there, monkeypatch, how):
    for module in ("download", "outline", "push"):
        monkeypatch.setattr(f"tl_crosscoder.hub.{module}.TIMEOUT", 0.1)
    request = {"the listing": "GET /api/models", "the header of a file": "GET .*model.safetensors"}[how]
    hub.fail(request, "first", times=99, action=lambda: time.sleep(0.3))
    with pytest.raises(HubUnreachable, match=r"no answer from the Hub \(ReadTimeout\) in \d s"):
        inspect("me/cc")
    assert hub.asked(request) == 4  # WAITS has three
    assert there


@pytest.mark.parametrize("name", ["..\\canary.json", "C:canary.json", "a\x00.json", "\u202e.json"])
def test_a_name_in_the_listing_that_leads_elsewhere_is_refused_before_a_file_is_fetched(hub, name, tmp_path):
    hub.add("me/cc", {"config.json": b"{}", name: b"{}", "model.safetensors": b""})
    with pytest.raises(
        CorruptFile, match="is not a plain path below the repository's root; nothing was fetched"
    ):
        tlc.load("me/cc")
    assert hub.asked("/resolve/") == 0
    assert not list(tmp_path.rglob("*canary*"))


@pytest.mark.parametrize("name", ["../canary.json", "/canary.json", "a/../../canary.json"])
def test_a_name_in_the_listing_that_climbs_is_never_asked_for(hub, name, tmp_path):
    hub.add("me/cc", {"config.json": b"{}", name: b"{}", "model.safetensors": b""})
    with pytest.raises(CorruptFile):
        tlc.load("me/cc")
    assert hub.asked("canary") == 0
    assert not list(tmp_path.parent.rglob("*canary*"))
