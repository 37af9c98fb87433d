import json
import math
import signal
import sys
import types

import pytest
import reference
import torch
from synthetic_runs import small_pair

from tl_crosscoder.dictionary.codes import Codes
from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.dictionary.init import Init
from tl_crosscoder.dictionary.losses import L1, MSE, AuxK
from tl_crosscoder.dictionary.partition import Partition
from tl_crosscoder.dictionary.sparsity import BatchTopK, ReLU, TopK
from tl_crosscoder.errors import EmptyData, NonFiniteActs, ShapeMismatch
from tl_crosscoder.training.config import TrainConfig
from tl_crosscoder.training.data import Feed, geometric_median
from tl_crosscoder.training.dead import FiringRecord
from tl_crosscoder.training.train import train

PAIR = small_pair()


def batches(n=4, size=64, seed=0):
    return list(PAIR.batches(size, seed, n))


def config(**changes):
    return TrainConfig(
        **{"steps": 12, "lr": 1e-2, "warmup_steps": 2, "log_every": 5, "progress": False, **changes}
    )


def crosscoder(sparsity=None, **arguments):
    return Crosscoder(PAIR.d_in, 48, sparsity or BatchTopK(3), **arguments)


def test_training_twice_gives_the_same_bytes():
    runs = []
    for _ in range(2):
        trained = crosscoder(BatchTopK(3, k_max=6, k_anneal_steps=5))
        history = train(trained, batches(), [MSE(), AuxK(dead_after_tokens=100)], config())
        runs.append((trained.state_dict(), [row["loss"] for row in history.rows]))
    assert runs[0][1] == runs[1][1]
    assert all(torch.equal(value, runs[1][0][name]) for name, value in runs[0][0].items())


def test_another_number_of_threads_changes_rounding_only():
    results, threads = [], torch.get_num_threads()
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            trained = crosscoder().double()
            train(trained, batches(4, 512), config=config())
            results.append(trained.W_dec.detach())
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(*results, rtol=0, atol=1e-6)


def test_one_step_is_one_clipped_adam_step():
    """Adam's first step moves every parameter by lr · g / (|g| + eps), whatever the clip; lr is half way up its warm-up of 2."""
    trained, plain, x = crosscoder(TopK(3)), crosscoder(TopK(3)), batches(1)[0]
    train(trained, [x], [MSE()], config(steps=1, decay_fraction=0.0, b_dec_init="zeros", clip=0.5))
    out = plain(x)
    ((out.target - out.estimate) ** 2).sum(dim=(1, 2)).mean().backward()
    norm = math.sqrt(sum(p.grad.square().sum().item() for p in plain.parameters()))
    for name, parameter in plain.named_parameters():
        g = parameter.grad * (0.5 / norm)
        expected = parameter.detach() - 0.5e-2 * g / (g.abs() + 1e-8)
        torch.testing.assert_close(
            dict(trained.named_parameters())[name].detach(), expected, rtol=1e-4, atol=1e-6
        )


def test_the_learning_rate_rises_stays_and_falls():
    # 10 steps, warm-up 2, decay .4: ½, 1, 1, 1, 1, 1, then 4/4, ¾, ½, ¼
    schedule = TrainConfig(steps=10, lr=8.0, warmup_steps=2, decay_fraction=0.4)
    assert [schedule.lr_at(s) for s in range(10)] == pytest.approx([4, 8, 8, 8, 8, 8, 8, 6, 4, 2])
    flat = TrainConfig(steps=3, lr=8.0, warmup_steps=0, decay_fraction=0.0)
    assert [flat.lr_at(s) for s in range(3)] == [8, 8, 8]


def test_the_log_holds_what_a_loop_over_the_window_finds():
    """lr so small that nothing moves: the second window is steps 5 to 9 of three batches read again and again."""
    data, trained = batches(3), crosscoder(TopK(3))
    history = train(
        trained, data, [MSE(), L1(0.1, warmup_fraction=0.0)], config(steps=10, lr=1e-30, b_dec_init="zeros")
    )
    window = torch.cat([data[step % 3] for step in range(5, 10)])
    out = trained(window)
    row = history.rows[1]
    x, recon = window.double().numpy(), out.recon.detach().double().numpy()
    acts, W_dec = out.acts.detach().double().numpy(), trained.W_dec.detach().double().numpy()
    assert (row["step"], row["tokens"], row["k"]) == (10, 640, 3)
    assert row["mse"] == pytest.approx(reference.mse(x, recon), rel=1e-4)
    assert row["l1"] == pytest.approx(0.1 * reference.l1(acts, W_dec, "sum"), rel=1e-4)
    assert row["loss"] == pytest.approx(row["mse"] + row["l1"])
    assert row["l0"] == pytest.approx((acts > 0).sum() / len(acts))
    assert row["fve_base"] == pytest.approx(reference.fraction_of_variance_explained(x, recon, 0), abs=1e-5)
    assert row["fve_tuned"] == pytest.approx(reference.fraction_of_variance_explained(x, recon, 1), abs=1e-5)


