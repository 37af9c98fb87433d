"""GroupMax, JumpReLU, Split, and what every sparsity owes a crosscoder."""

import json

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import functional_call

from tl_crosscoder.dictionary.codes import Codes, DenseCodes
from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.dictionary.normalizer import Normalizer
from tl_crosscoder.dictionary.prefix import first_latents
from tl_crosscoder.dictionary.scores import Crowded, ExactScores, GivenScores
from tl_crosscoder.dictionary.screening import ScreenedScores
from tl_crosscoder.dictionary.sparsity import SPARSITIES, BatchTopK, GroupMax, JumpReLU, ReLU, Split, TopK
from tl_crosscoder.errors import CorruptFile
from tl_crosscoder.hub.save import load, save

D_IN, D_SAE = 3, 12
KINDS = {
    "relu": ReLU,
    "topk": lambda: TopK(3),
    "batch_topk": lambda: BatchTopK(3),
    "group_max": lambda: GroupMax(4),
    "jumprelu": lambda: JumpReLU(0.8, bandwidth=0.5),
    "split": lambda: Split(0.25, BatchTopK(2), BatchTopK(0.5)),
    "mixed split": lambda: Split(5, TopK(2), JumpReLU(0.8, bandwidth=0.5)),
    "nested split": lambda: Split(0.5, Split(2, ReLU(), TopK(1)), GroupMax(3)),
}
every_sparsity = pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)


def draw_pre(batch=9, d_sae=D_SAE, seed=0, coarse=False):
    generator = torch.Generator().manual_seed(seed)
    pre = 2 * torch.randn(batch, d_sae, generator=generator, dtype=torch.float64)
    norms = torch.rand(d_sae, generator=generator, dtype=torch.float64) + 0.1
    return (pre.round(), torch.ones_like(norms)) if coarse else (pre, norms)


def draw(batch=16, seed=2, dtype=torch.float64):
    return 1 + torch.randn(batch, 2, D_IN, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def random_crosscoder(sparsity, dtype=torch.float64, seed=1):
    """Random weights, thresholds about .8, and a threshold for every BatchTopK."""
    normalizer = Normalizer(torch.linspace(-1, 1, 2 * D_IN).view(2, D_IN), torch.tensor([0.7, 0.4]))
    crosscoder = Crosscoder(D_IN, D_SAE, sparsity, normalizer=normalizer)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in crosscoder.named_parameters():
            scale = 0.3 if "threshold" in name else 1.0
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
        for part in crosscoder.modules():
            if isinstance(part, BatchTopK):
                part.threshold.fill_(1.5)
    return crosscoder.to(dtype)


def copy_of(crosscoder):
    other = Crosscoder.from_config(crosscoder.config).to(crosscoder.W_dec.dtype)
    other.load_state_dict(crosscoder.state_dict())
    return other.train(crosscoder.training)


@pytest.fixture(params=["pairs", "dense"])
def path(request, monkeypatch):
    """Makes a crosscoder take the pairwise path, or the dense one."""

    def take(crosscoder):
        sparse = request.param == "pairs"
        monkeypatch.setattr("tl_crosscoder.dictionary.crosscoder.MAX_DENSITY", 1.0 if sparse else 0.0)
        crosscoder._crowded = not sparse
        return crosscoder

    take.codes = {"pairs": Codes, "dense": DenseCodes}[request.param]
    return take


# GroupMax


def test_group_max_by_hand():
    # groups {0, 1} and {2, 3}; scores of token 0: [3, 4], [0, -]: latent 1 alone; of token 1: [2, 2], [5, 1]: the tie goes to 0
    pre = torch.tensor([[3.0, 2.0, 0.0, -4.0], [2.0, 1.0, 5.0, 1.0]])
    assert GroupMax(2)(pre, torch.tensor([1.0, 2.0, 1.0, 1.0])).tolist() == [[0, 2, 0, 0], [2, 0, 5, 0]]


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), k=st.sampled_from([1, 2, 3, 4, 6, 12]), coarse=st.booleans())
def test_group_max_equals_sorting_each_group_of_each_token(seed, k, coarse):
    pre, norms = draw_pre(seed=seed, coarse=coarse)
    n = D_SAE // k
    groups = [slice(g * n, (g + 1) * n) for g in range(k)]
    expected = [reference.keep_largest_per_row(pre[:, g].numpy(), norms[g].numpy(), 1) for g in groups]
    np.testing.assert_array_equal(GroupMax(k)(pre, norms), np.concatenate(expected, 1))


