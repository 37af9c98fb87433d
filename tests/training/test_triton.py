"""The Triton kernels do what torch's operations do.  TRITON_INTERPRET=1 runs them without a GPU."""

import os

import pytest
import torch

triton = pytest.importorskip("triton", exc_type=ImportError)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not (INTERPRETED or torch.cuda.is_available()):
    pytest.skip("wants a GPU, or TRITON_INTERPRET=1", allow_module_level=True)

from ranks import on_processes  # noqa: E402

from tl_crosscoder.dictionary import triton_bag  # noqa: E402
from tl_crosscoder.dictionary.codes import Codes  # noqa: E402
from tl_crosscoder.dictionary.crosscoder import Crosscoder  # noqa: E402
from tl_crosscoder.dictionary.init import Init  # noqa: E402
from tl_crosscoder.dictionary.losses import L1, MSE, AuxK, Progress  # noqa: E402
from tl_crosscoder.dictionary.losses.matryoshka import Matryoshka  # noqa: E402
from tl_crosscoder.dictionary.partition import Partition  # noqa: E402
from tl_crosscoder.dictionary.row_grads import RowGrads  # noqa: E402
from tl_crosscoder.dictionary.sparse_ops import Pairs, summed_by, torch_bag  # noqa: E402
from tl_crosscoder.dictionary.sparsity import BatchTopK, TopK  # noqa: E402
from tl_crosscoder.training import triton_adam  # noqa: E402
from tl_crosscoder.training.checkpoint import newest  # noqa: E402
from tl_crosscoder.training.config import TrainConfig  # noqa: E402
from tl_crosscoder.training.optimizer import Adam  # noqa: E402
from tl_crosscoder.training.sharding import divide, joined, united  # noqa: E402
from tl_crosscoder.training.train import train  # noqa: E402

DEVICE = "cpu" if INTERPRETED else "cuda"
D_IN, D_SAE, BATCH, STEPS = 5, 14, 8, 3
APART = Init(norm=0.5, same=False)
EXACT = {torch.float64: {"rtol": 1e-10, "atol": 1e-12}, torch.float32: {"rtol": 1e-4, "atol": 2e-6}}


@pytest.fixture(autouse=True)
def small_sizes(monkeypatch):
    """Rows of 10 numbers are more than a tile and no multiple of one; codes of few latents are pairs all the same."""
    monkeypatch.setattr("tl_crosscoder.dictionary.crosscoder.MAX_DENSITY", 1.0)
    monkeypatch.setattr(triton_bag, "TILE", 8)
    monkeypatch.setattr(triton_adam, "TILE", 8)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype).to(DEVICE)


def ragged_pairs(n_tokens=7, d_sae=6):
    """Latent 0 is active nowhere, latent 1 everywhere; token 0 has no active latent but that one."""
    active = torch.zeros(n_tokens, d_sae, dtype=torch.bool)
    active[:, 1] = active[1:4, 2] = active[2, 3:] = active[6, 5] = True
    tokens, latents = active.nonzero(as_tuple=True)
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), active.sum(1).cumsum(0)])
    return Pairs(tokens.to(DEVICE), latents.to(DEVICE), offsets.to(DEVICE), d_sae)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [1, 8, 13])
def test_a_bag_is_torchs_with_empty_and_long_groups(n, dtype):
    pairs = ragged_pairs()
    values = randn(len(pairs.tokens), dtype=dtype)
    for rows in (randn(6, n, dtype=dtype), randn(6, 2, n, dtype=dtype)[:, 1], randn(n, 6, dtype=dtype).T):
        for index, rows_of, offsets in (
            (pairs.latents, rows, pairs.offsets),
            (pairs.latents[:0], rows, pairs.offsets[:4] * 0),
            (pairs.latents[:0], rows, pairs.offsets[:1]),
        ):
            weights = values[: len(index)]
            expected = torch_bag(index, rows_of, offsets, weights)
            torch.testing.assert_close(
                triton_bag.bag(index, rows_of, offsets, weights), expected, **EXACT[dtype]
            )


