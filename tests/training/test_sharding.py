"""Training on several processes is training on one."""

import numpy as np
import pytest
import torch
from ranks import on_processes

from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.dictionary.init import Init
from tl_crosscoder.dictionary.losses import L1, MSE, AuxK, L2Norm
from tl_crosscoder.dictionary.losses.delta import Delta
from tl_crosscoder.dictionary.losses.matryoshka import Matryoshka
from tl_crosscoder.dictionary.losses.pre_act import PreAct
from tl_crosscoder.dictionary.losses.tanh_penalty import TanhPenalty
from tl_crosscoder.dictionary.partition import Partition
from tl_crosscoder.dictionary.sparsity import BatchTopK, JumpReLU, ReLU, Split
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


VARIANTS = {work.__name__: work for work in (batch_topk, delta, l1, jumprelu, parted)}
MESHES = {"1 x 2": (2, 1), "2 x 1": (2, 2), "2 x 2": (4, 2)}


def trained(variant, shard, **changes):
    """The weights on the first rank, the rows of the log, and this rank's b_dec."""
    config = TrainConfig(
        **{"steps": 8, "lr": 1e-2, "log_every": 4, "warmup_steps": 2, "progress": False, **changes}
    )
    crosscoder, losses = VARIANTS[variant]()
    divide(crosscoder.double(), shard)
    rows = train(crosscoder, batches(), losses, config).rows
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


@pytest.mark.parametrize("variant", VARIANTS)
def test_processes_train_together_what_one_trains(variant, ranks, alone):
    whole, rows, _ = alone[variant]
    first, _, b_dec = ranks[0][variant]
    for name, tensor in whole.items():
        np.testing.assert_allclose(first[name], tensor, rtol=0, atol=1e-9, err_msg=name)
    for rank in ranks:
        _, theirs, same = rank[variant]
        assert same.tobytes() == b_dec.tobytes()
        for row, other in zip(rows, theirs, strict=True):
            assert other == pytest.approx(row | {"tokens_per_second": other["tokens_per_second"]}, abs=1e-9)
    if variant == "batch_topk":
        assert rows[-1]["auxk"] > 0
        assert 0 < rows[-1]["dead_fraction"] < 1