# JumpReLU


def test_jumprelu_keeps_what_exceeds_its_latents_threshold():
    sparsity = JumpReLU()
    sparsity.check(3)
    with torch.no_grad():
        sparsity.log_threshold.copy_(torch.tensor([0.5, 1.0, 2.0]).log())
    pre = torch.tensor([[0.6, 0.9, 2.1], [0.4, 1.1, -3.0]])
    assert torch.equal(sparsity(pre, torch.ones(3)), torch.tensor([[0.6, 0, 2.1], [0, 1.1, 0]]))
    # the threshold is on the pre-activation: norms decide nothing, except that a latent without decoders stays off
    assert torch.equal(sparsity(pre, torch.tensor([9.0, 0.1, 0.0])), torch.tensor([[0.6, 0, 0], [0, 1.1, 0]]))


def test_the_gradient_of_the_threshold_by_hand():
    """θ = 2, bandwidth 1: p = 1.4 and 2.6 lie outside the window, 1.6 (off) and 2.4 (on) inside: -(2 / 1) · (10 + 100) = -220."""
    sparsity = JumpReLU(init_threshold=2.0, bandwidth=1.0)
    pre = torch.tensor([[1.4], [1.6], [2.4], [2.6]], requires_grad=True)
    acts = sparsity(pre, torch.ones(1))
    (acts * torch.tensor([[1.0], [10.0], [100.0], [1000.0]])).sum().backward()
    assert sparsity.log_threshold.grad.item() == pytest.approx(-220)
    assert pre.grad.flatten().tolist() == [0, 0, 100, 1000]


