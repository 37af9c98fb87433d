"""Training on several processes is training on one."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import on_processes
from safetensors.torch import load_file

from tests.models.fake_pair import FakePair, byte_tokenizer
from tl_crosscoder import cli
from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.dictionary.init import Init
from tl_crosscoder.dictionary.losses import L1, MSE, AuxK, L2Norm
from tl_crosscoder.dictionary.losses.delta import Delta
from tl_crosscoder.dictionary.losses.matryoshka import Matryoshka
from tl_crosscoder.dictionary.losses.pre_act import PreAct
from tl_crosscoder.dictionary.losses.tanh_penalty import TanhPenalty
from tl_crosscoder.dictionary.partition import Partition
from tl_crosscoder.dictionary.shard import Shard
from tl_crosscoder.dictionary.sparsity import BatchTopK, GroupMax, JumpReLU, ReLU, Split, Threshold, TopK
from tl_crosscoder.hub.save import load
from tl_crosscoder.models.capture import capture
from tl_crosscoder.models.corpus import Corpus
from tl_crosscoder.ranks import Alone
from tl_crosscoder.training import checkpoint as checkpoints
from tl_crosscoder.training.checkpoint import newest, read
from tl_crosscoder.training.config import TrainConfig
from tl_crosscoder.training.sharding import divide, joined, united
from tl_crosscoder.training.train import train

D_IN, D_SAE, BATCH = 12, 48, 32
APART = Init(same=False)


def batches(n=5):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(BATCH, 2, D_IN, generator=generator, dtype=torch.float64) for _ in range(n)]


def batch_topk():
    """A third of the latents cannot fire; AuxK soon calls them dead."""
    crosscoder = Crosscoder(D_IN, D_SAE, BatchTopK(2.5, k_max=4, k_anneal_steps=4))
    with torch.no_grad():
        crosscoder.b_enc[::3] = -0.5
        crosscoder.W_enc_rows[::3] *= 1e-2
    return crosscoder, [MSE(), AuxK(weight=0.25, k_aux=3, dead_after_tokens=2 * BATCH, relative=True)]


def delta():
    sparsity = Split(8, BatchTopK(1), BatchTopK(2.5))
    losses = [MSE(), Delta(0.5, shared=8), AuxK(dead_after_tokens=BATCH)]
    return Crosscoder(D_IN, D_SAE, sparsity, init=APART), losses


def l1():
    return Crosscoder(D_IN, D_SAE, ReLU(), code_norm="l2"), [
        L2Norm(),
        L1(0.1, shared=0.25, warmup_fraction=0.0),
    ]


def jumprelu():
    losses = [MSE(), TanhPenalty(0.1, shared=4), PreAct(0.01)]
    return Crosscoder(D_IN, D_SAE, JumpReLU(), code_norm="none", init=APART), losses


def parted():
    partition = Partition(shared=12, base=0.25, tuned=4)
    return Crosscoder(D_IN, D_SAE, BatchTopK(3), partition=partition, init=APART), [Matryoshka([8, 0.5, 1.0])]


def topk():
    return Crosscoder(D_IN, D_SAE, TopK(3), init=APART), [MSE(), AuxK(k_aux=3, dead_after_tokens=BATCH)]


def group_max():
    return Crosscoder(D_IN, D_SAE, Split(0.5, GroupMax(3), TopK(2)), code_norm="l2"), [MSE(), AuxK(k_aux=3)]


def decoupled():
    losses = [MSE(), AuxK(k_aux=3, dead_after_tokens=BATCH)]
    return Crosscoder(D_IN, D_SAE, BatchTopK(2.5), code_norm="decoupled", init=APART), losses


class Own:
    """A loss of a user's own, which may or may not sum over ranks."""

    name = "own"

    def __call__(self, *_):
        raise AssertionError("it was asked")


VARIANTS = {
    work.__name__: work for work in (batch_topk, delta, l1, jumprelu, parted, topk, group_max, decoupled)
}
MESHES = {"1 x 2": (2, 1), "2 x 1": (2, 2), "2 x 2": (4, 2)}


CONFIG = TrainConfig(steps=8, lr=1e-2, log_every=4, warmup_steps=2, progress=False, checkpoint_every=6)