@pytest.mark.parametrize("shape", [(6, 1, 5), (6, 2, 4), (6, 3, 5)])
def test_the_square_of_a_gradient_is_that_of_its_written_rows(shape):
    """Of one model, two and three (a tile has four); of pairs, rows, a row twice, a written gradient, and nothing."""
    weights = torch.nn.Parameter(randn(*shape))
    n, pairs = shape[1] * shape[2], ragged_pairs()
    grads = RowGrads()
    assert triton_adam.Gathered.of(grads, weights).square() == 0
    grads.add_pairs(randn(len(pairs.tokens), seed=1), randn(7, n, seed=2), pairs)
    grads.add_pairs(randn(len(pairs.tokens), seed=3), randn(7, n, seed=4), pairs)
    grads.add_rows(torch.tensor([4, 0, 4], device=DEVICE), randn(3, n, seed=5))
    weights.grad = randn(*shape, seed=6)
    written = grads.block(0, 6, weights) + weights.grad.flatten(1)
    square = triton_adam.Gathered.of(grads, weights).square()
    torch.testing.assert_close(square, written.square().sum(), rtol=1e-12, atol=0)


def crosscoder(sparsity=None, dtype=torch.float64, **settings):
    made = Crosscoder(D_IN, D_SAE, sparsity or BatchTopK(2), init=APART, **settings)
    with torch.no_grad():
        made.b_enc[-3:] = -50.0  # latents that never fire
    return made.to(DEVICE, dtype).train()


def trained(model, kernels, clip=1.0, losses=None, **settings):
    losses = losses or [MSE(), AuxK(dead_after_tokens=100, k_aux=2), L1(0.01)]
    silent = torch.zeros(D_SAE, dtype=torch.int64, device=DEVICE)
    silent[-3:] = 1_000
    adam = Adam(model, kernels=kernels, **settings)
    for step in range(STEPS):
        x = randn(BATCH, model.n_models, D_IN, seed=step, dtype=model.W_dec.dtype)
        with summed_by(adam.kernels.bag):
            out = model(x)
            assert isinstance(out.codes, Codes)
            progress = Progress(step, STEPS, step * BATCH, silent)
            terms = {loss.name: loss(x, out, model, progress) for loss in losses}
            adam.descend(terms, lr=1e-2, clip=clip, step=step)
    return model, adam


