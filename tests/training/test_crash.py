"""A step whose loss is not finite is kept, and can be taken again without the data or the code of the training."""

import getpass
import re
import socket
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from ranks import on_processes
from synthetic_runs import small_pair

from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.dictionary.losses import LOSSES, MSE, AuxK
from tl_crosscoder.dictionary.sparsity import BatchTopK
from tl_crosscoder.errors import NotSaved
from tl_crosscoder.training import keeper
from tl_crosscoder.training.checkpoint import newest
from tl_crosscoder.training.config import TrainConfig
from tl_crosscoder.training.crash import reproduce
from tl_crosscoder.training.sharding import divide, joined
from tl_crosscoder.training.train import train

PAIR = small_pair()
USED = [MSE(), AuxK(dead_after_tokens=200)]


@dataclass(frozen=True)
class Poison:
    """Random, and bad at one step: its value, or only its gradient."""

    step: int
    gradient: bool

    name = "poison"

    def __call__(self, x, out, crosscoder, progress):
        del x, out
        size = crosscoder.b_enc.square().sum()
        noise = size * 0 + torch.rand(())
        if progress.step < self.step:
            return noise
        return noise + (size - size.detach()).sqrt() if self.gradient else noise / 0


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    monkeypatch.setitem(LOSSES.classes, "poison", Poison)


def batches(n=5):
    return list(PAIR.batches(64, 0, n))


def crosscoder():
    return Crosscoder(PAIR.d_in, 48, BatchTopK(3, k_max=6, k_anneal_steps=7, threshold_start=0.1))


def config(**changes):
    settings = {"steps": 12, "lr": 1e-2, "warmup_steps": 2, "checkpoint_every": 4, "progress": False}
    return TrainConfig(**settings | changes)


def crashed(trained, losses, settings, folder=None):
    """The error of a training that fails."""
    with pytest.raises(FloatingPointError) as found:
        train(trained, batches(), losses, settings, checkpoints=folder)
    return str(found.value)


def without_place(error):
    return error.split("  ")[0]


@pytest.mark.parametrize("moments", ["as weights", "bfloat16"])
@pytest.mark.parametrize("gradient", [False, True])
def test_the_step_is_taken_again_to_the_same_error(tmp_path, gradient, moments):
    trained, losses = crosscoder(), [*USED, Poison(6, gradient)]
    error = crashed(trained, losses, config(moments=moments), tmp_path)
    folder = tmp_path / "crashed"
    assert f"of step 6 is not finite{'' if gradient else ' (mse='}" in error
    assert (
        f"The step is kept: tl_crosscoder.training.crash.reproduce({str(folder)!r}) takes it again." in error
    )
    assert newest(tmp_path)[0].step == 4

    crash = newest(folder)[0]
    assert (crash.step, crash.state["cursor"]["step"], crash.state["cursor"]["batch"]) == (6, 7, 2)
    assert torch.equal(crash.state["batch"], batches()[1])
    for name, tensor in crash.crosscoder().state_dict().items():
        assert torch.equal(tensor, trained.state_dict()[name]), name
    for _ in range(2):
        torch.manual_seed(1)
        with pytest.raises(FloatingPointError) as again:
            reproduce(folder)
        assert str(again.value) == without_place(error)
    with pytest.raises(FloatingPointError) as resumed:
        train(crosscoder(), [crash.state["batch"]], losses, config(moments=moments), resume=folder)
    assert without_place(str(resumed.value)) == without_place(error)


def test_weights_that_ran_away_never_reach_a_checkpoint_as_nan(tmp_path):
    """Adam's steps of 1e19 make squares that float32 cannot hold."""
    trained = crosscoder()
    error = crashed(trained, USED, config(lr=1e19, warmup_steps=0, checkpoint_every=1), tmp_path)
    assert re.match(r"the (loss|gradient) of step [12] is not finite", error)
    assert all(not tensor.isnan().any() for tensor in trained.state_dict().values())
    with pytest.raises(FloatingPointError, match=re.escape(without_place(error))):
        reproduce(tmp_path / "crashed")


def test_a_step_that_passes_now_says_its_losses(tmp_path, monkeypatch):
    crashed(crosscoder(), [*USED, Poison(6, False)], config(), tmp_path)
    monkeypatch.setattr(Poison, "__call__", lambda *_: torch.tensor(0.5))
    found = reproduce(tmp_path / "crashed")
    assert set(found) == {"mse", "auxk", "poison"}
    assert found["poison"] == 0.5 and 0 < found["mse"] < 100


def test_what_is_kept_names_neither_places_nor_people(tmp_path):
    crashed(crosscoder(), [*USED, Poison(6, False)], config(log_path=tmp_path / "log.jsonl"), tmp_path)
    kept = b"".join(path.read_bytes() for path in (tmp_path / "crashed").rglob("*") if path.is_file())
    for secret in (str(tmp_path), str(Path.home()), getpass.getuser(), socket.gethostname()):
        assert len(secret) < 4 or secret.encode() not in kept
    machine = newest(tmp_path / "crashed")[0].machine
    assert {"library", "torch", "device", "processes", "threads"} == set(machine)


def test_the_last_crash_is_kept_and_a_new_training_begins_without(tmp_path, monkeypatch):
    losses = [*USED, Poison(9, False)]
    crashed(crosscoder(), losses, config(), tmp_path)
    with pytest.raises(FloatingPointError):
        train(crosscoder(), batches(), losses, config(), resume=tmp_path)
    assert [path.name for path in (tmp_path / "crashed").iterdir()] == ["step-00000009"]
    monkeypatch.setattr(Poison, "__call__", lambda *_: torch.tensor(0.5))
    train(crosscoder(), batches(), losses, config(), resume=tmp_path)
    train(crosscoder(), batches(), USED, config(), checkpoints=tmp_path)
    assert not (tmp_path / "crashed").exists()


def test_where_nothing_can_be_kept_the_error_says_so(tmp_path, monkeypatch):
    losses = [*USED, Poison(6, False)]
    error = crashed(crosscoder(), losses, config())
    assert error.endswith("With checkpoints=a folder the step would have been kept, to be taken again.")
    write = keeper.write

    def full(checkpoint, directory, shard):
        if directory.name == "crashed":
            raise NotSaved("no room")
        return write(checkpoint, directory, shard)

    monkeypatch.setattr(keeper, "write", full)
    error = crashed(crosscoder(), losses, config(), tmp_path)
    assert error.startswith("the loss of step 6") and error.endswith("The step could not be kept: no room")


def on_a_rank(folder):
    with joined() as shard:
        trained = crosscoder()
        divide(trained, shard)
        return crashed(trained, USED, config(lr=1e19, warmup_steps=0), folder)


def test_a_step_of_two_processes_is_taken_again_by_one(tmp_path):
    first, second = on_processes(on_a_rank, 2, tmp_path)
    assert first == second
    with pytest.raises(FloatingPointError, match=without_place(first).split(" (")[0]):
        reproduce(tmp_path / "crashed")
