import copy
import json

import pytest
import torch
from torch import nn
from torch.func import functional_call

from tl_crosscoder.analysis.table import latent_table
from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.dictionary.init import Init
from tl_crosscoder.dictionary.losses import L1, MSE, AuxK, L2Norm, Progress
from tl_crosscoder.dictionary.normalizer import Normalizer
from tl_crosscoder.dictionary.partition import Partition, projection
from tl_crosscoder.dictionary.sparsity import BatchTopK, ReLU, TopK
from tl_crosscoder.hub.save import load, save

D_IN, D_SAE = 5, 14
BOTH = Partition(shared=5, base=2, tuned=3)
SHARED, BASE_ONLY, TUNED_ONLY, FREE = slice(0, 5), slice(5, 7), slice(7, 10), slice(10, 14)


def draw(batch=24, seed=3, n_models=2, d_in=D_IN, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, n_models, d_in, generator=generator, dtype=dtype)


def parted(partition=BOTH, sparsity=None, **arguments):
    arguments = {"init": Init(same=False, seed=1), **arguments}
    return Crosscoder(D_IN, D_SAE, sparsity or BatchTopK(4), partition=partition, **arguments)


def step(crosscoder, optimizer, x):
    optimizer.zero_grad()
    out = crosscoder(x)
    since = torch.zeros(D_SAE, dtype=torch.int64)
    progress = Progress(1, 10, 0, since)
    (MSE()(x, out, crosscoder, progress) + L1(0.01)(x, out, crosscoder, progress)).backward()
    optimizer.step()


def train(crosscoder, steps=20, make=torch.optim.Adam, **settings):
    dtype = crosscoder.W_dec.dtype
    optimizer = make([p for p in crosscoder.parameters() if p.requires_grad], lr=1e-2, **settings)
    for seed in range(steps):
        step(crosscoder, optimizer, draw(seed=seed, n_models=crosscoder.n_models, dtype=dtype))
    return crosscoder


def assert_in_partition(crosscoder):
    W_dec, W_enc = crosscoder.W_dec.detach(), crosscoder.W_enc_rows.detach()
    assert torch.equal(W_dec[SHARED, 0], W_dec[SHARED, 1])
    assert W_dec[SHARED].all()
    for part, model in ((BASE_ONLY, 0), (TUNED_ONLY, 1)):
        for rows in (W_dec, W_enc):
            assert rows[part, model].all()
            assert not rows[part, 1 - model].any()
    for free in (W_dec[FREE], W_enc[FREE], W_enc[SHARED]):
        assert (free[:, 0] != free[:, 1]).all()


def test_parts_follow_each_other_and_the_weights_start_in_them():
    parts = BOTH.parts(D_SAE)
    assert (parts.shared, parts.base, parts.tuned, parts.free) == (SHARED, BASE_ONLY, TUNED_ONLY, FREE)
    crosscoder = parted(init=Init(norm=0.3, same=False, transposed=False))
    assert_in_partition(crosscoder)
    expected = torch.full((D_SAE, 2), 0.3)
    expected[BASE_ONLY, 1] = expected[TUNED_ONLY, 0] = 0
    torch.testing.assert_close(crosscoder.decoder_norms().detach(), expected)


def test_a_share_of_the_dictionary_counts_the_same_latents_as_their_number():
    share = Partition(shared=0.5, base=0.25, tuned=0.05)
    assert share.parts(100) == Partition(shared=50, base=25, tuned=5).parts(100)


class Singles(nn.Module):
    """The naive reference: one tensor for each decoder and encoder that there is, put together at every step."""

    def __init__(self, crosscoder, losses, silent):
        super().__init__()
        self.free = Crosscoder(D_IN, D_SAE, type(crosscoder.sparsity)(crosscoder.sparsity.k)).double()
        self.free.load_state_dict(crosscoder.state_dict())
        self.losses, self.progress = losses, progress(silent)
        W_dec, W_enc = crosscoder.W_dec.detach(), crosscoder.W_enc_rows.detach()
        self.tied = nn.Parameter(W_dec[SHARED, 0].clone())
        self.tied_enc = nn.Parameter(W_enc[SHARED].clone())
        for name, part, model in (("base", BASE_ONLY, 0), ("tuned", TUNED_ONLY, 1)):
            setattr(self, name, nn.Parameter(W_dec[part, model].clone()))
            setattr(self, name + "_enc", nn.Parameter(W_enc[part, model].clone()))
        self.rest, self.rest_enc = nn.Parameter(W_dec[FREE].clone()), nn.Parameter(W_enc[FREE].clone())
        self.b_enc = nn.Parameter(crosscoder.b_enc.detach().clone())
        self.b_dec = nn.Parameter(crosscoder.b_dec.detach().clone())

    def parameters_of_its_own(self):
        return [parameter for name, parameter in self.named_parameters() if not name.startswith("free.")]

    def forward(self, x):
        nothing = torch.zeros_like
        base = (
            torch.stack([self.base, nothing(self.base)], 1),
            torch.stack([self.base_enc, nothing(self.base)], 1),
        )
        tuned = (
            torch.stack([nothing(self.tuned), self.tuned], 1),
            torch.stack([nothing(self.tuned), self.tuned_enc], 1),
        )
        weights = {
            "crosscoder.W_dec": torch.cat([torch.stack([self.tied] * 2, 1), base[0], tuned[0], self.rest]),
            "crosscoder.W_enc_rows": torch.cat([self.tied_enc, base[1], tuned[1], self.rest_enc]),
            "crosscoder.b_enc": self.b_enc,
            "crosscoder.b_dec": self.b_dec,
        }
        return functional_call(Total(self.free, self.losses, self.progress), weights, x)


