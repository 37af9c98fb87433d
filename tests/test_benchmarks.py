"""The benchmarks run, and compare like with like."""

import os
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch

from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.dictionary.init import Init
from tl_crosscoder.dictionary.losses import MSE, AuxK
from tl_crosscoder.dictionary.sparsity import BatchTopK
from tl_crosscoder.errors import NonFiniteActs
from tl_crosscoder.training.config import TrainConfig
from tl_crosscoder.training.train import train

BENCHMARKS = str(Path(__file__).parents[1] / "benchmarks")
sys.path.insert(0, BENCHMARKS)
compare, dense, ours, step, sparse_is_dense = map(
    import_module, ["compare", "dense", "ours", "step", "sparse_is_dense"]
)
sys.path.remove(BENCHMARKS)

SIZE = compare.Size(d_in=8, d_sae=64, k=4, batch=32, dead=0.25)
RUNS_TRITON = os.environ.get("TRITON_INTERPRET") == "1"
OWN = ["ours", "dense", "dense-bf16", "dense-bf16-guess"]


@pytest.fixture(scope="module")
def batches():
    return SIZE.batches()


@pytest.fixture(scope="module")
def start(batches):
    return SIZE.start(batches, warmup=5)


def test_planted_batches_have_mean_norm_root_d_and_models_that_are_alike_but_not_equal(batches):
    x = torch.cat(batches)
    assert x.norm(dim=-1).mean() == pytest.approx(8**0.5, rel=1e-3)
    base, tuned = x.unbind(1)
    assert 0.6 < torch.cosine_similarity(base, tuned).mean() < 0.999


def test_the_step_and_the_plain_dense_step_give_the_same_losses_and_weights(batches, start):
    """Three steps in float64, a quarter of the latents dead: selection, both losses, clip and Adam."""
    names = "W_enc", "b_enc", "W_dec", "b_dec"
    start = replace(start, **{name: getattr(start, name).double() for name in names})
    sparse, plain = ours.Ours(start, lr=1e-3), dense.Dense(start, lr=1e-3)
    for x in batches[:3]:
        torch.testing.assert_close(sparse.step(x.double()), plain.step(x.double()), rtol=1e-12, atol=0)
    sparse.close()
    trained = dict(sparse.crosscoder.named_parameters()) | {"W_enc": sparse.crosscoder.W_enc_rows}
    for name, expected in zip(names, plain.parameters, strict=True):
        assert (trained[name] != getattr(start, name)).any()
        torch.testing.assert_close(trained[name].flatten(), expected.flatten(), rtol=0, atol=1e-9)


def test_what_goes_wrong_in_training_reaches_the_benchmark(batches, start):
    with pytest.raises(NonFiniteActs):
        ours.Ours(start, lr=1e-3).step(batches[0] * torch.nan)


def test_dead_latents_do_not_fire_but_have_positive_pre_activations(batches, start):
    y = torch.cat(batches).flatten(1)
    pre_acts = y @ start.W_enc.flatten(1).T + start.b_enc
    _, acts, _ = dense.Dense(start, lr=1e-3)._forward(y)
    assert start.dead.sum() == 16
    assert not acts[:, start.dead].any()
    assert 0.1 < (pre_acts[:, start.dead] > 0).float().mean() < 0.9


def test_every_own_contender_takes_steps_of_the_same_sparsity_and_learns():
    result = compare.compare(SIZE, OWN, warmup=5, rounds=4)
    assert [row["key"] for row in result["rows"]] == OWN
    for row in result["rows"]:
        assert row["l0"] == pytest.approx(4, rel=0.02)
        assert row["ms"] > 0
        assert row["loss"] < 1
    assert result["rows"][0]["ratio"] == 1
    assert all(row["title"] in step.table(result) for row in result["rows"])


def test_growth_is_measured_for_each_size_that_doubles():
    result = compare.growth(SIZE, ["ours"], warmup=1, rounds=1, doublings=1)
    assert set(result["exponents"]["ours"]) == {"d_sae", "k", "batch"}
    assert len(result["measurements"]) == 4


@pytest.mark.skipif(RUNS_TRITON, reason="here it is not skipped")
def test_triton_kernels_are_skipped_without_a_gpu_and_it_is_said():
    result = compare.compare(SIZE, ["ours", "ours-triton"], warmup=1, rounds=1)
    assert [row["key"] for row in result["rows"]] == ["ours"]
    assert "kernels='torch'" in result["skipped"]["ours-triton"]


def test_a_peer_that_cannot_be_imported_is_skipped_and_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "dictionary_learning", None)
    result = compare.compare(SIZE, ["ours", "dictionary-learning"], warmup=1, rounds=1)
    assert [row["key"] for row in result["rows"]] == ["ours"]
    assert "dictionary_learning" in result["skipped"]["dictionary-learning"]
    assert "skipped: dictionary_learning" in step.table(result)


def test_training_and_a_plain_dense_loop_end_with_the_same_crosscoder(batches):
    """Thirty steps in float64 over batches that are read several times, with dead latents, a falling step size and clipping."""
    x = [batch.double() for batch in batches]
    losses, config = [MSE(), AuxK(dead_after_tokens=100)], TrainConfig(30, lr=1e-2, progress=False)
    made = [Crosscoder(8, 64, BatchTopK(4)).double() for _ in range(2)]
    train(made[0], x, losses, config)
    sparse_is_dense.train_densely(made[1], x, losses, config)
    torch.testing.assert_close(made[0].state_dict(), made[1].state_dict(), rtol=1e-9, atol=1e-12)
    assert sparse_is_dense.same_pairs(*made, torch.cat(x)) == 1
    assert (made[0].W_dec - Crosscoder(8, 64, BatchTopK(4)).double().W_dec).abs().max() > 0.01


def test_the_share_of_pairs_that_two_crosscoders_have_in_common_is_counted(batches):
    made = []
    for seed in range(2):
        sparsity = BatchTopK(4)
        sparsity.threshold.fill_(0.1)
        made.append(Crosscoder(8, 64, sparsity, init=Init(seed=seed)).double().eval())
    x = torch.cat(batches).double()
    on = [crosscoder.encode(x) > 0 for crosscoder in made]
    wanted = (on[0] & on[1]).sum() / (on[0] | on[1]).sum()
    assert sparse_is_dense.same_pairs(*made, x) == pytest.approx(wanted.item())
    assert 0 < wanted < 1
