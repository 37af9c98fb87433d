"""A training that was stopped, killed or failed goes on as if nothing had happened: the same bytes at the end."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from synthetic_runs import small_pair
from torch.utils.data import DataLoader

from tests.models.fake_pair import FakePair, byte_tokenizer
from tl_crosscoder import cli
from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.dictionary.losses import (
    L1,
    LOSSES,
    MSE,
    AuxK,
    Delta,
    L2Norm,
    Matryoshka,
    PreAct,
    TanhPenalty,
)
from tl_crosscoder.dictionary.partition import Partition
from tl_crosscoder.dictionary.sparsity import BatchTopK, JumpReLU, ReLU, Split, TopK
from tl_crosscoder.errors import CrosscoderError, InUse, NonFiniteActs, NotSaved
from tl_crosscoder.models.capture import capture
from tl_crosscoder.models.corpus import Corpus
from tl_crosscoder.models.stream import stream
from tl_crosscoder.training import checkpoint
from tl_crosscoder.training.checkpoint import best, newest, taken
from tl_crosscoder.training.config import TrainConfig
from tl_crosscoder.training.train import train
from tl_crosscoder.training.window import Window

PAIR, STEPS = small_pair(), 12
ROOT = Path(__file__).parents[2]


def batches(n=5, size=64, seed=0):
    return list(PAIR.batches(size, seed, n))


def config(**changes):
    settings = {
        "steps": STEPS,
        "lr": 1e-2,
        "warmup_steps": 2,
        "log_every": 5,
        "checkpoint_every": 4,
        "progress": False,
    }
    return TrainConfig(**settings | changes)


def crosscoder(sparsity=None, **arguments):
    return Crosscoder(PAIR.d_in, 48, sparsity or BatchTopK(3, k_max=6, k_anneal_steps=7), **arguments)


LOSSES_USED = [MSE(), AuxK(dead_after_tokens=200)]


@contextmanager
def happening(step, what):
    """Something happens in that step, counted from 1 in each training."""
    add, calls = Window.add, 0

    def added(*arguments):
        nonlocal calls
        calls += 1
        if calls == step:
            what()
        add(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Window, "add", added)
        yield


def interrupt():
    signal.raise_signal(signal.SIGINT)


def die():
    raise RuntimeError("something died")


def stopped_at(step, folder, data=None, make=crosscoder, losses=None, **changes):
    """A folder of checkpoints whose newest is of that step, and the history up to there."""
    data, losses = batches() if data is None else data, LOSSES_USED if losses is None else losses
    with happening(step, interrupt):
        history = train(make(), data, losses, config(**changes), checkpoints=folder)
    assert history.interrupted and history.rows[-1]["step"] == newest(folder)[0].step == step
    return folder, history


def left_by(folder, history):
    """All that a finished training leaves, without its timings."""
    last = newest(folder)[0]
    state = (folder / f"step-{last.step:08d}" / "state.safetensors").read_bytes()
    rows = [
        {name: value for name, value in row.items() if name != "tokens_per_second"} for row in history.rows
    ]
    assert json.loads(json.dumps(last.rows)) == history.rows
    return state, rows


VARIANTS = {
    "batch_topk": (lambda: crosscoder(), LOSSES_USED),
    "crowded": (lambda: crosscoder(BatchTopK(6, k_max=7, k_anneal_steps=12)), LOSSES_USED),
    "topk in float64": (lambda: crosscoder(TopK(3)).double(), [L2Norm(), AuxK(dead_after_tokens=200)]),
    "relu": (lambda: crosscoder(ReLU()), [MSE(), L1(0.1)]),
    "jumprelu": (lambda: crosscoder(JumpReLU()), [MSE(), TanhPenalty(0.1), PreAct(0.1)]),
    "parts": (
        lambda: crosscoder(partition=Partition(shared=8, base=4, tuned=4)),
        [Matryoshka((16, 1.0)), Delta(0.5), AuxK(dead_after_tokens=200)],
    ),
    "three models": (lambda: Crosscoder(8, 24, BatchTopK(2), n_models=3), LOSSES_USED),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_stopped_after_any_step_it_goes_on_with_the_same_bytes(tmp_path, variant):
    make, losses = VARIANTS[variant]
    data = batches() if variant != "three models" else [torch.randn(64, 3, 8) for _ in range(5)]
    whole, log = tmp_path / "whole", tmp_path / "log.jsonl"
    expected = left_by(whole, train(make(), data, losses, config(), checkpoints=whole))
    for step in range(1, STEPS):
        folder, stopped = stopped_at(step, tmp_path / str(step), data, make, losses, log_path=log)
        assert (
            stopped.notes[-1]
            == f"stopped by SIGINT after step {step} of 12; resume={str(folder)!r} goes on from there"
        )
        other = make()
        with torch.no_grad():
            other.W_dec.zero_()
        torch.manual_seed(step)
        history = train(other, data, losses, config(log_path=log), resume=folder)
        assert f"going on after step {step} of 12" in history.notes
        assert left_by(folder, history) == expected, step
        assert [json.loads(line) for line in log.read_text().splitlines()] == history.rows
        assert not history.interrupted and not other.training


def whole(folder, data=None, make=crosscoder, losses=None, **changes):
    """What a training leaves that nothing stopped."""
    data, losses = batches() if data is None else data, LOSSES_USED if losses is None else losses
    return left_by(folder, train(make(), data, losses, config(**changes), checkpoints=folder))


def test_a_training_stopped_again_and_again_ends_the_same(tmp_path):
    folder, history = stopped_at(1, tmp_path / "b")
    while history.interrupted:
        with happening(3, interrupt):
            history = train(crosscoder(), batches(), LOSSES_USED, config(), resume=folder)
    assert history.notes[-1] == "going on after step 10 of 12"
    assert left_by(folder, history) == whole(tmp_path / "a")


def test_whatever_dies_nothing_is_lost(tmp_path):
    with happening(10, die), pytest.raises(RuntimeError, match="something died"):
        train(crosscoder(), batches(), LOSSES_USED, config(), checkpoints=tmp_path / "b")
    assert newest(tmp_path / "b")[0].step == 8
    history = train(crosscoder(), batches(), LOSSES_USED, config(), resume=tmp_path / "b")
    assert left_by(tmp_path / "b", history) == whole(tmp_path / "a")


def test_a_loader_that_shuffles_by_the_global_seed_gives_the_same_batches(tmp_path):
    loader = DataLoader(torch.cat(batches(3)), batch_size=48, shuffle=True)  # 4 an epoch
    torch.manual_seed(7)
    expected = whole(tmp_path / "a", loader)
    torch.manual_seed(7)
    folder, _ = stopped_at(6, tmp_path / "b", loader)
    torch.manual_seed(8)
    assert left_by(folder, train(crosscoder(), loader, LOSSES_USED, config(), resume=folder)) == expected


def store(folder=None, n=30):
    pair = FakePair(byte_tokenizer(), d_in=8)
    texts = [f"document {i} says something about the number {i * 7}" for i in range(n)]
    return capture(pair, Corpus.from_texts(texts, pair.tokenizer), folder, progress=False)


def small():
    return Crosscoder(8, 48, BatchTopK(3))


def test_a_store_goes_on_in_the_middle_of_an_epoch_and_at_its_end(tmp_path):
    kept = store()
    per_epoch = len(kept.shuffled(64, 3, buffer_rows=300))
    assert 12 < per_epoch < 24
    expected = whole(tmp_path / "a", kept.shuffled(64, 3, buffer_rows=300), small, steps=30)
    for step in (3, per_epoch - 1, per_epoch, per_epoch + 1):
        folder, _ = stopped_at(
            step, tmp_path / str(step), kept.shuffled(64, 3, buffer_rows=300), small, steps=30
        )
        data = kept.shuffled(64, 3, buffer_rows=300)
        history = train(small(), data, LOSSES_USED, config(steps=30), resume=folder)
        assert left_by(folder, history) == expected, step
    with pytest.raises(ValueError, match="seed = 3; these have 4"):
        train(small(), kept.shuffled(64, 4, buffer_rows=300), LOSSES_USED, config(steps=30), resume=folder)


def test_a_stream_trains_what_its_store_trains_and_goes_on_like_it(tmp_path):
    pair = FakePair(byte_tokenizer(), d_in=8)
    texts = [f"document {i} says something about the number {i * 7}" for i in range(30)]
    corpus = Corpus.from_texts(texts, pair.tokenizer)

    def live():
        return stream(pair, corpus, batch_size=64, seed=3, buffer_tokens=300, max_tokens=256)

    kept = capture(pair, corpus, max_tokens=256, progress=False)
    whole(tmp_path / "store", kept.shuffled(64, 3, buffer_rows=300), small, steps=30)
    expected = whole(tmp_path / "stream", live(), small, steps=30)
    for step in (3, 17):
        folder, _ = stopped_at(step, tmp_path / str(step), live(), small, steps=30)
        history = train(small(), live(), LOSSES_USED, config(steps=30), resume=folder)
        assert left_by(folder, history) == expected, step
    assert all(map(torch.equal, weights_of(tmp_path / "store"), weights_of(tmp_path / "stream")))


def weights_of(folder):
    return newest(folder)[0].crosscoder().state_dict().values()


def test_the_randomness_of_a_loss_goes_on(tmp_path, monkeypatch):
    @dataclass(frozen=True)
    class Noise:
        name = "noise"

        def __call__(self, x, out, crosscoder, progress):
            del x, crosscoder, progress
            return (out.estimate * torch.randn_like(out.estimate)).mean()

    monkeypatch.setitem(LOSSES.classes, "noise", Noise)
    losses = [MSE(), Noise()]
    torch.manual_seed(0)
    expected = whole(tmp_path / "a", losses=losses)
    torch.manual_seed(0)
    folder, _ = stopped_at(7, tmp_path / "b", losses=losses)
    torch.manual_seed(5)
    assert left_by(folder, train(crosscoder(), batches(), losses, config(), resume=folder)) == expected


def test_other_data_are_refused_before_a_weight_changes(tmp_path):
    folder, _ = stopped_at(7, tmp_path / "a")  # batch 2 of epoch 2
    other, trained = batches(), crosscoder()
    other[1] = other[1] + 1
    with pytest.raises(
        ValueError, match="not the batches that the training read: batch 2 of epoch 2 differs"
    ):
        train(trained, other, LOSSES_USED, config(), resume=folder)
    with pytest.raises(ValueError, match="of another kind of batches"):
        train(trained, store().shuffled(64), LOSSES_USED, config(), resume=folder)
    assert torch.equal(trained.W_dec, crosscoder().W_dec)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"make": lambda: crosscoder(BatchTopK(4, k_max=6, k_anneal_steps=7))},
            "crosscoder.sparsity.k is 3 there, 4 asked",
        ),
        (
            {"make": lambda: Crosscoder(PAIR.d_in, 50, VARIANTS["batch_topk"][0]().sparsity)},
            "d_sae is 48 there, 50 asked for",
        ),
        (
            {"make": lambda: crosscoder(TopK(3))},
            r"sparsity.name is 'batch_topk' there, 'topk' asked.*k_max is 6 there, 'nothing'",
        ),
        (
            {"make": lambda: crosscoder().double()},
            "dtype is 'torch.float32' there, 'torch.float64' asked for",
        ),
        (
            {"losses": [MSE(), AuxK(dead_after_tokens=300)]},
            "losses.1.dead_after_tokens is 200 there, 300 asked for",
        ),
        ({"losses": [MSE()]}, "losses.1.name is 'auxk' there, 'nothing' asked for"),
        (
            {"lr": 2e-2, "steps": 13},
            "config.steps is 12 there, 13 asked for; config.lr is 0.01 there, 0.02 asked for",
        ),
    ],
)
def test_another_training_is_refused_with_both_values(tmp_path, changes, reason):
    folder, _ = stopped_at(2, tmp_path / "a")
    made = changes.pop("make", crosscoder)()
    losses = changes.pop("losses", LOSSES_USED)
    before = made.W_dec.detach().clone()
    with pytest.raises(ValueError, match=rf"holds checkpoints of another training: .*{reason}"):
        train(made, batches(), losses, config(**changes), resume=folder)
    assert torch.equal(made.W_dec, before)


def test_a_training_from_before_a_setting_was_there_goes_on_at_its_default(tmp_path):
    folder, _ = stopped_at(6, tmp_path / "b")
    path = folder / "step-00000006" / "checkpoint.json"
    about = json.loads(path.read_text())
    del about["digest"], about["training"]["config"]["moments"]
    path.write_text(json.dumps(about | {"digest": checkpoint._digest(about)}))
    with pytest.raises(ValueError, match=r"config.moments is 'as weights' there, 'bfloat16' asked for"):
        train(crosscoder(), batches(), LOSSES_USED, config(moments="bfloat16"), resume=folder)
    history = train(crosscoder(), batches(), LOSSES_USED, config(), resume=folder)
    assert left_by(folder, history) == whole(tmp_path / "a")


def test_where_it_reports_and_how_often_it_saves_may_change(tmp_path):
    folder, _ = stopped_at(6, tmp_path / "b")
    settings = config(log_path=tmp_path / "new.jsonl", checkpoint_every=1, keep_last=3)
    history = train(crosscoder(), batches(), LOSSES_USED, settings, resume=folder)
    assert left_by(folder, history) == whole(tmp_path / "a")
    assert {f"step-000000{n}" for n in (10, 11, 12)} <= {path.name for path in folder.iterdir()}


def test_checkpoints_may_go_to_another_folder(tmp_path):
    folder, _ = stopped_at(6, tmp_path / "b")
    history = train(crosscoder(), batches(), LOSSES_USED, config(), checkpoints=tmp_path / "c", resume=folder)
    assert left_by(tmp_path / "c", history) == whole(tmp_path / "a")
    assert newest(folder)[0].step == 6


class Unread:
    def __iter__(self):
        raise AssertionError("a batch was read")


def test_a_training_that_could_not_be_resumed_is_refused_before_any_work(tmp_path):
    folder = {"checkpoints": tmp_path / "a"}
    with pytest.raises(TypeError, match=r"a generator can be read only once.*or no folder for checkpoints"):
        train(crosscoder(), PAIR.batches(64), LOSSES_USED, config(), **folder)
    assert not (tmp_path / "a").exists()
    train(crosscoder(), PAIR.batches(64), LOSSES_USED, config())
    with pytest.raises(FileNotFoundError, match=r"no checkpoint in .*without resume"):
        train(crosscoder(), Unread(), LOSSES_USED, config(), resume=tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


def test_a_loss_that_cannot_be_described_is_refused_before_any_work(tmp_path):
    class Mine(MSE):
        name = "mine"

    with pytest.raises(KeyError, match="Mine is not a registered loss"):
        train(crosscoder(), Unread(), [Mine()], config(), checkpoints=tmp_path / "a")


def test_an_unfinished_training_is_not_written_over(tmp_path):
    folder, _ = stopped_at(6, tmp_path / "a")
    with pytest.raises(
        FileExistsError, match=r"stopped at step-00000006; go on with it \(resume='.*', --resume"
    ):
        train(crosscoder(), Unread(), LOSSES_USED, config(), checkpoints=folder)
    train(crosscoder(), batches(), LOSSES_USED, config(), resume=folder)
    train(crosscoder(), batches(), LOSSES_USED, config(steps=3, checkpoint_every=2), checkpoints=folder)
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000002", "step-00000003"]


def test_a_second_training_in_the_same_folder_is_refused_before_any_work(tmp_path):
    folder, _ = stopped_at(6, tmp_path / "a")
    other = crosscoder()
    before = other.W_dec.detach().clone()

    def second(**places):
        with pytest.raises(InUse, match=r"a is being written to by process \d+"):
            train(other, Unread(), LOSSES_USED, config(), **places)

    with taken(folder):
        second(checkpoints=folder)
        second(resume=folder)
    assert torch.equal(other.W_dec, before)
    history = train(crosscoder(), batches(), LOSSES_USED, config(), resume=folder)
    assert left_by(folder, history) == whole(tmp_path / "b")


def test_a_finished_training_is_finished_again_at_once(tmp_path):
    expected, trained = whole(tmp_path / "a"), crosscoder()
    history = train(trained, batches(), LOSSES_USED, config(), resume=tmp_path / "a")
    assert left_by(tmp_path / "a", history) == expected
    assert torch.equal(trained.W_dec, newest(tmp_path / "a")[0].crosscoder().W_dec)


def test_a_damaged_newest_checkpoint_is_said_and_the_one_before_is_used(tmp_path, capsys):
    folder, _ = stopped_at(6, tmp_path / "b")
    path = folder / "step-00000006" / "state.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    history = train(crosscoder(), batches(), LOSSES_USED, config(progress=True), resume=folder)
    assert left_by(folder, history) == whole(tmp_path / "a")
    said = capsys.readouterr().err
    for note in ("step-00000006 is damaged and was passed over", "going on after step 4 of 12"):
        assert note in said
        assert any(note in told for told in history.notes)


def test_another_number_of_threads_is_said(tmp_path):
    folder, _ = stopped_at(6, tmp_path / "a")
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        history = train(crosscoder(), batches(), LOSSES_USED, config(), resume=folder)
    finally:
        torch.set_num_threads(threads)
    assert any(f"threads {threads}; now" in note and "rounding may differ" in note for note in history.notes)


def test_bad_activations_lose_no_step_before_them(tmp_path):
    data = [*batches(9), torch.full((64, 2, PAIR.d_in), float("nan"))]
    with pytest.raises(NonFiniteActs, match="step 9") as found:
        train(crosscoder(), data, LOSSES_USED, config(), checkpoints=tmp_path / "a")
    assert found.value.__notes__ == [f"saved after step 9; resume={str(tmp_path / 'a')!r} goes on from there"]
    kept = newest(tmp_path / "a")[0]
    assert kept.step == 9
    assert all(parameter.isfinite().all() for parameter in kept.crosscoder().parameters())
    data[9] = batches(1, seed=5)[0]
    history = train(crosscoder(), data, LOSSES_USED, config(), resume=tmp_path / "a")
    assert left_by(tmp_path / "a", history) == whole(tmp_path / "b", data)


@pytest.mark.parametrize(
    ("k", "data", "reason"),
    [
        (
            2.5,
            DataLoader(torch.zeros(63, 2, PAIR.d_in), batch_size=63),
            "k=2.5 .* are 157.5 in a batch of 63 tokens",
        ),
        (2.5, DataLoader(torch.zeros(70, 2, PAIR.d_in), batch_size=64), "a smaller last batch; leave it out"),
    ],
)
def test_k_that_is_no_whole_number_in_every_batch_is_refused_before_any_work(tmp_path, k, data, reason):
    for sparsity in (BatchTopK(k), Split(8, BatchTopK(1), BatchTopK(k))):
        with pytest.raises(ValueError, match=reason):
            train(crosscoder(sparsity), data, LOSSES_USED, config(), checkpoints=tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_k_that_is_no_whole_number_in_a_batch_of_unknown_size_changes_no_weight():
    trained = crosscoder(BatchTopK(2.5))
    before = trained.W_dec.detach().clone()
    with pytest.raises(ValueError, match=r"are 157\.5 in a batch of 63 tokens, not a whole number"):
        train(trained, [batches()[0][:63]], LOSSES_USED, config())
    assert torch.equal(trained.W_dec, before)


def test_the_best_checkpoint_is_a_crosscoder_ready_for_use(tmp_path):
    """A last stretch of noise makes the loss rise: the best checkpoint is an earlier one."""
    data = [*batches(8), *(50 * x for x in batches(4, seed=9))]
    settings = config(log_every=1, checkpoint_every=1, keep_last=1, decay_fraction=0.0)
    history = train(crosscoder(), data, LOSSES_USED, settings, checkpoints=tmp_path)
    found = best(tmp_path)
    losses = {row["step"]: row["loss"] for row in history.rows if row["step"] >= STEPS / 2}
    assert found.step == min(losses, key=losses.get) < STEPS
    assert len(list(tmp_path.iterdir())) == 2
    assert found.crosscoder().encode(batches(1)[0]).any()


def test_how_often_the_data_are_read_is_said(capsys):
    note = "12 steps are 2.4 epochs of 5 batches"
    assert train(crosscoder(), batches(), LOSSES_USED, config(progress=True)).notes == [note]
    assert capsys.readouterr().err.startswith(note)
    assert train(crosscoder(), batches(12), LOSSES_USED, config()).notes == []


def run(monkeypatch, capsys, *arguments):
    """(exit code, standard error) of one `tl-crosscoder train`."""
    monkeypatch.setattr(sys, "argv", ["tl-crosscoder", "train", *map(str, arguments), "--quiet"])
    code = 0
    try:
        cli.main()
    except SystemExit as end:
        code = end.code or 0
    return code, capsys.readouterr().err


def test_the_command_line_goes_on_and_refuses_another_training(tmp_path, monkeypatch, capsys):
    store(tmp_path / "acts")
    arguments = (
        tmp_path / "acts",
        "--out",
        tmp_path / "crosscoder",
        "--d-sae",
        32,
        "--k",
        3,
        "--steps",
        20,
        "--batch-size",
        64,
    )
    with happening(7, interrupt):
        code, said = run(monkeypatch, capsys, *arguments, "--checkpoint-every", 5)
    assert code == 130 and "saved after step 7 of 20" in said and said.strip().endswith("--quiet --resume")
    code, said = run(monkeypatch, capsys, *arguments)
    assert code == 2 and "--resume" in said
    code, said = run(monkeypatch, capsys, *arguments, "--resume", "--lr", 0.5)
    assert code == 2 and "config.lr is 0.001 there, 0.5 asked for" in said
    assert not (tmp_path / "crosscoder").exists()
    code, said = run(monkeypatch, capsys, *arguments, "--resume")
    assert code == 0 and (tmp_path / "crosscoder").exists()
    with taken(tmp_path / "checkpoints"):
        code, said = run(monkeypatch, capsys, *arguments)
    assert code == 2 and "checkpoints is being written to by process" in said
    shutil.rmtree(tmp_path / "checkpoints")
    code, said = run(monkeypatch, capsys, *arguments, "--resume")
    assert code == 2 and "no checkpoint in" in said


def test_the_command_line_says_what_a_loss_that_is_not_finite_left(tmp_path, monkeypatch, capsys):
    store(tmp_path / "acts")
    arguments = (tmp_path / "acts", "--out", tmp_path / "crosscoder", "--d-sae", 32, "--k", 3, "--steps", 60)
    code, said = run(
        monkeypatch, capsys, *arguments, "--batch-size", 64, "--lr", 1e22, "--checkpoint-every", 2
    )
    folder = tmp_path / "checkpoints"
    assert code == 1 and "is not finite" in said
    assert f"tl_crosscoder.training.crash.reproduce({str(folder / 'crashed')!r}) takes it again" in said
    assert (folder / "crashed").exists() and not (tmp_path / "crosscoder").exists()


def test_a_full_disk_has_an_exit_code_of_its_own():
    assert cli.app.exit_code(NotSaved("full")) == 5
    assert cli.app.exit_code(CrosscoderError("other")) == 3


@pytest.fixture(scope="module")
def children():
    """Asks a process that has imported torch for forked children; see forked.py."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(Path(__file__).with_name("forked.py"))]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT
    ) as process:

        def ask(do, **request):
            request = {
                "do": do,
                **{name: str(v) if isinstance(v, Path) else v for name, v in request.items()},
            }
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            answer = json.loads(process.stdout.readline())
            assert "failed" not in answer, answer["failed"]
            return answer

        yield ask
        process.stdin.close()