def test_pooled_fve_is_not_a_mean_of_batch_ratios():
    """A batch of spread 3 that is reconstructed badly and one of spread 1 that is reconstructed well."""
    small = torch.zeros(4, 2, 1)
    small[:, :, 0] = torch.tensor([0.0, 1.0, 0.0, 1.0])[:, None]
    large = -3 * small
    trained = Crosscoder(
        1, 1, ReLU(), init=Init(norm=0.5**0.5)
    )  # relu(2 · ½ x) · : x > 0 is perfect, x < 0 is lost
    history = train(
        trained,
        [small, large],
        [MSE()],
        TrainConfig(steps=2, lr=1e-30, log_every=2, progress=False, b_dec_init="zeros"),
    )
    x = torch.cat([small, large]).double().numpy()
    recon = trained(torch.cat([small, large])).recon.detach().double().numpy()
    assert history.rows[0]["fve_base"] == pytest.approx(
        reference.fraction_of_variance_explained(x, recon, 0), abs=1e-6
    )


def test_activations_that_do_not_vary_have_no_fve(tmp_path):
    data = [torch.ones(8, 2, PAIR.d_in)]
    history = train(crosscoder(TopK(3)), data, [MSE()], config(steps=1, log_path=tmp_path / "log.jsonl"))
    assert history.rows[0]["fve_base"] is None
    assert "NaN" not in (tmp_path / "log.jsonl").read_text()


def test_history_is_a_table_and_a_file(tmp_path):
    history = train(crosscoder(), batches(), config=config(log_path=tmp_path / "log.jsonl"))
    assert history.frame().index.tolist() == [5, 10, 12]
    history.save(tmp_path / "saved.jsonl")
    log, saved = ((tmp_path / name).read_text() for name in ("log.jsonl", "saved.jsonl"))
    assert log == saved
    assert [json.loads(line) for line in log.splitlines()] == history.rows
    assert {
        "loss",
        "mse",
        "auxk",
        "lr",
        "k",
        "l0",
        "fve_base",
        "fve_tuned",
        "dead_fraction",
        "tokens_per_second",
    } < set(history.rows[0])


def test_progress_is_plain_lines_where_there_is_no_terminal(capsys):
    train(crosscoder(), batches(), config=config(progress=True))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert [line.split("  ")[0] for line in captured.err.splitlines()] == [
        "12 steps are 3.0 epochs of 4 batches",
        "step 5/12",
        "step 10/12",
        "step 12/12",
    ]
    train(crosscoder(), batches(), config=config())
    assert capsys.readouterr().err == ""


def test_the_crosscoder_comes_back_ready_for_use():
    trained = crosscoder()
    train(trained, batches(), config=config())
    assert not trained.training
    assert trained.sparsity.threshold > 0


def test_batches_are_read_again_until_the_steps_are_done():
    data = batches(3)
    assert [id(x) for x in Feed(data, 7)] == [id(data[i % 3]) for i in range(7)]


def test_a_stream_that_ends_early_says_how_far_it_went():
    with pytest.raises(EmptyData, match=r"ended after 4 of 12 steps.*or steps=4"):
        train(crosscoder(), iter(batches(4)), config=config())
    with pytest.raises(EmptyData, match="ended after 0 of 12 steps"):
        train(crosscoder(), [], config=config())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_bad_activations_are_refused_with_their_place_before_the_weights_change(bad):
    trained, before = crosscoder(), crosscoder().state_dict()
    x = batches(1)[0]
    x[17, 1, 3] = bad
    with pytest.raises(NonFiniteActs, match="step 0: row 17, model 1"):
        train(trained, [x], config=config())
    assert all(torch.equal(value, before[name]) for name, value in trained.state_dict().items())


class Poison:
    """A loss that turns bad at one step: its value, or only its gradient."""

    name = "poison"

    def __init__(self, step, *, gradient):
        self.step, self.gradient = step, gradient

    def __call__(self, x, out, crosscoder, progress):
        del x
        if progress.step < self.step:
            return out.estimate.new_zeros(())
        size = crosscoder.b_enc.square().sum()
        return (size - size.detach()).sqrt() if self.gradient else size * float("nan")