def test_the_gradient_of_the_thresholds_equals_the_loop_in_float64():
    sparsity, (pre, norms) = JumpReLU(bandwidth=0.7), draw_pre(batch=50)
    sparsity.check(D_SAE)
    sparsity.to(torch.float64)
    with torch.no_grad():
        sparsity.log_threshold.copy_(0.5 * torch.randn(D_SAE, generator=torch.Generator().manual_seed(1)))
    weights = torch.randn(50, D_SAE, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (sparsity(pre, norms) * weights).sum().backward()
    expected = np.zeros(D_SAE)
    for j, theta in enumerate(sparsity.thresholds.tolist()):
        for i in range(50):
            inside = abs((pre[i, j].item() - theta) / 0.7) < 0.5
            expected[j] += -theta / 0.7 * inside * weights[i, j].item()
    assert np.count_nonzero(expected) > D_SAE / 2
    np.testing.assert_allclose(sparsity.log_threshold.grad, expected, rtol=1e-12)


def test_the_gradient_of_the_threshold_is_that_of_the_expected_activation():
    """p uniform on [0, 4]: E f = ∫_θ^4 p / 4 dp = (16 - θ²) / 8, so dE f / dθ = -θ / 4, whatever the bandwidth inside [0, 4]."""
    pre = torch.linspace(0, 4, 40_001, dtype=torch.float64)[:, None]
    for theta, bandwidth in [(1.0, 0.5), (1.5, 2.0), (3.0, 1.0)]:
        sparsity = JumpReLU(theta, bandwidth)
        sparsity.check(1)
        sparsity.to(torch.float64)
        sparsity(pre, torch.ones(1, dtype=torch.float64)).mean().backward()
        assert sparsity.log_threshold.grad.item() == pytest.approx(-theta / 4, rel=1e-3)


def test_thresholds_are_made_once_for_one_dictionary():
    sparsity = JumpReLU(0.3)
    crosscoder = Crosscoder(D_IN, D_SAE, sparsity)
    torch.testing.assert_close(crosscoder.sparsity.thresholds.detach(), torch.full((D_SAE,), 0.3))
    assert "sparsity.log_threshold" in dict(crosscoder.named_parameters())
    with pytest.raises(ValueError, match=r"thresholds for 12 latents, not for d_sae=5; .*of its own"):
        Crosscoder(D_IN, 5, crosscoder.sparsity)
    assert Crosscoder(D_IN, 5, sparsity).sparsity.thresholds.shape == (
        5,
    )  # nobody has changed what was handed in


def test_a_jumprelu_crosscoder_trains_densely_and_evaluates_pairs_with_the_same_codes():
    crosscoder, x = random_crosscoder(JumpReLU(bandwidth=0.5)), draw()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tl_crosscoder.dictionary.crosscoder.MAX_DENSITY", 1.0)
        training, evaluating = crosscoder(x).codes, crosscoder.eval()(x).codes
    assert isinstance(training, DenseCodes)
    assert isinstance(evaluating, Codes)
    assert 0 < evaluating.l0 < D_SAE / 2
    torch.testing.assert_close(training.dense(), evaluating.dense(), rtol=1e-12, atol=1e-12)


# Split


def test_split_is_each_sparsity_on_its_own_latents():
    pre, norms = draw_pre()
    together = Split(5, BatchTopK(2), TopK(1))(pre, norms)
    apart = [BatchTopK(2)(pre[:, :5], norms[:5]), TopK(1)(pre[:, 5:], norms[5:])]
    assert torch.equal(together, torch.cat(apart, 1))


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10**6), k=st.sampled_from([1, 2, 2.5]), k_rest=st.sampled_from([0.25, 0.5, 1.25, 9])
)
def test_each_part_keeps_exactly_its_own_k_or_every_positive_score(seed, k, k_rest):
    """Fractional k: .25 latents a token are 2 in a batch of 8."""
    pre, norms = draw_pre(batch=8, seed=seed)
    acts = Split(0.25, BatchTopK(k), BatchTopK(k_rest))(pre, norms)
    for part, asked in ((slice(0, 3), k), (slice(3, 12), k_rest)):
        assert acts[:, part].count_nonzero() == min(8 * asked, int((pre[:, part] > 0).sum()))


def test_the_parts_of_a_split_have_thresholds_of_their_own():
    pre, norms = draw_pre(batch=64)
    sparsity = Split(6, BatchTopK(3), BatchTopK(1))
    acts = sparsity(pre, norms)
    scores = torch.where(acts > 0, acts * norms, torch.inf)
    assert sparsity.first.threshold.item() == pytest.approx(scores[:, :6].min().item(), rel=1e-6)
    assert sparsity.rest.threshold.item() == pytest.approx(scores[:, 6:].min().item(), rel=1e-6)
    assert sparsity.first.threshold < sparsity.rest.threshold


def test_the_schedules_of_a_split_both_advance():
    sparsity = Split(6, BatchTopK(2, k_max=6, k_anneal_steps=4), BatchTopK(1, k_max=3, k_anneal_steps=2))
    ks = []
    for step in range(5):
        sparsity.advance(step, 5)
        ks.append((sparsity.first.k_now, sparsity.rest.k_now, sparsity.k_now))
    assert ks == [(6, 3, 9), (5, 2, 7), (4, 1, 5), (3, 1, 4), (2, 1, 3)]
    assert Split(6, BatchTopK(2), ReLU()).k_now is None