class Total(nn.Module):
    """The sum of the losses as a module, so that its weights can be exchanged."""

    def __init__(self, crosscoder, losses, progress):
        super().__init__()
        self.crosscoder, self.losses, self.progress = crosscoder, losses, progress

    def forward(self, x):
        out = self.crosscoder(x)
        return sum(loss(x, out, self.crosscoder, self.progress) for loss in self.losses)


def progress(silent=()):
    since = torch.zeros(D_SAE, dtype=torch.int64)
    since[list(silent)] = 1_000
    return Progress(50, 100, 0, since)


LOSSES = {
    "squared": ([MSE()], ()),
    "unsquared and L1": ([L2Norm(), L1(0.1)], ()),
    "joint L1": ([MSE(), L1(0.1, norm="joint")], ()),
    "AuxK": ([MSE(), AuxK(k_aux=2, dead_after_tokens=1_000)], (1, 6, 8, 12)),
}


@pytest.mark.parametrize("density", [0.0, 1.0])
@pytest.mark.parametrize("case", LOSSES)
def test_gradients_are_those_of_single_parameters(monkeypatch, case, density):
    """MAX_DENSITY 0 makes the step dense, 1 sparse.  The copies of a tied decoder have equal parts of its gradient."""
    monkeypatch.setattr("tl_crosscoder.dictionary.crosscoder.MAX_DENSITY", density)
    losses, silent = LOSSES[case]
    crosscoder, x = parted(sparsity=TopK(4)).double(), draw(dtype=torch.float64)
    with torch.no_grad():
        crosscoder.b_enc[list(silent)] = -3.0
    singles = Singles(crosscoder, losses, silent)
    Total(crosscoder, losses, progress(silent))(x).backward()
    singles(x).backward()
    d_dec, d_enc = crosscoder.W_dec.grad, crosscoder.W_enc_rows.grad
    assert torch.equal(d_dec[SHARED, 0], d_dec[SHARED, 1])
    pairs = [
        (d_dec[SHARED].sum(1), singles.tied), (d_enc[SHARED], singles.tied_enc),
        (d_dec[BASE_ONLY, 0], singles.base), (d_enc[BASE_ONLY, 0], singles.base_enc),
        (d_dec[TUNED_ONLY, 1], singles.tuned), (d_enc[TUNED_ONLY, 1], singles.tuned_enc),
        (d_dec[FREE], singles.rest), (d_enc[FREE], singles.rest_enc),
        (crosscoder.b_enc.grad, singles.b_enc), (crosscoder.b_dec.grad, singles.b_dec),
    ]  # fmt: skip
    for ours, single in pairs:
        assert single.grad.any()
        torch.testing.assert_close(ours, single.grad, rtol=1e-10, atol=1e-12)
    for grad in (d_dec, d_enc):
        assert not grad[BASE_ONLY, 1].any()
        assert not grad[TUNED_ONLY, 0].any()