@pytest.mark.parametrize(
    ("gradient", "reason"), [(False, "loss of step 3 .*poison=nan"), (True, "gradient of step 3")]
)
def test_a_bad_loss_or_gradient_stops_before_the_weights_change(gradient, reason):
    trained, same = crosscoder(TopK(3)), crosscoder(TopK(3))
    with pytest.raises(FloatingPointError, match=reason):
        train(
            trained,
            batches(),
            [MSE(), Poison(3, gradient=gradient)],
            config(warmup_steps=0, decay_fraction=0.0),
        )
    train(same, batches(), [MSE()], config(steps=3, warmup_steps=0, decay_fraction=0.0))
    assert all(torch.equal(value, same.state_dict()[name]) for name, value in trained.state_dict().items())


class Interrupting:
    """Batches during whose reading Ctrl-C is pressed, ``times`` times at batch ``at``."""

    def __init__(self, at, times=1):
        self.at, self.times = at, times

    def __iter__(self):
        for i, x in enumerate(batches(8)):
            if i == self.at:
                for _ in range(self.times):
                    signal.raise_signal(signal.SIGINT)
            yield x


def test_ctrl_c_finishes_the_step_and_returns_what_there_is():
    before = signal.getsignal(signal.SIGINT)
    trained, same = crosscoder(TopK(3)), crosscoder(TopK(3))
    history = train(trained, Interrupting(at=6), config=config(decay_fraction=0.0))
    assert history.interrupted
    assert [row["step"] for row in history.rows] == [5, 7]
    assert not trained.training
    assert signal.getsignal(signal.SIGINT) is before
    assert not train(same, batches(8), config=config(steps=7, decay_fraction=0.0)).interrupted
    assert all(torch.equal(value, same.state_dict()[name]) for name, value in trained.state_dict().items())