def test_a_split_of_batch_topks_never_asks_for_every_pre_activation():
    class Frugal(ExactScores):
        def pre_acts(self):
            raise AssertionError("every pre-activation was asked for")

    generator = torch.Generator().manual_seed(0)
    x, rows = torch.randn(40, 7, generator=generator), torch.randn(30, 7, generator=generator)
    scores = Frugal(x, rows, torch.zeros(30), torch.ones(30))
    sparsity = Split(10, BatchTopK(2), BatchTopK(1))
    found = sparsity.choose(scores)
    place = found.latents * 40 + found.tokens
    assert torch.equal(place, place.sort().values)
    acts = torch.zeros(40, 30)
    acts[found.tokens, found.latents] = found.pre_acts
    expected = Split(10, BatchTopK(2), BatchTopK(1))(x @ rows.T, torch.ones(30))
    torch.testing.assert_close(acts, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [ExactScores, ScreenedScores])
def test_a_part_of_the_scores_is_those_latents_counted_from_zero(kind):
    generator = torch.Generator().manual_seed(0)
    x, rows = torch.randn(40, 7, generator=generator), torch.randn(30, 7, generator=generator)
    scores = kind(x, rows, torch.randn(30, generator=generator), torch.rand(30, generator=generator), 500)
    part, whole = scores.part(slice(4, 21)).above(0.3), scores.above(0.3)
    inside = (whole.latents >= 4) & (whole.latents < 21)
    assert 0 < len(part) < len(whole)
    assert part.latents.tolist() == (whole.latents[inside] - 4).tolist()
    assert part.tokens.tolist() == whole.tokens[inside].tolist()
    torch.testing.assert_close(part.scores, whole.scores[inside])
    with pytest.raises(Crowded):
        scores.part(slice(0, 30)).above(0.0)  # about 600 pairs: the limit comes along


# laws of every sparsity, in a crosscoder