def trained(variant, shard, **places):
    """The weights on the first rank, the rows of the log, and this rank's b_dec."""
    crosscoder, losses = VARIANTS[variant]()
    divide(crosscoder.double(), shard)
    rows = train(crosscoder, batches(), losses, CONFIG, **places).rows
    whole = united(crosscoder)
    state = {name: tensor.numpy() for name, tensor in whole.state_dict().items()} if whole else None
    return state, rows, crosscoder.b_dec.detach().numpy()


def all_trained(data):
    with joined(data) as shard:
        return {variant: trained(variant, shard) for variant in VARIANTS}


@pytest.fixture(scope="module")
def alone():
    return all_trained(1)


@pytest.fixture(scope="module", params=MESHES)
def ranks(request):
    size, data = MESHES[request.param]
    return on_processes(all_trained, size, data)


def assert_same(found, wanted):
    for name, tensor in wanted.items():
        np.testing.assert_allclose(found[name], tensor, rtol=0, atol=1e-9, err_msg=name)


def without_time(rows):
    return [{name: value for name, value in row.items() if name != "tokens_per_second"} for row in rows]


@pytest.mark.parametrize("variant", VARIANTS)
def test_processes_train_together_what_one_trains(variant, ranks, alone):
    whole, rows, _ = alone[variant]
    assert_same(ranks[0][variant][0], whole)
    for rank in ranks:
        _, theirs, b_dec = rank[variant]
        assert b_dec.tobytes() == ranks[0][variant][2].tobytes()
        for row, other in zip(without_time(rows), without_time(theirs), strict=True):
            assert other == pytest.approx(row, abs=1e-9)


def test_what_is_compared_has_dead_latents_at_work(alone):
    row = alone["batch_topk"][1][-1]
    assert row["auxk"] > 0
    assert 0 < row["dead_fraction"] < 1


def with_checkpoints(data, folder, resume):
    torch.manual_seed(0)  # a checkpoint has torch's random state
    with joined(data) as shard:
        return trained("batch_topk", shard, **{"resume" if resume else "checkpoints": folder})


@pytest.fixture(scope="module")
def saved_by_two(tmp_path_factory):
    """Checkpoints after steps 6, within a row of the log, and 8, by two processes that divide the latents."""
    folder = tmp_path_factory.mktemp("checkpoints") / "by two"
    on_processes(with_checkpoints, 2, 1, folder, False)
    return folder


def test_a_checkpoint_of_two_processes_is_that_of_one(saved_by_two, tmp_path):
    with_checkpoints(1, tmp_path / "by one", False)
    for step in ("step-00000006", "step-00000008"):
        one, two = read(tmp_path / "by one" / step), read(saved_by_two / step)
        assert one.training == two.training
        assert without_time(two.rows) == [pytest.approx(row, abs=1e-9) for row in without_time(one.rows)]
        assert_same_state(two.state, one.state)


def assert_same_state(found, wanted):
    assert list(found) == list(wanted)
    for name, value in wanted.items():
        if isinstance(value, dict):
            assert_same_state(found[name], value)
        elif isinstance(value, torch.Tensor):
            torch.testing.assert_close(found[name], value, rtol=0, atol=1e-9, msg=name)
        elif isinstance(value, float):
            assert name == "seconds" or found[name] == pytest.approx(value, abs=1e-9), name
        else:
            assert found[name] == value, name


def test_each_process_writes_the_latents_it_holds_and_no_others(saved_by_two):
    folder = saved_by_two / "step-00000008"
    files = [f"state-{i:05d}-of-00002.safetensors" for i in range(2)]
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint.json", *files]
    parts = [load_file(folder / file) for file in files]
    whole = read(folder).crosscoder().W_dec
    for index, part in enumerate(parts):
        assert torch.equal(part["crosscoder.W_dec"], whole[index::2])
    assert "crosscoder.b_dec" in parts[0]
    assert {name.rsplit(".", 1)[-1] for name in parts[1]} == {
        "W_dec", "W_enc_rows", "b_enc", "tokens_since_fired"
    }  # fmt: skip