def assert_same(a, b, **tolerance):
    for name, left in a.items():
        torch.testing.assert_close(left, b[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance)


PARTED, TIED = Partition(shared=4, base=2, tuned=4), Partition(shared=4)
CASES = {
    "free": {},
    "one a token": {"sparsity": TopK(1)},
    "one model": {"n_models": 1},
    "three models, tied": {"n_models": 3, "partition": TIED},
    "parted": {"partition": PARTED},
    "decoupled": {"code_norm": "decoupled"},
}
STEPPED = [("free", dtype, clip) for dtype in EXACT for clip in (1e-2, 1e9)]
STEPPED += [(case, torch.float64, 1e-2) for case in CASES if case != "free"]


@pytest.mark.parametrize(("case", "dtype", "clip"), STEPPED)
def test_steps_are_those_of_the_plain_path(case, dtype, clip):
    """Weights and moments, clipped by much or not at all, with dead latents and a penalty on norms."""
    plain, plain_adam = trained(crosscoder(dtype=dtype, **CASES[case]), "torch", clip)
    ours, adam = trained(crosscoder(dtype=dtype, **CASES[case]), "triton", clip)
    assert_same(ours.state_dict(), plain.state_dict(), **EXACT[dtype])
    assert_same(adam.state_dict(), plain_adam.state_dict(), **EXACT[dtype])
    assert (ours.W_dec - crosscoder(dtype=dtype, **CASES[case]).W_dec).abs().max() > 0.01


def test_a_partition_holds_to_the_bit():
    for settings in ({"partition": PARTED}, {"partition": TIED, "n_models": 3}):
        model, _ = trained(crosscoder(dtype=torch.float32, **settings), "triton")
        assert all(torch.equal(model.W_dec[:4, 0], model.W_dec[:4, m]) for m in range(model.n_models))
        assert not torch.equal(model.W_dec[4:, 0], model.W_dec[4:, 1])
        if settings["partition"] is PARTED:
            for rows in (model.W_dec, model.W_enc_rows):
                assert not rows[4:6, 1].any()
                assert not rows[6:10, 0].any()
                assert rows[4:6, 0].any(-1).all()


def test_moments_in_bfloat16_are_rounded_by_the_same_chances():
    plain, plain_adam = trained(crosscoder(dtype=torch.float32), "torch", halved=True)
    ours, adam = trained(crosscoder(dtype=torch.float32), "triton", halved=True)
    assert adam.state_dict()["exp_avg.W_dec"].dtype == torch.bfloat16
    assert_same(ours.state_dict(), plain.state_dict(), rtol=1e-2, atol=1e-4)
    assert_same(adam.state_dict(), plain_adam.state_dict(), rtol=2**-7, atol=1e-6)


def test_nested_prefixes_are_decoded_alike():
    losses = [Matryoshka([4, 8, 1.0])]
    plain, _ = trained(crosscoder(), "torch", losses=losses)
    ours, _ = trained(crosscoder(), "triton", losses=losses)
    assert_same(ours.state_dict(), plain.state_dict(), **EXACT[torch.float64])


def test_nothing_changes_where_the_gradient_is_not_finite():
    model, adam = trained(crosscoder(), "triton")
    before = {name: tensor.clone() for name, tensor in (model.state_dict() | adam.state_dict()).items()}
    with pytest.raises(FloatingPointError, match="the gradient of step 8 is not finite"):
        adam.descend({"mse": (model.W_dec * 0).sqrt().sum()}, lr=1e-2, clip=1.0, step=8)
    assert_same(model.state_dict() | adam.state_dict(), before, rtol=0, atol=0)


def config(**changed):
    settings = {"steps": 4, "lr": 1e-2, "checkpoint_every": 2, "progress": False, "kernels": "triton"}
    return TrainConfig(**settings | changed)


def batches(n=4):
    return [randn(BATCH, 2, D_IN, seed=step, dtype=torch.float32) for step in range(n)]


def test_a_training_that_goes_on_has_the_bytes_of_one_that_never_stopped(tmp_path):
    losses = [MSE(), AuxK(dead_after_tokens=2 * BATCH)]
    train(whole := crosscoder(dtype=torch.float32), batches(), losses, config())

    class Stopped:
        calls = 0

        def __iter__(self):
            self.calls += 1
            yield from batches()[: 3 if self.calls == 1 else None]
            if self.calls == 1:
                raise KeyboardInterrupt

    source = Stopped()
    with pytest.raises(KeyboardInterrupt):
        train(crosscoder(dtype=torch.float32), source, losses, config(), checkpoints=tmp_path)
    assert newest(tmp_path)[0].training["config"]["kernels"] == "triton"
    with pytest.raises(ValueError, match=r"config.kernels is 'triton' there, 'torch' asked for"):
        train(crosscoder(dtype=torch.float32), source, losses, config(kernels="torch"), resume=tmp_path)
    train(again := crosscoder(dtype=torch.float32), source, losses, config(), resume=tmp_path)
    assert_same(whole.state_dict(), again.state_dict(), rtol=0, atol=0)


def on_ranks(data):
    with joined(data) as shard:
        model = crosscoder(**CASES["parted"])
        divide(model, shard)
        losses = [MSE(), AuxK(dead_after_tokens=BATCH, k_aux=2)]
        train(model, [randn(BATCH, 2, D_IN, seed=step) for step in range(2)], losses, config(steps=2))
        whole = united(model)
        return whole and {name: tensor.numpy() for name, tensor in whole.state_dict().items()}


@pytest.mark.skipif(not INTERPRETED, reason="each process wants a GPU of its own")
@pytest.mark.enable_socket
@pytest.mark.parametrize("data", [1, 2])
def test_two_processes_make_what_one_makes(data):
    """They divide the latents, or the tokens."""
    one, two = on_ranks(1), on_processes(on_ranks, 2, data)[0]
    for name, weights in one.items():
        torch.testing.assert_close(torch.tensor(two[name]), torch.tensor(weights), rtol=1e-9, atol=1e-11)


def test_weights_of_half_precision_are_refused():
    with pytest.raises(
        ValueError, match=r"in float32 or float64, got torch.bfloat16; take .*kernels='torch'"
    ):
        Adam(crosscoder(dtype=torch.bfloat16), kernels="triton")


def test_weights_that_do_not_lie_row_by_row_are_refused():
    model = crosscoder()
    model.W_enc_rows.data = model.W_enc_rows.data.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    with pytest.raises(ValueError, match="wants weights contiguous, got strides"):
        Adam(model, kernels="triton")


@pytest.mark.skipif(INTERPRETED, reason="the interpreter takes any device")
def test_weights_that_are_not_on_a_gpu_are_refused_before_any_work():
    with pytest.raises(ValueError, match=r"on a GPU \(cuda\), got cpu; take crosscoder.to\('cuda'\)"):
        train(crosscoder().cpu(), [], config=config())