@every_sparsity
def test_the_forward_pass_is_the_plain_formula_on_either_path(make, path):
    crosscoder, x = path(random_crosscoder(make())), draw()
    out = crosscoder(x)
    assert isinstance(out.codes, path.codes if crosscoder.sparsity.selects else DenseCodes)
    y = crosscoder.normalizer.normalise(x)
    acts = make_like(crosscoder)(crosscoder.pre_acts(x), crosscoder.decoder_norms().sum(1))
    assert 0 < acts.count_nonzero() < acts.numel()
    torch.testing.assert_close(out.acts, acts, rtol=1e-12, atol=1e-12)
    estimate = torch.einsum("bj,jmd->bmd", acts, crosscoder.W_dec) + crosscoder.b_dec
    torch.testing.assert_close(out.target, y, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(out.estimate, estimate, rtol=1e-12, atol=1e-12)


def make_like(crosscoder):
    """A copy of its sparsity."""
    sparsity = SPARSITIES.build(crosscoder.config["sparsity"])
    sparsity.check(D_SAE)
    sparsity.to(crosscoder.W_dec.dtype).load_state_dict(crosscoder.sparsity.state_dict())
    return sparsity.train(crosscoder.sparsity.training)


@every_sparsity
def test_gradients_of_weights_pass_a_numerical_check_on_either_path(make, path):
    crosscoder, x = path(random_crosscoder(make())), draw(8)
    named = {
        name: p.detach().clone().requires_grad_()
        for name, p in crosscoder.named_parameters()
        if "threshold" not in name  # its gradient is that of an expectation, not of this function
    }
    weights = torch.randn(8, 2, D_IN, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def value(*parameters):
        out = functional_call(crosscoder, dict(zip(named, parameters, strict=True)), (x,))
        return (out.recon * weights).sum()

    assert torch.autograd.gradcheck(value, tuple(named.values()), fast_mode=True)


@every_sparsity
@pytest.mark.parametrize("training", [True, False])
def test_stretching_the_encoder_against_the_decoder_changes_nothing(make, training):
    crosscoder, x = random_crosscoder(make()).train(training), draw()
    other = copy_of(crosscoder)
    c = torch.linspace(0.2, 5, D_SAE, dtype=torch.float64)
    with torch.no_grad():
        other.W_enc_rows.mul_(c[:, None, None])
        other.b_enc.mul_(c)
        other.W_dec.div_(c[:, None, None])
        for name, parameter in other.named_parameters():
            if "threshold" in name:  # a threshold is in units of the pre-activation
                parameter.add_(c[-len(parameter) :].log())
    a, b = crosscoder(x), other(x)
    torch.testing.assert_close(a.acts * c, b.acts, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(a.recon, b.recon, rtol=1e-10, atol=1e-10)


@every_sparsity
def test_eval_codes_do_not_depend_on_batch_mates(make):
    crosscoder, x = random_crosscoder(make()).eval(), draw(32)
    alone = torch.cat([crosscoder.encode(row[None]) for row in x])
    assert crosscoder.encode(x).any()
    torch.testing.assert_close(crosscoder.encode(x), alone, rtol=1e-12, atol=1e-12)


@every_sparsity
def test_folding_changes_nothing(make):
    crosscoder, x = random_crosscoder(make()).eval(), draw()
    a, b = crosscoder(x), crosscoder.folded()(x)
    for field in ("acts", "target", "estimate", "recon"):
        torch.testing.assert_close(getattr(a, field), getattr(b, field), rtol=1e-10, atol=1e-10)


@every_sparsity
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_and_load_are_bit_equal(tmp_path, make, dtype):
    saved = random_crosscoder(make(), dtype).eval()
    loaded = load(save(saved, tmp_path / "c"))
    assert loaded.config == saved.config
    assert loaded.state_dict().keys() == saved.state_dict().keys()
    for name, tensor in saved.state_dict().items():
        assert loaded.state_dict()[name].dtype == dtype
        assert torch.equal(loaded.state_dict()[name], tensor), name
    x = draw(dtype=dtype)
    assert torch.equal(loaded(x).recon, saved(x).recon)


@every_sparsity
def test_a_description_survives_json_and_builds_the_same(make):
    description = SPARSITIES.describe(make())
    assert json.loads(json.dumps(description)) == description
    assert SPARSITIES.describe(SPARSITIES.build(description)) == description


@pytest.mark.parametrize(
    ("make", "error", "reason"),
    [
        (lambda: Crosscoder(4, 8, GroupMax(3)), ValueError, "d_sae=8 is no multiple of k=3"),
        (lambda: Crosscoder(4, 8, GroupMax(9)), ValueError, "d_sae=8, got k=9"),
        (lambda: JumpReLU(0.0), ValueError, r"init_threshold=0\.0, bandwidth=2\.0"),
        (lambda: JumpReLU(0.1, bandwidth=-1.0), ValueError, r"bandwidth=-1\.0"),
        (lambda: Crosscoder(4, 8, Split(8, ReLU(), ReLU())), ValueError, "n_first=8 puts 8 of d_sae=8 first"),
        (lambda: Crosscoder(4, 8, Split(0.01, ReLU(), ReLU())), ValueError, "n_first=0.01 puts 0 of d_sae=8"),
        (lambda: Crosscoder(4, 8, Split(3, BatchTopK(4), ReLU())), ValueError, "d_sae=3, got k=4"),
        (lambda: Crosscoder(4, 8, Split(3, ReLU(), BatchTopK(6))), ValueError, "d_sae=5, got k=6"),
        (lambda: SPARSITIES.build({"name": "split", "n_first": 3, "first": 4, "rest": {"name": "relu"}}),
         TypeError, "Split"),
        (lambda: Split(3, *[BatchTopK(2)] * 2), ValueError, "one for both parts would mix up their thresholds"),
        (lambda: first_latents(9, 8), ValueError, r"0 to d_sae=8\).*got 9"),
        (lambda: first_latents(1.5, 8), ValueError, r"0\.0 to 1\.0\), got 1\.5"),
        (lambda: first_latents(-1, 8), ValueError, "got -1"),
    ],
)  # fmt: skip
def test_impossible_settings_are_refused_with_their_numbers(make, error, reason):
    with pytest.raises(error, match=reason):
        make()


def test_first_latents_are_a_number_or_a_share():
    assert [first_latents(part, 10) for part in (0, 3, 10, 0.0, 0.2, 0.26, 1.0)] == [0, 3, 10, 0, 2, 3, 10]
    assert first_latents(1, 10) == 1


def test_a_file_that_nests_sparsities_without_end_is_corrupt(tmp_path):
    folder = save(random_crosscoder(Split(5, ReLU(), ReLU()), torch.float32).eval(), tmp_path / "c")
    config = json.loads((folder / "config.json").read_text())
    for _ in range(400):
        config["crosscoder"]["sparsity"] = {
            "name": "split",
            "n_first": 5,
            "first": {"name": "relu"},
            "rest": config["crosscoder"]["sparsity"],
        }
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CorruptFile):
        load(folder)


def steps_of(crosscoder, n=30):
    for step in range(n):
        crosscoder.sparsity.advance(step, n)
        yield crosscoder(torch.randn(64, 2, 8, generator=torch.Generator().manual_seed(step)))


@pytest.mark.parametrize("k", [(4, 28), (4, 27), (2, 20)])
def test_each_part_of_a_split_sees_a_step_once_however_crowded(k):
    """32 of 256 latents are just as many as pairs pay for."""
    split = Split(128, BatchTopK(k[0], threshold_start=0.0), BatchTopK(k[1], threshold_start=0.0))
    crosscoder, tracked = Crosscoder(8, 256, split), []
    split = crosscoder.sparsity
    for part in (split.first, split.rest):
        original = part._track
        part._track = lambda value, part=part, original=original: (tracked.append(part), original(value))
    assert len(list(steps_of(crosscoder))) == 30
    assert (tracked.count(split.first), tracked.count(split.rest)) == (30, 30)


@pytest.mark.parametrize(("k", "form"), [(30, Codes), (32, Codes), (33, DenseCodes)])
def test_k_decides_whether_pairs_pay_and_not_the_guess(k, form):
    crosscoder = Crosscoder(8, 256, BatchTopK(k))
    assert {type(out.codes) for out in steps_of(crosscoder)} == {form}


def test_after_a_batch_of_few_positive_scores_no_sample_is_taken_and_many_again_change_nothing(monkeypatch):
    """8 latents a token are asked for: 5 have a positive score, twice, then all 256."""
    generator = torch.Generator().manual_seed(0)
    few, many = -torch.rand(16, 256, generator=generator), torch.rand(16, 256, generator=generator)
    few[:, :5] *= -1
    sampled, original = [], BatchTopK._sampled_bar
    monkeypatch.setattr(BatchTopK, "_sampled_bar", lambda *asked: sampled.append(1) or original(*asked))
    sparsity, norms = BatchTopK(8), torch.ones(256)
    found = [sparsity.choose(limited(pre, norms)) for pre in (few, few, many)]
    assert [len(each) for each in found] == [80, 80, 128]
    assert torch.equal(found[2].scores.sort().values, many.flatten().topk(128).values.flip(0))
    assert len(sampled) == 2  # for the first batch, and for the third after a look that listed too many


def limited(pre, norms):
    scores = GivenScores(pre, norms)
    scores.limit = pre.numel() // 8
    return scores


def test_a_guess_far_too_low_costs_a_second_look_and_changes_nothing():
    made = [Crosscoder(8, 256, BatchTopK(8)) for _ in range(2)]
    made[0].sparsity.guess = 1e-9
    a, b = (next(steps_of(crosscoder)) for crosscoder in made)
    assert isinstance(a.codes, Codes)
    assert torch.equal(a.acts, b.acts)