@pytest.mark.parametrize("size", [2, 3, 4, 6, 8])
def test_every_rank_of_any_number_reads_its_own_latents(saved_by_two, size):
    folder = saved_by_two / "step-00000008"
    whole = read(folder).state
    for index in range(size):
        shard = Shard(latents=Alone(size, index))
        state = read(folder, shard).state
        for part in ("crosscoder", "optimizer"):
            for name, tensor in whole[part].items():
                assert torch.equal(state[part][name], shard.rows(name, tensor)), (size, index, name)


def test_a_part_that_is_damaged_or_gone_is_passed_over_by_all(saved_by_two, tmp_path, alone):
    for cut in (True, False):
        folder = tmp_path / str(cut)
        shutil.copytree(saved_by_two, folder)
        part = folder / "step-00000008" / "state-00001-of-00002.safetensors"
        part.write_bytes(part.read_bytes()[:-1]) if cut else part.unlink()
        state, _, _ = on_processes(with_checkpoints, 2, 1, folder, True)[0]
        assert_same(state, alone["batch_topk"][0])
        assert_same(newest(folder)[0].state["crosscoder"], {n: torch.tensor(a) for n, a in state.items()})


@pytest.mark.parametrize(("size", "data"), [(1, 1), (4, 1), (4, 2)])
def test_what_two_processes_saved_any_number_goes_on_with(saved_by_two, tmp_path, alone, size, data):
    shutil.copytree(saved_by_two / "step-00000006", tmp_path / "step-00000006")
    state, rows, _ = on_processes(with_checkpoints, size, data, tmp_path, True)[0]
    whole, all_rows, _ = alone["batch_topk"]
    assert_same(state, whole)
    assert without_time(rows) == [pytest.approx(row, abs=1e-9) for row in without_time(all_rows)]


def killed_in_a_save(folder, rank, call):
    """The rank is gone in its second save, of step 8: with half of its part written, or just before the folder takes its name."""
    calls, done = 0, getattr(checkpoints, call)

    def dying(*arguments, **options):
        nonlocal calls
        calls += 1
        if calls == 2 and os.environ.get("RANK") == rank:
            if call == "save_file":
                done(*arguments, **options)
                os.truncate(arguments[1], 1000)
            os.kill(os.getpid(), signal.SIGKILL)
        return done(*arguments, **options)

    setattr(checkpoints, call, dying)
    with_checkpoints(1, folder, False)


@pytest.mark.parametrize(("rank", "call"), [("0", "save_file"), ("1", "save_file"), ("0", "replaced_folder")])
def test_killed_in_a_save_the_checkpoint_before_is_gone_on_with(tmp_path, alone, rank, call):
    with pytest.raises(RuntimeError, match=f"rank {rank}: it died"):
        on_processes(killed_in_a_save, 2, tmp_path, rank, call)
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-00000006"]
    state, _, _ = on_processes(with_checkpoints, 2, 1, tmp_path, True)[0]
    assert_same(state, alone["batch_topk"][0])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000006", "step-00000008"]


def told_where_the_first_cannot_write(folder):
    with joined() as shard:
        try:
            trained("batch_topk", shard, checkpoints=folder)
        except (FileExistsError, RuntimeError) as error:
            return f"{type(error).__name__}: {error}"


def test_where_the_first_process_cannot_write_all_stop(saved_by_two, tmp_path):
    shutil.copytree(saved_by_two / "step-00000006", tmp_path / "step-00000006")
    first, second = on_processes(told_where_the_first_cannot_write, 2, tmp_path)
    assert "stopped at step-00000006" in first
    assert second == "RuntimeError: another process stopped; it says why"


class Interrupting(list):
    """Batches of which the third brings a SIGTERM to one rank."""

    def __iter__(self):
        for i, x in enumerate(super().__iter__()):
            if i == 2 and os.environ["RANK"] == "1":
                signal.raise_signal(signal.SIGTERM)
            yield x


def stopped(folder):
    with joined() as shard:
        crosscoder, losses = VARIANTS["delta"]()
        divide(crosscoder, shard)
        history = train(crosscoder, Interrupting(batches()), losses, CONFIG, checkpoints=folder)
        return history.stopped_by, history.rows[-1]["step"]


