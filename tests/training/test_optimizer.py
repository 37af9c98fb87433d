import copy

import pytest
import torch

from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.dictionary.init import Init
from tl_crosscoder.dictionary.losses import L1, MSE, AuxK, Progress
from tl_crosscoder.dictionary.partition import Partition
from tl_crosscoder.dictionary.sparsity import BatchTopK, TopK
from tl_crosscoder.training.config import TrainConfig
from tl_crosscoder.training.optimizer import Adam
from tl_crosscoder.training.train import train

D_IN, D_SAE, BATCH, STEPS = 12, 64, 32, 7
LOSSES = [MSE(), AuxK(dead_after_tokens=100, k_aux=2), L1(0.01)]


FREE = Partition()


def crosscoder(sparsity=None, partition=FREE, dtype=torch.float64):
    made = Crosscoder(
        D_IN, D_SAE, sparsity or BatchTopK(4), partition=partition, init=Init(norm=0.5, same=False)
    )
    with torch.no_grad():
        made.b_enc[:5] = -50.0  # latents that never fire
    return made.to(dtype).train()


def batch(step, dtype=torch.float64):
    return torch.randn(BATCH, 2, D_IN, generator=torch.Generator().manual_seed(step), dtype=dtype)


def terms(model, x, step):
    silent = torch.zeros(D_SAE, dtype=torch.int64)
    silent[:5] = 1_000
    out = model(x)
    progress = Progress(step, STEPS, step * BATCH, silent)
    return {loss.name: loss(x, out, model, progress) for loss in LOSSES}


def trained(model, dtype=torch.float64, clip=1.0):
    adam = Adam(model)
    for step in range(STEPS):
        adam.descend(terms(model, batch(step, dtype), step), lr=1e-2, clip=clip, step=step)
    return model, adam


def in_panels_of_16(monkeypatch):
    """16 of the 24 columns of a batch lie together, then the other 8."""
    monkeypatch.setattr("tl_crosscoder.dictionary.row_grads.PANEL_BYTES", 16 * BATCH * 8)
    monkeypatch.setattr("tl_crosscoder.dictionary.row_grads.MANY", 0)


def assert_same(a, b, **tolerance):
    for (name, left), right in zip(a.named_parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(left, right, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


@pytest.mark.parametrize("clip", [1e-2, 1e9])
@pytest.mark.parametrize("block", [1, 1 << 21])
@pytest.mark.parametrize("panels", [False, True])
def test_it_is_torchs_adam_with_its_clipping(monkeypatch, clip, block, panels):
    """Clipped by much or not at all, in blocks of 16 rows or of all, of one or two panels, with dead latents and a penalty on
    norms."""
    monkeypatch.setattr("tl_crosscoder.dictionary.row_grads.BLOCK_BYTES", block)
    if panels:
        in_panels_of_16(monkeypatch)
    ours, _ = trained(crosscoder(), clip=clip)
    plain = crosscoder()
    adam = torch.optim.Adam(plain.parameters(), lr=1e-2)
    for step in range(STEPS):
        adam.zero_grad()
        torch.stack(list(terms(plain, batch(step), step).values())).sum().backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), clip)
        adam.step()
    assert_same(ours, plain, rtol=1e-9, atol=1e-11)
    assert (ours.W_dec - crosscoder().W_dec).abs().max() > 0.01


@pytest.mark.parametrize("sparsity", [BatchTopK(4), TopK(4)])
def test_sparse_and_dense_training_make_the_same_crosscoder(monkeypatch, sparsity):
    sparse, _ = trained(crosscoder(copy.deepcopy(sparsity)))
    monkeypatch.setattr("tl_crosscoder.dictionary.crosscoder.MAX_DENSITY", 0.0)
    dense, _ = trained(crosscoder(copy.deepcopy(sparsity)))
    assert_same(sparse, dense, rtol=1e-9, atol=1e-11)
    codes = [model.encode(batch(99)) != 0 for model in (sparse, dense)]
    assert torch.equal(*codes)


@pytest.mark.parametrize("block", [1, 1 << 21])
@pytest.mark.parametrize("panels", [False, True])
def test_a_partition_holds_to_the_bit(monkeypatch, block, panels):
    monkeypatch.setattr("tl_crosscoder.dictionary.row_grads.BLOCK_BYTES", block)
    if panels:
        in_panels_of_16(monkeypatch)
    partition = Partition(shared=20, base=7, tuned=9)
    model, _ = trained(crosscoder(partition=partition, dtype=torch.float32), torch.float32)
    assert torch.equal(model.W_dec[:20, 0], model.W_dec[:20, 1])
    assert not model.W_dec[20:27, 1].any()
    assert not model.W_dec[27:36, 0].any()
    assert model.W_dec[20:27, 0].any(-1).all()


def test_going_on_from_a_saved_state_gives_the_same_bytes():
    through, _ = trained(crosscoder())
    model = crosscoder()
    adam = Adam(model)
    for step in range(STEPS):
        if step == 3:
            state = {name: tensor.clone() for name, tensor in adam.state_dict().items()}
            adam = Adam(model)
            adam.load_state_dict(state)
        adam.descend(terms(model, batch(step), step), lr=1e-2, clip=1.0, step=step)
    assert_same(through, model, rtol=0, atol=0)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_nothing_changes_where_the_loss_or_its_gradient_is_not_finite(where):
    model, adam = trained(crosscoder())
    before = copy.deepcopy(model.state_dict()), {k: v.clone() for k, v in adam.state_dict().items()}
    bad = {"mse": model.W_dec.sum() * float("nan")}
    if where == "gradient":
        bad = {"mse": (model.W_dec * 0).sqrt().sum()}  # 0, and its gradient 0 · inf
    with pytest.raises(FloatingPointError, match=f"the {where} of step 8 is not finite"):
        adam.descend(bad, lr=1e-2, clip=1.0, step=8)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before[0].items())
    assert all(torch.equal(adam.state_dict()[name], tensor) for name, tensor in before[1].items())


def test_a_users_gradient_hooks_see_the_gradient_and_may_change_it():
    model, seen = crosscoder(), []
    model.W_dec.register_post_accumulate_grad_hook(lambda parameter: seen.append(parameter.grad.abs().sum()))
    model.W_enc_rows.register_hook(lambda gradient: gradient * 0)
    before = model.W_enc_rows.detach().clone()
    trained(model)
    assert len(seen) == STEPS
    assert min(seen) > 0
    assert torch.equal(model.W_enc_rows, before)
    plain, _ = trained(crosscoder())
    assert not torch.equal(plain.W_enc_rows, before)


def test_a_step_does_not_go_through_tensor_backward_which_nnsight_traces(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "backward", None)
    crosscoder = Crosscoder(4, 8, BatchTopK(2))
    before = crosscoder.W_dec.detach().clone()
    x = torch.randn(32, 2, 4, generator=torch.Generator().manual_seed(0))
    train(crosscoder, [x] * 2, [MSE()], TrainConfig(steps=2, progress=False))
    assert not torch.equal(crosscoder.W_dec, before)