@pytest.mark.parametrize(
    ("kind", "kills"),
    [
        ("store", 8),
        pytest.param("store", 150, marks=pytest.mark.slow),
        pytest.param("list", 50, marks=pytest.mark.slow),
    ],
)
def test_killed_at_random_moments_it_ends_with_the_same_bytes(children, tmp_path, kind, kills):
    told = children("killed", folder=tmp_path, kind=kind, kills=kills, seed=0)
    assert told["kills"] >= kills
    assert told["same"] == told["runs"]
    assert told["seconds"] < 60
    if kills > 100:
        assert told["in_save"] > 5


@pytest.mark.parametrize("stride", [9, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_between_any_two_system_calls_of_a_save_it_ends_with_the_same_bytes(
    children, tmp_path, stride
):
    told = children("failpoints", folder=tmp_path, kind="list", stride=stride)
    assert told["same"] == told["points"] > 60 // stride


def test_on_a_full_disk_the_checkpoint_before_stays_whole(children, tmp_path):
    told = children("full_disk", folder=tmp_path, kind="store")
    assert told["status"] == 0
    assert "step-00000009 could not be written" in told["error"] and "File too large" in told["error"]
    assert "bytes and more" in told["error"] and "are free" in told["error"]
    assert told["left"] == ["step-00000003", "step-00000006"]
    assert told["kept"] == [3, 6]
    assert told["same"]


def test_a_data_worker_that_dies_is_named_and_loses_no_step(children, tmp_path):
    told = children("dead_worker", folder=tmp_path)
    assert re.search(r"DataLoader worker \(pid\(s\) \d+\) exited unexpectedly", told["error"])
    assert 1 <= told["step"] <= 4  # it takes what it has read ahead with it
    assert told["note"].startswith(f"saved after step {told['step']}; resume=")
    assert told["same"]


def test_a_folder_one_may_not_write_to_is_refused_before_any_work(children, tmp_path):
    told = children("unwritable", folder=tmp_path)
    assert told["status"] == 0
    assert (
        told["error"].startswith("no checkpoint can be written to") and "Permission denied" in told["error"]
    )


@pytest.mark.parametrize(
    ("name", "code", "at_once"), [("SIGINT", 130, 130), ("SIGTERM", 143, -signal.SIGTERM)]
)
def test_one_signal_saves_and_two_stop_at_once(children, tmp_path, name, code, at_once):
    told = children("signals", folder=tmp_path, name=name)
    assert told["codes"] == [0, code, 0]
    assert told["seconds"] < 5
    assert not told["finished"]
    assert f"stopped by {name} after step" in told["said"] and told["again"] == "--resume"
    assert told["same"]
    assert "going on after step" in told["printed"]
    assert told["alive_after_one"]
    assert told["stopped_at_once"] == at_once
    assert told["seconds_for_two"] < 1
    assert told["newest"] == 40