def test_a_signal_to_one_process_stops_all_after_the_same_step(tmp_path):
    assert on_processes(stopped, 2, tmp_path) == [(signal.SIGTERM, 3)] * 2
    assert newest(tmp_path)[0].step == 3


@pytest.mark.parametrize(("processes", "data"), [(2, 3), (3, 2), (2, 0)])
def test_processes_that_form_no_grid_are_refused(monkeypatch, processes, data):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    with (
        pytest.raises(ValueError, match=f"{processes} processes are no grid of data={data} rows"),
        joined(data),
    ):
        pass


def test_a_gpu_of_ones_own_is_wanted(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with (
        pytest.raises(ValueError, match=r"wants a GPU of its own: .* device='cuda:0' was asked for"),
        joined(1, "cuda:0"),
    ):
        pass


def test_latents_that_do_not_divide_evenly_are_refused_before_anything_changes():
    crosscoder, _ = batch_topk()
    with pytest.raises(ValueError, match="the first 48 latents cannot be divided evenly among 5 ranks"):
        divide(crosscoder, Shard(latents=Alone(5), every=Alone(5)))
    assert crosscoder.W_dec.shape == (D_SAE, 2, D_IN)


@pytest.mark.parametrize(
    ("sparsity", "losses", "named"),
    [
        (Threshold(), [MSE()], "Threshold"),
        (Split(8, BatchTopK(1), Threshold()), [MSE()], "Threshold"),
        (ReLU(), [Own()], "Own"),
    ],
)
def test_what_is_not_trained_together_is_refused(sparsity, losses, named):
    crosscoder = Crosscoder(D_IN, D_SAE, sparsity)
    crosscoder.shard = Shard(every=Alone(2))
    with pytest.raises(ValueError, match=f"{named} is trained by one process only; by several: "):
        train(crosscoder, batches(), losses, CONFIG)


def commanded(*arguments):
    """The exit code of a command of the command line."""
    sys.argv = ["tl-crosscoder", *arguments]
    try:
        cli.main()
    except SystemExit as end:
        return end.code or 0
    return 0


@pytest.fixture(scope="module")
def acts(tmp_path_factory):
    pair, folder = FakePair(byte_tokenizer(), d_in=8), tmp_path_factory.mktemp("acts")
    texts = [f"document {i} says something about the number {i * 7}" for i in range(60)]
    capture(pair, Corpus.from_texts(texts, pair.tokenizer), folder, progress=False)
    return folder


def arguments(acts, out):
    named = {"--out": out, "--d-sae": 32, "--k": 3, "--steps": 12, "--batch-size": 64}
    return ["train", str(acts), *(str(text) for pair in named.items() for text in pair), "--json"]


def assert_commands_agree(one, two):
    """Single precision: rounding grows with the steps."""
    one, two = load(one / "crosscoder"), load(two / "crosscoder")
    assert one.config == two.config
    for name, tensor in one.state_dict().items():
        torch.testing.assert_close(two.state_dict()[name], tensor, rtol=0, atol=2e-3, msg=name)


def test_the_command_line_trains_on_processes_what_it_trains_on_one(acts, tmp_path):
    assert commanded(*arguments(acts, tmp_path / "one" / "crosscoder")) == 0
    command = [*arguments(acts, tmp_path / "two" / "crosscoder"), "--data-ranks", "2"]
    assert on_processes(commanded, 2, *command) == [0, 0]
    assert_commands_agree(tmp_path / "one", tmp_path / "two")
    log = (tmp_path / "two" / "train.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in log] == list(range(1, 13))


def test_sizes_that_do_not_divide_are_refused_by_the_command_line(acts, tmp_path):
    command = [*arguments(acts, tmp_path / "crosscoder"), "--d-sae", "33"]
    assert on_processes(commanded, 2, *command) == [cli.app.USAGE] * 2
    assert not (tmp_path / "crosscoder").exists()


@pytest.mark.slow
def test_torchrun_starts_it(acts, tmp_path):
    commanded(*arguments(acts, tmp_path / "one" / "crosscoder"))
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "tl_crosscoder"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [*start, *arguments(acts, tmp_path / "two" / "crosscoder")]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["step"] == 12  # said once
    assert_commands_agree(tmp_path / "one", tmp_path / "two")