@pytest.fixture
def foreground():
    """Ctrl-C raises KeyboardInterrupt, as in a terminal; a job in the background is born deaf to it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("foreground")
def test_a_second_ctrl_c_interrupts_at_once():
    with pytest.raises(KeyboardInterrupt):
        train(crosscoder(), Interrupting(at=2, times=2), config=config())
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_tokens_since_firing_are_counted_by_hand():
    record = FiringRecord(3, torch.device("cpu"))
    record.update(Codes.from_dense(torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 2.0]])))
    assert record.tokens_since_fired.tolist() == [0, 2, 0]
    record.update(Codes.from_dense(torch.tensor([[0.0, 0.0, 1.0]] * 3)))
    assert record.tokens_since_fired.tolist() == [3, 5, 0]
    assert record.dead_fraction(3) == pytest.approx(2 / 3)


def test_auxk_revives_latents_that_fell_silent():
    def dead_fraction(*losses):
        trained = Crosscoder(PAIR.d_in, 48, BatchTopK(2), init=Init(norm=0.5))
        with torch.no_grad():
            trained.b_enc[24:] = -0.5
        return train(trained, batches(8, 256), losses, config(steps=120, log_every=120)).rows[-1][
            "dead_fraction"
        ]

    dead = {"dead_after_tokens": 2_000}
    assert dead_fraction(MSE(), AuxK(weight=0.25, **dead)) < 0.5 * dead_fraction(
        MSE(), AuxK(weight=0.0, **dead)
    )


def test_the_geometric_median_ignores_a_far_token():
    # On a line the geometric median is the median: 2 of (1, 2, 3, 1000) would be anywhere in [2, 3]; of (1, 2, 1000) it is 2.
    x = torch.tensor([1.0, 2.0, 1000.0])[:, None, None].expand(3, 2, 1).clone()
    assert geometric_median(x).flatten().tolist() == pytest.approx([2, 2], abs=1e-2)


def test_the_geometric_median_is_where_unit_pulls_cancel():
    x = torch.randn(50, 2, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 3
    pulls = torch.nn.functional.normalize(x - geometric_median(x, tolerance=0.0), dim=-1)
    assert pulls.sum(0).norm() < 1e-6


def test_b_dec_starts_at_the_median_once():
    x = batches(1)[0]
    trained = crosscoder()
    train(trained, [x], config=config(steps=1, lr=1e-30))
    torch.testing.assert_close(trained.b_dec.detach(), geometric_median(x))
    with torch.no_grad():
        trained.b_dec.fill_(7.0)
    train(trained, [x], config=config(steps=1, lr=1e-30))
    assert (trained.b_dec == 7).all()


def test_two_losses_of_one_name_are_refused():
    with pytest.raises(ValueError, match=r"each name once, got \['mse', 'mse'\]"):
        train(crosscoder(), batches(), [MSE(), MSE()], config())


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"steps": 0}, "steps=0"),
        ({"lr": -1.0}, "lr=-1.0"),
        ({"decay_fraction": 1.5}, "1.5"),
        ({"log_every": 0}, "log_every=0"),
    ],
)
def test_impossible_settings_are_refused(changes, reason):
    with pytest.raises(ValueError, match=reason):
        config(**changes)


def fake_wandb(monkeypatch, failing):
    module = types.ModuleType("wandb")
    module.Error = type("Error", (Exception,), {})
    module.rows, module.finished = [], False

    def log(row, step):
        if failing:
            raise module.Error("the network is down")
        module.rows.append((step, row))

    def finish():
        module.finished = True

    module.init, module.log, module.finish = lambda **_: None, log, finish
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_rows_go_to_a_tracker(monkeypatch):
    wandb = fake_wandb(monkeypatch, failing=False)
    history = train(crosscoder(), batches(), config=config(wandb_project="p"))
    assert wandb.rows == [(row["step"], row) for row in history.rows]
    assert wandb.finished
    assert not [note for note in history.notes if "wandb" in note]


def test_a_failing_tracker_never_stops_training(monkeypatch):
    fake_wandb(monkeypatch, failing=True)
    history = train(crosscoder(), batches(), config=config(wandb_project="p"))
    assert history.rows[-1]["step"] == 12
    assert history.notes[-1] == "wandb stopped: the network is down"


def test_training_in_float64_stays_in_float64():
    trained = crosscoder().double()
    train(trained, batches(), config=config())
    assert all(parameter.dtype == torch.float64 for parameter in trained.parameters())


@pytest.fixture
def no_grad_anywhere():
    torch.set_grad_enabled(False)
    yield
    torch.set_grad_enabled(True)


@pytest.mark.usefixtures("no_grad_anywhere")
def test_training_works_where_gradients_are_switched_off():
    """A notebook of TransformerLens usually starts with torch.set_grad_enabled(False)."""
    trained, read_with_gradients = crosscoder(TopK(3)), []

    class Reading:
        def __iter__(self):
            for x in batches():
                read_with_gradients.append(torch.is_grad_enabled())
                yield x

    train(trained, Reading(), config=config())
    assert not torch.is_grad_enabled()
    assert not any(read_with_gradients)  # a model that makes the batches keeps no graph
    torch.set_grad_enabled(True)
    same = crosscoder(TopK(3))
    train(same, batches(), config=config())
    assert all(torch.equal(value, same.state_dict()[name]) for name, value in trained.state_dict().items())


class Store:
    """What a PairedActivations offers."""

    def __iter__(self):
        return iter(batches())

    def shuffled(self, batch_size, seed):
        return list(PAIR.batches(batch_size, seed, 3))


def test_a_store_is_not_read_in_its_own_order():
    with pytest.raises(TypeError, match=r"Store.*in their order.*pass store\.shuffled\(batch_size, seed\)"):
        train(crosscoder(), Store(), config=config())
    assert train(crosscoder(), Store().shuffled(64, 0), config=config()).rows[-1]["step"] == 12


def test_the_remedy_for_batches_that_end_shuffles():
    with pytest.raises(EmptyData, match=r"store\.shuffled\(batch_size, seed\)"):
        train(crosscoder(), iter(batches(4)), config=config())


def test_the_folder_of_the_log_is_made(tmp_path):
    path = tmp_path / "runs" / "first" / "log.jsonl"
    train(crosscoder(), batches(), config=config(log_path=path))
    assert len(path.read_text().splitlines()) == 3


def test_a_missing_tracker_is_named_before_training(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    trained, before = crosscoder(), crosscoder().state_dict()
    with pytest.raises(ImportError, match="pip install wandb"):
        train(trained, batches(), config=config(wandb_project="p"))
    assert all(torch.equal(value, before[name]) for name, value in trained.state_dict().items())


@pytest.mark.parametrize("shape", [(64, PAIR.d_in, 2), (64, 1, PAIR.d_in)])
def test_a_batch_of_another_shape_is_refused_before_b_dec_starts(shape):
    trained = crosscoder()
    with pytest.raises(ShapeMismatch, match="train wants"):
        train(trained, [torch.ones(shape)], config=config())
    assert not trained.b_dec.any()
    assert not trained.training


def test_an_empty_batch_is_named():
    with pytest.raises(EmptyData, match="the batch of step 1 holds no token"):
        train(crosscoder(), [batches()[0], torch.zeros(0, 2, PAIR.d_in)], config=config())


def test_a_frozen_b_dec_stays_where_it_is():
    trained = crosscoder()
    trained.b_dec.requires_grad_(requires_grad=False)
    train(trained, batches(), config=config())
    assert not trained.b_dec.any()


def test_weights_loaded_into_a_trained_crosscoder_are_held_to_its_partition():
    tied = crosscoder(partition=Partition(shared=16))
    train(tied, batches(), config=config())
    tied.load_state_dict(crosscoder(init=Init(same=False)).state_dict())
    with pytest.raises(ValueError, match="not in their partition"):
        train(tied, batches(), config=config())
