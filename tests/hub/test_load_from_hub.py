"""load() and inspect() of repositories, through the unmodified client against a Hub on loopback."""

import format_writers as writers
import pytest
import torch

from tl_crosscoder.errors import UnreadableFormat
from tl_crosscoder.hub.inspect import inspect
from tl_crosscoder.hub.load import load, origin

pytestmark = pytest.mark.allow_hosts(["127.0.0.1", "::1"])


def upload(hub, name, folder, under=""):
    return hub.add(
        name, {under + path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    )


@pytest.mark.parametrize(
    "make", [writers.dictionary_learning, writers.kissane, writers.antebe, writers.crosscode]
)
def test_a_repository_loads_as_its_folder_does(hub, tmp_path, make):
    written = make(tmp_path / "c")
    repository = upload(hub, "them/cc", written.path)
    found = load(f"them/cc@{repository.head.sha}", **written.given)
    there = load(written.path, **written.given)
    for name, tensor in there.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name
    assert origin(found).source == f"them/cc@{repository.head.sha}"
    assert not (written.path / "canary").exists()


def test_a_subfolder_is_named_where_there_is_one(hub, tmp_path):
    written = writers.kissane(tmp_path / "c")
    upload(hub, "them/cc", written.path, "blocks.14.hook_resid_pre/")
    with pytest.raises(UnreadableFormat, match=r"name one: them/cc:blocks\.14\.hook_resid_pre"):
        load("them/cc")
    assert load("them/cc:blocks.14.hook_resid_pre", scale=1).d_sae == writers.F


@pytest.mark.parametrize("make", [writers.papergrade, writers.kissane, writers.heterogeneous])
def test_a_repository_is_told_as_its_folder_is(hub, tmp_path, make):
    written = make(tmp_path / "c")
    upload(hub, "them/cc", written.path)
    assert inspect("them/cc").conventions == inspect(written.path).conventions


def test_inspecting_leaves_the_weights_where_they_are(hub, tmp_path):
    """Of a file with large tensors only the beginning and the small ones are copied: the rest is zeros, unread."""
    from tl_crosscoder.hub.outline import outlined
    from tl_crosscoder.hub.source import parse_source

    torch.manual_seed(0)
    big = {"encoder.weight": torch.randn(2, 64, 4096), "encoder.bias": torch.randn(4096)}
    big |= {"decoder.weight": torch.randn(2, 4096, 64), "decoder.bias": torch.randn(2, 64)}
    for name in ("model.safetensors", "model.pt"):
        folder = tmp_path / name
        writers.write(folder, name, big, {"activation_dim": 64, "dict_size": 4096})
        upload(hub, "them/big", folder)
        near = tmp_path / f"near-{name}"
        near.mkdir()
        outlined(parse_source("them/big"), near, token=None, cache=None)
        copied, whole = (near / name).read_bytes(), (folder / name).read_bytes()
        assert len(copied) == len(whole)
        assert copied.count(0) > 0.5 * len(whole)
        assert inspect("them/big").conventions == inspect(folder).conventions