def test_training_with_adam_is_training_single_parameters():
    """Adam does not see a factor on a gradient, but for eps; 30 steps with decoupled weight decay."""
    crosscoder = parted(sparsity=TopK(4)).double()
    singles = Singles(crosscoder, [MSE()], ())
    settings = {"lr": 1e-2, "weight_decay": 0.1, "eps": 1e-20}
    ours = torch.optim.AdamW(crosscoder.parameters(), **settings)
    theirs = torch.optim.AdamW(singles.parameters_of_its_own(), **settings)
    for seed in range(30):
        x = draw(seed=seed, dtype=torch.float64)
        for module, optimizer in ((Total(crosscoder, [MSE()], progress()), ours), (singles, theirs)):
            optimizer.zero_grad()
            module(x).backward()
            optimizer.step()
    W_dec = crosscoder.W_dec.detach()
    torch.testing.assert_close(W_dec[SHARED, 1], singles.tied.detach(), rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(W_dec[TUNED_ONLY, 1], singles.tuned.detach(), rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(W_dec[FREE], singles.rest.detach(), rtol=1e-8, atol=1e-10)
    assert (W_dec[SHARED] - parted().W_dec[SHARED].double()).norm() > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (torch.optim.Adam, {"fused": True}),
        (torch.optim.AdamW, {"fused": True, "weight_decay": 0.1, "amsgrad": True}),
        (torch.optim.Adam, {"weight_decay": 0.1, "foreach": True}),
        (torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.1, "nesterov": True, "fused": True}),
        (torch.optim.RMSprop, {"momentum": 0.9, "weight_decay": 0.1, "foreach": False}),
    ],
)
def test_ties_and_zeros_are_exact_after_steps_with_momentum_and_weight_decay(make, settings, dtype):
    start = parted().to(dtype)
    trained = train(copy.deepcopy(start), 30, make, **settings)
    assert_in_partition(trained)
    assert (trained.W_dec - start.W_dec).abs().amin(-1)[
        :, 0
    ].count_nonzero() == D_SAE - 3  # all but tuned-only
    assert_in_partition(trained.eval().train())


