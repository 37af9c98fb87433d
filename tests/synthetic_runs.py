"""Small crosscoders trained on synthetic pairs, once a test session: about two seconds each.

The two models start from independent directions, so that agreement between them is learned.  BatchTopK then has
precision and recall of at least .9 for tuned-only calls on eight seeds of eight; from the same directions on two of six, where
the others miss one concept of six.
L1 has recall 1 and precision .4 to .6 (four seeds).
"""

import pytest
import torch

from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.dictionary.init import Init
from tl_crosscoder.dictionary.losses import L1, MSE, AuxK
from tl_crosscoder.dictionary.sparsity import BatchTopK, ReLU
from tl_crosscoder.dictionary.synthetic import SyntheticPair
from tl_crosscoder.training.config import TrainConfig
from tl_crosscoder.training.train import train

STEPS, BATCH, D_SAE, K = 400, 512, 64, 2
CONFIG = TrainConfig(steps=STEPS, lr=1e-2, progress=False)

Run = tuple[SyntheticPair, Crosscoder]


def small_pair(mode="pair", seed=0) -> SyntheticPair:
    return SyntheticPair(
        d_in=32, n_shared=16, n_weak=6, n_base=5, n_tuned=6, n_decoupled=5, p=0.05, mode=mode, seed=seed
    )


def run_batchtopk(pair: SyntheticPair, seed: int = 0, *, same_init: bool = False) -> Run:
    sparsity = BatchTopK(K, k_max=10, k_anneal_steps=STEPS // 5)
    crosscoder = Crosscoder(pair.d_in, D_SAE, sparsity, init=Init(same=same_init, seed=seed))
    train(crosscoder, pair.batches(BATCH, seed), [MSE(), AuxK(dead_after_tokens=5_000)], CONFIG)
    return pair, crosscoder


def run_l1(pair: SyntheticPair, weight: float = 0.15, seed: int = 0) -> Run:
    crosscoder = Crosscoder(pair.d_in, D_SAE, ReLU(), init=Init(norm=0.1, seed=seed))
    train(crosscoder, pair.batches(BATCH, seed), [MSE(), L1(weight)], CONFIG)
    return pair, crosscoder


@pytest.fixture(scope="session")
def trained_batchtopk() -> Run:
    return run_batchtopk(small_pair())


@pytest.fixture(scope="session")
def trained_l1() -> Run:
    return run_l1(small_pair())


@pytest.fixture(scope="session")
def trained_identity() -> Run:
    """Started from the same directions, so both models stay equal to rounding."""
    return run_batchtopk(small_pair("identity"), same_init=True)


@pytest.fixture(scope="session")
def trained_disjoint() -> Run:
    return run_batchtopk(small_pair("disjoint"))


def delta_norm(crosscoder: Crosscoder) -> torch.Tensor:
    """``(1 + (n_tuned - n_base) / max(n_tuned, n_base)) / 2``: 1 is tuned-only, 0 base-only."""
    base, tuned = crosscoder.decoder_norms().detach().unbind(1)
    return (1 + (tuned - base) / torch.maximum(tuned, base)) / 2


def alive(pair: SyntheticPair, crosscoder: Crosscoder) -> torch.Tensor:
    return torch.tensor((pair.label(crosscoder)["kind"] != "dead").to_numpy())
