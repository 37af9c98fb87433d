"""The mathematics of agreeing, on ranks that are threads of one process."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.dictionary.init import Init
from tl_crosscoder.dictionary.partition import Partition
from tl_crosscoder.dictionary.scores import GivenScores
from tl_crosscoder.dictionary.shard import Shard
from tl_crosscoder.dictionary.sparsity import BatchTopK, GroupMax, JumpReLU, Split
from tl_crosscoder.ranks import ALONE, Alone


class Threads:
    """An axis whose ranks are threads that meet at a table."""

    def __init__(self, table, index, size):
        self.table, self.index, self.size = table, index, size

    def add_(self, values):
        self.table[self.index] = values.clone()
        self.table["all here"].wait()
        total = sum(self.table[i] for i in range(self.size))
        self.table["all read"].wait()
        return values.copy_(total)

    def collected(self, values):
        self.table[self.index] = values
        self.table["all here"].wait()
        yield from [self.table[i] for i in range(self.size)] if self.index == 0 else []
        self.table["all read"].wait()


def on_ranks(work, n_latents, n_tokens=1):
    """What ``work(shard)`` gives on each rank, latents running fastest."""

    def axis(size):
        return {
            "all here": threading.Barrier(size, timeout=20),
            "all read": threading.Barrier(size, timeout=20),
        }

    every = axis(n_latents * n_tokens)
    rows, columns = [axis(n_latents) for _ in range(n_tokens)], [axis(n_tokens) for _ in range(n_latents)]

    def rank(i):
        t, j = divmod(i, n_latents)
        return work(
            Shard(
                Threads(rows[t], j, n_latents),
                Threads(columns[j], t, n_tokens),
                Threads(every, i, n_latents * n_tokens),
            )
        )

    with ThreadPoolExecutor(n_latents * n_tokens) as pool:
        return list(pool.map(rank, range(n_latents * n_tokens)))


#: Few enough to meet often, many enough to need every digit; zeros with and without a sign, and a subnormal.
NUMBERS = st.one_of(
    st.sampled_from([0.0, -0.0, 1e-45, 0.5, 1.0, 1.0000001, 3.0]), st.floats(0, 2.0**100, width=32)
)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(NUMBERS, max_size=12), min_size=2, max_size=2).filter(lambda p: any(p)), st.data())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_kth_largest_of_all_ranks_is_that_of_one_long_list(dtype, parts, data):
    parts = [torch.tensor(part, dtype=dtype) for part in parts]
    whole = torch.cat(parts)
    k = data.draw(st.integers(1, len(whole)))
    found = on_ranks(lambda shard: shard.kth_largest(parts[shard.every.index], 1, k), 2)
    wanted = [value.item() for value in Shard().kth_largest(whole, 1, k)]
    assert [[value.item() for value in rank] for rank in found] == [wanted] * 2


def test_the_kth_largest_place_is_found_beyond_what_a_float_can_count():
    parts = torch.tensor([2**62 + 1, 5, 2**53 + 1]), torch.tensor([2**53, 2**62])
    for k, wanted in enumerate([2**62 + 1, 2**62, 2**53 + 1, 2**53, 5], 1):
        assert on_ranks(lambda s, k=k: int(*s.kth_largest(parts[s.every.index], k)), 2) == [wanted] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", [1, 7, 30])
def test_the_kth_of_each_row_is_that_of_the_joined_rows(dtype, k):
    v = torch.randn(40, 30, generator=torch.Generator().manual_seed(k)).relu().to(dtype)
    wanted = v.sort(descending=True).values[:, k - 1 : k]
    uneven = v.split([0, 5, 25], dim=1)  # as AuxK asks: not every rank holds as many
    for parts in [v[:, index::3] for index in range(3)], uneven:
        found = on_ranks(lambda shard, parts=parts: shard.kth_of_rows(parts[shard.latents.index], k), 3)
        assert all(torch.equal(f, wanted) for f in found)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(NUMBERS, min_size=12, max_size=12), min_size=1, max_size=4), st.integers(1, 12))
@pytest.mark.parametrize("counted", [0, 1 << 20])
def test_ranks_choose_the_largest_of_each_row_and_of_equal_ones_the_lowest_latents(counted, rows, k):
    """By definition: sort by score, then latent.  Exchanged either by counting or as lists."""
    v = torch.tensor(rows)
    wanted = torch.zeros_like(v, dtype=torch.bool)
    for i, row in enumerate(rows):
        best = sorted(range(12), key=lambda j, row=row: (-row[j], j))[:k]
        wanted[i, [j for j in best if v[i, j] > 0]] = True
    assert torch.equal(Shard().largest_of_rows(v, k), wanted)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tl_crosscoder.dictionary.shard.COUNTED", counted)
        found = on_ranks(lambda shard: shard.largest_of_rows(v[:, shard.held], k), 3)
    for index, mask in enumerate(found):
        assert torch.equal(mask, wanted[:, index::3])


def test_a_group_that_does_not_divide_evenly_is_refused_with_both_numbers():
    sparsity = GroupMax(4)
    sparsity.divide(Shard(latents=Alone(2), every=Alone(2)))
    with pytest.raises(ValueError, match="a group of 3 latents cannot be divided evenly among 2 ranks"):
        sparsity.choose(GivenScores(torch.zeros(5, 6), torch.ones(6)))


def batch_topk(pre_acts, norms, shard, steps=4, k=1.5):
    """What a BatchTopK keeps of some batches, its threshold, and where it would look next."""
    sparsity = BatchTopK(k)
    sparsity.shard = shard
    rows = shard.read(pre_acts[0][:, None]).shape[0]
    kept = []
    for step in range(steps):
        sparsity.advance(step, steps)
        here = shard.read(pre_acts[step][:, None])[:, 0, shard.held]
        found = sparsity.choose(GivenScores(here, norms[shard.held]))
        tokens = found.tokens + shard.tokens.index * rows
        latents = found.latents * shard.latents.size + shard.latents.index
        kept.append(set(zip(tokens.tolist(), latents.tolist(), strict=True)))
    return kept, sparsity.threshold.item(), (sparsity.guess, sparsity.spare)


@pytest.mark.parametrize(("n_latents", "n_tokens"), [(2, 1), (1, 2), (2, 2), (3, 2)])
@pytest.mark.parametrize("values", ["all different", "many ties", "few positive", "none positive"])
def test_ranks_keep_together_what_one_process_keeps(values, n_latents, n_tokens):
    generator = torch.Generator().manual_seed(0)
    pre_acts = torch.randn(4, 12, 18, generator=generator)
    norms = torch.rand(18, generator=generator) + 0.5
    if values == "many ties":
        pre_acts, norms = pre_acts.round(), torch.ones(18)
    if values == "few positive":
        pre_acts -= 2
    if values == "none positive":
        pre_acts = -pre_acts.abs()
    alone, threshold, looking = batch_topk(pre_acts, norms, Shard())
    ranks = on_ranks(lambda shard: batch_topk(pre_acts, norms, shard), n_latents, n_tokens)
    for step in range(4):
        together = [pair for kept, _, _ in ranks for pair in kept[step]]
        assert len(together) == len(set(together))
        assert set(together) == alone[step]
    assert {rank[1:] for rank in ranks} == {(threshold, looking)}
    assert len(alone[3]) == {"few positive": len(alone[3]), "none positive": 0}.get(values, 18)


def test_the_gradient_of_a_sum_over_latents_is_that_of_each_part():
    parts = [torch.full((2, 3), float(i)) for i in range(3)]

    def work(shard):
        part = parts[shard.latents.index].clone().requires_grad_()
        total = shard.sum(part)
        torch.autograd.backward(total.square().sum())
        return total.detach(), part.grad

    for total, grad in on_ranks(work, 3):
        assert (total == 3).all()  # 0 + 1 + 2
        assert (grad == 6).all()  # d(total²) / d part = 2 · 3


def test_one_process_holds_and_reads_everything_itself():
    x = torch.randn(5, 2, 3, requires_grad=True)
    shard = Shard()
    assert torch.equal(shard.read(x), x)
    assert shard.sum(x) is x
    assert shard.mean(x) is x
    assert torch.arange(7)[shard.held].tolist() == list(range(7))
    assert (shard.total(3), shard.total(3, ALONE)) == (3, 3)


def test_every_latent_and_token_has_one_place():
    x = torch.arange(6.0)[:, None, None]
    ranks = on_ranks(lambda s: (torch.arange(6)[s.held].tolist(), s.read(x).flatten().tolist()), 3, 2)
    assert ranks == [
        ([0, 3], [0, 1, 2]), ([1, 4], [0, 1, 2]), ([2, 5], [0, 1, 2]),
        ([0, 3], [3, 4, 5]), ([1, 4], [3, 4, 5]), ([2, 5], [3, 4, 5]),
    ]  # fmt: skip


def test_what_does_not_divide_evenly_is_refused_with_both_numbers():
    shard = Shard(latents=Threads({}, 0, 3), tokens=Threads({}, 0, 2))
    with pytest.raises(ValueError, match="the first 64 latents cannot be divided evenly among 3 ranks"):
        shard.n_held(64)
    with pytest.raises(ValueError, match="a batch of 65 tokens cannot be divided evenly among 2 ranks"):
        shard.read(torch.zeros(65, 2, 3))


@pytest.mark.parametrize(("at_once", "step"), [(16, 1), (16, 3), (32, 4), (4096, 7)])
@pytest.mark.parametrize(
    "init", [Init(same=False), Init(directions="uniform", transposed=False), Init(same=37, transposed=False)]
)
def test_a_latent_starts_the_same_whichever_others_are_drawn(monkeypatch, init, at_once, step):
    """101 latents, 50 of them tied; 101 · 2 · 5 and 37 · 5 numbers are no multiples of 16."""
    whole = init.rows(101, 2, 5, tied=50)
    monkeypatch.setattr("tl_crosscoder.dictionary.init.AT_ONCE", at_once)
    for first in range(step):
        held = slice(first, None, step)
        for rows, part in zip(whole, init.rows(101, 2, 5, tied=50, held=held), strict=True):
            assert torch.equal(part, rows[held])


def test_ranks_make_what_one_process_makes():
    def made(shard):
        return Crosscoder(
            6,
            24,
            Split(0.25, JumpReLU(), BatchTopK(2)),
            partition=Partition(shared=6, base=0.25),
            init=Init(same=False, transposed=False),
            shard=shard,
        )

    whole = made(Shard())
    for index in range(3):
        shard = Shard(latents=Alone(3, index), every=Alone(3, index))
        for name, tensor in made(shard).state_dict().items():
            assert torch.equal(tensor, shard.rows(name, whole.state_dict()[name])), name
    assert (made(shard).config, made(shard).sparsity.first.shard) == (whole.config, shard)