@pytest.mark.parametrize("width", [5, 7, 16])
def test_ties_are_exact_to_the_last_shared_latent_that_is_allowed(width):
    """Fused optimisers take the last 15 numbers of a tensor by another road; those are never tied."""
    unshared = -(-16 // (2 * width))
    crosscoder = Crosscoder(width, 9, TopK(3), partition=Partition(shared=9 - unshared))
    optimizer = torch.optim.AdamW(crosscoder.parameters(), lr=1e-2, fused=True)
    for seed in range(30):
        optimizer.zero_grad()
        x = draw(seed=seed, d_in=width)
        MSE()(x, crosscoder(x), crosscoder, progress()).backward()
        optimizer.step()
    rows = crosscoder.W_dec.detach()[: 9 - unshared]
    assert torch.equal(rows[:, 0], rows[:, 1])
    with pytest.raises(ValueError, match=f"leave {unshared} latents or more unshared"):
        Crosscoder(width, 9, TopK(3), partition=Partition(shared=9 - unshared + 1))


def assigned(crosscoder):
    with torch.device("meta"):
        shell = Crosscoder.from_config(crosscoder.config)
    shell.load_state_dict(crosscoder.state_dict(), assign=True)
    return shell


def materialised(crosscoder):
    with torch.device("meta"):
        shell = Crosscoder.from_config(crosscoder.config)
    shell.to_empty(device="cpu").load_state_dict(crosscoder.state_dict())
    return shell


def frozen_for_a_while(crosscoder):
    crosscoder.W_dec.requires_grad_(False)
    crosscoder(draw()).recon.sum().backward()
    crosscoder.W_dec.requires_grad_(True)
    return crosscoder


COPIES = {
    "deepcopy": copy.deepcopy,
    "load_state_dict(assign=True)": assigned,
    "meta, then to_empty": materialised,
    "to another dtype and back": lambda c: c.double().float(),
    "frozen for a while": frozen_for_a_while,
}


@pytest.mark.parametrize("name", COPIES)
def test_copies_keep_the_partition_however_they_were_made(name):
    first = train(parted(), 5)
    other = COPIES[name](first)
    assert other.partition == BOTH
    before = other.W_dec.detach().clone()
    assert_in_partition(train(other, 5, torch.optim.AdamW, weight_decay=0.1))
    assert not torch.equal(other.W_dec[SHARED], before[SHARED])
    assert_in_partition(train(first, 5))


def test_save_and_load_keep_the_partition(tmp_path):
    loaded = load(save(train(parted(encoder="mean")), tmp_path / "c"))
    assert loaded.partition == BOTH
    assert loaded.encoder == "mean"
    assert_in_partition(train(loaded.train(), 5))


def test_gradients_of_several_backward_passes_add_up():
    crosscoder, x = parted(sparsity=TopK(4)).double(), draw(dtype=torch.float64)
    total = Total(crosscoder, [MSE()], progress())
    gradients = []
    for batches in ([x[:12]], [x[12:]], [x[:12], x[12:]]):
        crosscoder.zero_grad()
        for part in batches:
            total(part).backward()
        gradients.append(crosscoder.W_dec.grad.clone())
    torch.testing.assert_close(gradients[0] + gradients[1], gradients[2], rtol=1e-12, atol=1e-14)


def test_a_block_of_a_gradient_is_moved_as_the_whole_is():
    crosscoder = parted()
    assert projection(crosscoder.W_dec) is None
    crosscoder(draw())
    for parameter in (crosscoder.W_dec, crosscoder.W_enc_rows):
        project, gradient = projection(parameter), draw(D_SAE, seed=9)
        whole = project(gradient.clone())
        assert not torch.equal(whole, gradient)
        for size in (1, 3, 4, 6, 20):
            blocks = [project(part.clone(), first=i * size) for i, part in enumerate(gradient.split(size))]
            assert torch.equal(torch.cat(blocks), whole)


def test_an_unbound_dictionary_has_no_gradient_touched():
    crosscoder = parted(Partition())
    crosscoder(draw()).recon.sum().backward()
    assert projection(crosscoder.W_dec) is None
    assert (crosscoder.W_dec.grad != 0).any()


def test_a_dedicated_latent_does_not_read_the_other_model():
    x, other = draw(), draw(seed=8)
    changed = torch.stack([other[:, 0], x[:, 1]], 1)
    strict, loose = (parted(Partition(tuned=4, mask_encoder=mask), ReLU()) for mask in (True, False))
    assert torch.equal(strict.encode(x)[:, :4], strict.encode(changed)[:, :4])
    assert not torch.equal(loose.encode(x)[:, :4], loose.encode(changed)[:, :4])
    assert not train(loose).W_dec[:4, 0].any()
    assert loose.W_enc_rows[:4, 0].all()


def test_classes_are_by_construction():
    crosscoder = train(parted(sparsity=TopK(4), init=Init(same=False, seed=2)), 40).eval()
    table = latent_table(crosscoder, [draw(500, seed=50)])
    assert (table["n_fired"] > 0).sum() > 10
    assert (table["delta_norm"][SHARED] == 0.5).all()
    assert (table["delta_norm"][BASE_ONLY] == 0).all()
    assert (table["delta_norm"][TUNED_ONLY] == 1).all()
    assert (table["cosine"][SHARED] - 1).abs().max() < 1e-6
    assert table["cosine"][BASE_ONLY].isna().all()


def test_three_models_share_a_decoder():
    crosscoder = parted(Partition(shared=6), n_models=3)
    train(crosscoder, 20, torch.optim.AdamW, weight_decay=0.1)
    rows = crosscoder.W_dec.detach()
    assert torch.equal(rows[:6], rows[:6, :1].expand(-1, 3, -1))
    assert (rows[6:, 1] != rows[6:, 2]).all()


def scaled(*scale):
    return Normalizer(torch.randn(2, D_IN, generator=torch.Generator().manual_seed(0)), torch.tensor(scale))


def test_ties_hold_in_normalised_units():
    """Scales .5 and 2: in raw units base's row is four times tuned's."""
    crosscoder = train(parted(normalizer=scaled(0.5, 2.0))).eval()
    assert_in_partition(crosscoder)
    raw = crosscoder.raw_rows().detach()
    torch.testing.assert_close(raw[SHARED, 0], 4 * raw[SHARED, 1])
    folded, x = crosscoder.folded(), draw()
    assert folded.partition == BOTH
    torch.testing.assert_close(folded(x).recon, crosscoder(x).recon, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(folded.decoder_norms()[SHARED, 0], folded.decoder_norms()[SHARED, 1])
    assert not folded.W_dec[BASE_ONLY, 1].any()
    with pytest.raises(ValueError, match="train it first, then fold it"):
        folded.train()(x)


def test_a_folded_crosscoder_of_one_common_scale_stays_in_its_partition():
    folded = train(parted(normalizer=scaled(0.5, 0.5))).folded()
    assert_in_partition(train(folded, 5))


def test_weights_that_break_the_partition_are_refused():
    free = train(parted(Partition()))
    crosscoder = parted()
    crosscoder.load_state_dict(free.state_dict())
    crosscoder.eval()(draw())
    with pytest.raises(ValueError, match="the weights are not in their partition"):
        crosscoder.train()(draw())


@pytest.mark.parametrize(
    ("partition", "arguments", "reason"),
    [
        (
            Partition(shared=10, base=3, tuned=2),
            {},
            r"wants 15 latents \(shared=10, base=3, tuned=2\).*d_sae=14",
        ),
        (
            Partition(base=1),
            {"n_models": 3},
            "base-only and tuned-only latents want 2 models, got n_models=3",
        ),
        (Partition(shared=1), {"n_models": 1}, "shared by 2 models or more, got n_models=1"),
        (Partition(shared=14), {}, "leave 2 latents or more unshared"),
        (Partition(shared=-1), {}, "got -1"),
    ],
)
def test_impossible_partitions_are_refused(partition, arguments, reason):
    with pytest.raises(ValueError, match=reason):
        parted(partition, **arguments)


def test_the_partition_is_in_the_description():
    config = json.loads(json.dumps(parted(Partition(shared=0.25, tuned=2, mask_encoder=False)).config))
    assert Crosscoder.from_config(config).partition == Partition(shared=0.25, tuned=2, mask_encoder=False)
    with pytest.raises(ValueError, match="a partition has no setting 'dedicated'"):
        Crosscoder.from_config({**config, "partition": {"dedicated": 1}})
