import numpy as np
import pytest
import reference
import torch

from tl_crosscoder.dictionary.codes import Codes
from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.dictionary.init import Init
from tl_crosscoder.dictionary.losses import L1, MSE, Progress
from tl_crosscoder.dictionary.normalizer import Normalizer
from tl_crosscoder.dictionary.sparsity import BatchTopK, ReLU, TopK
from tl_crosscoder.errors import ShapeMismatch

D_IN, D_SAE = 5, 12


def draw(batch=16, seed=3, dtype=torch.float32):
    return 2 + 3 * torch.randn(batch, 2, D_IN, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def normalizer():
    return Normalizer(torch.linspace(-1, 3, 2 * D_IN).view(2, D_IN), torch.tensor([0.5, 0.2]))


def random_crosscoder(sparsity=None, norms="sum", dtype=torch.float32, seed=4, encoder="sum"):
    """Random weights everywhere, and a threshold that leaves some latents on."""
    arguments = {"normalizer": normalizer(), "code_norm": norms, "encoder": encoder}
    crosscoder = Crosscoder(D_IN, D_SAE, sparsity or BatchTopK(3), **arguments)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in crosscoder.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    if isinstance(crosscoder.sparsity, BatchTopK):
        crosscoder.sparsity.threshold.fill_(4.0)
    return crosscoder.to(dtype)


def copy_of(crosscoder):
    other = Crosscoder.from_config(crosscoder.config).to(crosscoder.W_dec.dtype)
    other.load_state_dict(crosscoder.state_dict())
    return other.train(crosscoder.training)


def test_the_forward_pass_equals_the_loop_in_float64():
    crosscoder, x = random_crosscoder(dtype=torch.float64), draw(dtype=torch.float64)
    mean, scale = crosscoder.normalizer.mean.numpy(), crosscoder.normalizer.scale.numpy()
    W_enc, b_enc, W_dec, b_dec = (
        p.detach().numpy() for p in (crosscoder.W_enc, crosscoder.b_enc, crosscoder.W_dec, crosscoder.b_dec)
    )
    target = (x.numpy() - mean) * scale[:, None]
    pre = reference.encode(target, W_enc, b_enc)
    acts = reference.keep_largest(pre, reference.decoder_norms(W_dec).sum(1), 3 * len(x))
    estimate = reference.decode(acts, W_dec, b_dec)
    out = crosscoder(x)
    np.testing.assert_allclose(crosscoder.pre_acts(x).detach(), pre, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(out.acts.detach(), acts, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(out.target, target, rtol=1e-12)
    np.testing.assert_allclose(out.estimate.detach(), estimate, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(out.recon.detach(), estimate / scale[:, None] + mean, rtol=1e-12, atol=1e-12)


def test_encode_and_decode_are_the_two_halves_of_forward():
    crosscoder, x = random_crosscoder(dtype=torch.float64).eval(), draw(dtype=torch.float64)
    out = crosscoder(x)
    assert torch.equal(crosscoder.encode(x), out.acts)
    torch.testing.assert_close(crosscoder.decode(out.acts), out.recon, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("density", [0.0, 1.0])
def test_the_sparse_and_the_dense_step_have_the_same_gradients(monkeypatch, density):
    """MAX_DENSITY 0 makes every step dense, 1 every step sparse; both against autograd through the plain formula."""
    monkeypatch.setattr("tl_crosscoder.dictionary.crosscoder.MAX_DENSITY", density)
    crosscoder, plain, x = (
        random_crosscoder(dtype=torch.float64),
        random_crosscoder(dtype=torch.float64),
        draw(dtype=torch.float64),
    )
    weights, l1 = torch.randn(16, 2, D_IN, dtype=torch.float64), torch.rand(D_SAE, dtype=torch.float64)
    out = crosscoder(x)
    ((out.recon * weights).sum() + (out.acts @ l1).sum()).backward()
    y = plain.normalizer.normalise(x)
    pre = torch.einsum("bmd,mdj->bj", y, plain.W_enc) + plain.b_enc
    acts = pre * (out.acts != 0)
    recon = plain.normalizer.denormalise(torch.einsum("bj,jmd->bmd", acts, plain.W_dec) + plain.b_dec)
    ((recon * weights).sum() + (acts @ l1).sum()).backward()
    for a, b in zip(crosscoder.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-12, atol=1e-12)


def test_pre_activations_of_some_latents_are_those_of_all():
    crosscoder, x = random_crosscoder(dtype=torch.float64), draw(dtype=torch.float64)
    some = torch.tensor([7, 0, 3])
    torch.testing.assert_close(
        crosscoder.pre_acts(x, some), crosscoder.pre_acts(x)[:, some], rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("encoder", ["sum", "mean"])
def test_encoder_rows_tell_each_model_s_part_of_a_pre_activation(encoder):
    crosscoder, x = random_crosscoder(dtype=torch.float64, encoder=encoder), draw(dtype=torch.float64)
    some = torch.tensor([0, 3, 7])
    for one in (crosscoder, crosscoder.folded()):
        parts = torch.einsum("bmd,jmd->bjm", crosscoder.normalizer.normalise(x), one.encoder_rows(some))
        expected = crosscoder.pre_acts(x, some) - crosscoder.b_enc[some]
        torch.testing.assert_close(parts.sum(-1), expected, rtol=1e-6, atol=1e-6)


def test_sparse_codes_decode_to_the_same_reconstruction():
    crosscoder, x = random_crosscoder(dtype=torch.float64).eval(), draw(dtype=torch.float64)
    codes = crosscoder.encode_sparse(x)
    assert isinstance(codes, Codes)
    assert torch.equal(codes.dense(), crosscoder.encode(x))
    assert 0 < codes.l0 < D_SAE
    torch.testing.assert_close(crosscoder.decode(codes), crosscoder(x).recon, rtol=1e-12, atol=1e-12)


def started(**init):
    return Crosscoder(D_IN, D_SAE, ReLU(), init=Init(**init))


@pytest.mark.parametrize("directions", ["gaussian", "uniform"])
def test_it_starts_with_rows_of_the_asked_length_and_their_transpose_as_encoder(directions):
    crosscoder = started(norm=0.3, directions=directions)
    torch.testing.assert_close(crosscoder.decoder_norms(), torch.full((D_SAE, 2), 0.3))
    assert torch.equal(crosscoder.W_enc_rows, crosscoder.W_dec)
    assert torch.equal(crosscoder.W_dec[:, 0], crosscoder.W_dec[:, 1])
    untied = started(norm=0.3, directions=directions, transposed=False)
    assert torch.equal(untied.W_dec, crosscoder.W_dec)
    assert (untied.W_enc_rows != untied.W_dec).all()
    torch.testing.assert_close(untied.W_enc_rows.norm(dim=-1), torch.full((D_SAE, 2), 0.3))
    assert not torch.equal(started(seed=1).W_dec, started(seed=2).W_dec)


@pytest.mark.parametrize(
    ("same", "count"), [(True, 12), (False, 0), (1.0, 12), (0.0, 0), (0.25, 3), (1, 1), (5, 5)]
)
def test_the_first_latents_start_the_same_in_all_models(same, count):
    for rows in (started(same=same).W_dec, started(same=same, transposed=False).W_enc_rows):
        assert torch.equal(rows[:count, 0], rows[:count, 1])
        assert (rows[count:, 0] != rows[count:, 1]).all()


def test_uniform_directions_fill_a_cube():
    """In a square a direction at angle θ to an axis has the room 1 / 2cos²θ: within 15 degrees of a diagonal lies the share
    (tan 45 - tan 30) / tan 45 = .423.  Of Gaussian directions it is a third.
    """

    def near_a_diagonal(directions):
        crosscoder = Crosscoder(2, 20_000, ReLU(), init=Init(directions=directions))
        angle = torch.atan2(*crosscoder.W_dec[:, 0].abs().T)
        return ((angle - torch.pi / 4).abs() < torch.pi / 12).float().mean().item()

    assert near_a_diagonal("uniform") == pytest.approx(1 - 3**-0.5, abs=0.015)
    assert near_a_diagonal("gaussian") == pytest.approx(1 / 3, abs=0.015)


@pytest.mark.parametrize(
    ("init", "reason"),
    [
        ({"norm": 0.0}, "above 0, got 0.0"),
        ({"norm": float("inf")}, "got inf"),
    ],
)
def test_impossible_starts_are_refused(init, reason):
    with pytest.raises(ValueError, match=reason):
        Init(**init)


def test_W_enc_is_a_view_of_the_latent_major_rows():
    crosscoder = Crosscoder(D_IN, D_SAE, ReLU())
    assert crosscoder.W_enc.shape == (2, D_IN, D_SAE)
    assert crosscoder.W_enc.data_ptr() == crosscoder.W_enc_rows.data_ptr()


@pytest.mark.parametrize("sparsity", [BatchTopK(3), TopK(3), ReLU()])
def test_stretching_the_encoder_against_the_decoder_changes_nothing(sparsity):
    crosscoder, x = random_crosscoder(sparsity, dtype=torch.float64), draw(dtype=torch.float64)
    other = copy_of(crosscoder)
    c = torch.linspace(0.2, 5, D_SAE, dtype=torch.float64)
    with torch.no_grad():
        other.W_enc_rows.mul_(c[:, None, None])
        other.b_enc.mul_(c)
        other.W_dec.div_(c[:, None, None])
    progress = Progress(5, 10, 0, torch.zeros(D_SAE, dtype=torch.int64))
    a, b = crosscoder(x), other(x)
    torch.testing.assert_close(a.recon, b.recon, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(a.acts * c, b.acts, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(
        L1(1.0)(x, a, crosscoder, progress), L1(1.0)(x, b, other, progress), rtol=1e-12, atol=0
    )
    ratio = [n.decoder_norms()[:, 1] / n.decoder_norms()[:, 0] for n in (crosscoder, other)]
    torch.testing.assert_close(*ratio, rtol=1e-12, atol=0)


def test_permuting_latents_permutes_the_codes():
    crosscoder, x = random_crosscoder(dtype=torch.float64).eval(), draw(dtype=torch.float64)
    other, order = copy_of(crosscoder), torch.randperm(D_SAE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for name in ("W_enc_rows", "b_enc", "W_dec"):
            getattr(other, name).copy_(getattr(crosscoder, name)[order])
    torch.testing.assert_close(other.encode(x), crosscoder.encode(x)[:, order], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(other(x).recon, crosscoder(x).recon, rtol=1e-12, atol=1e-12)


def test_swapping_the_models_mirrors_everything():
    crosscoder, x = random_crosscoder(dtype=torch.float64).eval(), draw(dtype=torch.float64)
    other = copy_of(crosscoder)
    with torch.no_grad():
        for part in (other.W_enc_rows, other.W_dec):
            part.copy_(part.flip(1))
        other.b_dec.copy_(other.b_dec.flip(0))
        other.normalizer.mean.copy_(other.normalizer.mean.flip(0))
        other.normalizer.scale.copy_(other.normalizer.scale.flip(0))
    torch.testing.assert_close(other.encode(x.flip(1)), crosscoder.encode(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(other(x.flip(1)).recon.flip(1), crosscoder(x).recon, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(other.decoder_norms().flip(1), crosscoder.decoder_norms())


def test_eval_codes_do_not_depend_on_batch_mates():
    crosscoder, x = random_crosscoder(dtype=torch.float64).eval(), draw(64, dtype=torch.float64)
    alone = torch.cat([crosscoder.encode(row[None]) for row in x])
    torch.testing.assert_close(crosscoder.encode(x), alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("norms", "encoder"), [("sum", "sum"), ("l2", "mean"), ("none", "sum")])
@pytest.mark.parametrize("sparsity", [BatchTopK(3), TopK(3), ReLU()])
def test_folding_changes_nothing(sparsity, norms, encoder):
    crosscoder, x = random_crosscoder(sparsity, norms, encoder=encoder).eval(), draw()
    folded = crosscoder.folded()
    a, b = crosscoder(x), folded(x)
    assert torch.equal(folded.normalizer.scale, torch.ones(2))
    for field in ("acts", "target", "estimate", "recon"):
        torch.testing.assert_close(getattr(a, field), getattr(b, field), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(crosscoder.decoder_norms(), folded.decoder_norms(), rtol=1e-6, atol=0)
    torch.testing.assert_close(crosscoder.decoder_rows(), folded.decoder_rows(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(crosscoder.raw_rows(), folded.raw_rows(), rtol=1e-6, atol=1e-7)
    progress = Progress(5, 10, 0, torch.zeros(D_SAE, dtype=torch.int64))
    for loss in (MSE(), L1(1.0)):
        torch.testing.assert_close(
            loss(x, a, crosscoder, progress), loss(x, b, folded, progress), rtol=1e-5, atol=1e-5
        )
    with pytest.raises(ValueError, match="folded already"):
        folded.folded()


def test_code_norms_by_hand():
    crosscoder = Crosscoder(2, 1, ReLU())
    with torch.no_grad():
        crosscoder.W_dec.copy_(torch.tensor([[[3.0, 0.0], [0.0, 4.0]]]))
    expected = {"sum": 7, "l2": 5, "none": 1}
    for name, value in expected.items():
        crosscoder.code_norm = name
        assert crosscoder.selection_norms().item() == value


@pytest.mark.parametrize("density", [0.0, 1.0])
def test_a_mean_encoder_is_a_sum_encoder_with_half_the_weights(monkeypatch, density):
    """And so are its gradients, by the chain rule: half of those with respect to the halved weights."""
    monkeypatch.setattr("tl_crosscoder.dictionary.crosscoder.MAX_DENSITY", density)
    mean, x = random_crosscoder(TopK(3), dtype=torch.float64, encoder="mean"), draw(dtype=torch.float64)
    halved = random_crosscoder(TopK(3), dtype=torch.float64)
    with torch.no_grad():
        halved.W_enc_rows.div_(2)
    a, b = mean(x), halved(x)
    torch.testing.assert_close(a.acts, b.acts, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(mean.pre_acts(x), halved.pre_acts(x), rtol=1e-12, atol=1e-12)
    some = torch.tensor([1, 4, 9])
    torch.testing.assert_close(mean.pre_acts(x, some), halved.pre_acts(x)[:, some], rtol=1e-12, atol=1e-12)
    for out in (a, b):
        (out.estimate - out.target).square().sum().backward()
    torch.testing.assert_close(mean.W_enc_rows.grad, halved.W_enc_rows.grad / 2, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(mean.b_enc.grad, halved.b_enc.grad, rtol=1e-12, atol=1e-12)


def test_identical_models_give_a_mean_encoder_one_model_s_pre_activations():
    """W_enc the same for both, x the same: (W x + W x) / 2 + b = W x + b."""
    crosscoder = Crosscoder(D_IN, D_SAE, ReLU(), encoder="mean")
    x = draw()[:, :1].expand(-1, 2, -1)
    one = Crosscoder(D_IN, D_SAE, ReLU(), n_models=1)
    torch.testing.assert_close(crosscoder.pre_acts(x), one.pre_acts(x[:, :1]))


def test_with_one_model_it_is_a_sparse_autoencoder():
    """x = (3, 0) and (0, -2): of unit latents e1, -e2 the first gets 3, the second 2, and both come back whole."""
    crosscoder = Crosscoder(2, 2, TopK(1), n_models=1)
    with torch.no_grad():
        for rows in (crosscoder.W_dec, crosscoder.W_enc_rows):
            rows.copy_(torch.tensor([[[1.0, 0.0]], [[0.0, -1.0]]]))
    x = torch.tensor([[[3.0, 0.0]], [[0.0, -2.0]]])
    out = crosscoder(x)
    assert out.acts.tolist() == [[3, 0], [0, 2]]
    assert torch.equal(out.recon, x)
    assert crosscoder.decoder_norms().tolist() == [[1], [1]]
    folded = Crosscoder(2, 2, TopK(1), n_models=1, normalizer=Normalizer(x.mean(0), torch.tensor([3.0])))
    torch.testing.assert_close(folded.folded()(x).recon, folded(x).recon)


def test_config_and_from_config_are_inverses():
    crosscoder = random_crosscoder(norms="l2", encoder="mean").folded()
    assert Crosscoder.from_config(crosscoder.config).config == crosscoder.config
    with pytest.raises(ValueError, match="no setting 'd_hidden'"):
        Crosscoder.from_config({**crosscoder.config, "d_hidden": 4})
    with pytest.raises(ValueError, match="'folded' is missing"):
        Crosscoder.from_config({k: v for k, v in crosscoder.config.items() if k != "folded"})


def test_swapped_axes_are_named():
    crosscoder, x = random_crosscoder(), draw()
    with pytest.raises(
        ShapeMismatch,
        match=r"encode wants \[batch, model=2, d_in=5\], got \[16, 5, 2\]; axes 1 and 2 look swapped",
    ):
        crosscoder.encode(x.mT)
    with pytest.raises(ShapeMismatch, match=r"forward wants \[batch, model=2, d_in=5\], got \[16, 2, 4\]\."):
        crosscoder(x[..., :4])


def test_half_precision_activations_are_read_in_the_weights_dtype():
    crosscoder, x = random_crosscoder().eval(), draw().bfloat16()
    assert torch.equal(crosscoder.encode(x), crosscoder.encode(x.float()))


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ((0, 4, 2), "d_in=0"),
        ((4, 0, 2), "d_sae=0"),
        ((4, 4, 0), "n_models=0"),
    ],
)
def test_impossible_sizes_are_refused(sizes, reason):
    d_in, d_sae, n_models = sizes
    with pytest.raises(ValueError, match=reason):
        Crosscoder(d_in, d_sae, ReLU(), n_models=n_models)


def test_a_normaliser_of_another_shape_is_refused():
    with pytest.raises(ShapeMismatch, match=r"\[model=2, d_in=7\], got \[2, 5\]"):
        Crosscoder(7, 4, ReLU(), normalizer=normalizer())


def test_a_dead_latent_with_zero_decoders_has_norm_zero_and_never_fires():
    crosscoder, x = random_crosscoder(), draw()
    with torch.no_grad():
        crosscoder.W_dec[2] = 0
    assert crosscoder.decoder_norms()[2].tolist() == [0, 0]
    assert not crosscoder(x).acts[:, 2].any()


@pytest.mark.parametrize("method", ["forward", "encode", "encode_sparse"])
def test_activations_on_another_device_are_refused_with_both_remedies(method):
    crosscoder, x = random_crosscoder().eval(), draw()
    remedy = r"x is on meta and the weights are on cpu; pass x\.to\('cpu'\) or crosscoder\.to\('meta'\)"
    with pytest.raises(ValueError, match=remedy):
        getattr(crosscoder, method)(x.to("meta"))
    with pytest.raises(ValueError, match="x is on cpu and the weights are on meta"):
        getattr(crosscoder.to("meta"), method)(x)


def test_the_start_is_drawn_on_the_cpu_whatever_the_default_device():
    init = Init(same=False, seed=3, transposed=False)
    expected = init.rows(4, 2, 3)
    with torch.device("meta"):
        found = init.rows(4, 2, 3)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_crosscoders_of_the_same_parts_do_not_change_one_another():
    sparsity, units, x = BatchTopK(3), normalizer(), draw(dtype=torch.float32)
    one, other = (Crosscoder(D_IN, D_SAE, sparsity, normalizer=units) for _ in range(2))
    one.sparsity.threshold.fill_(0.4)
    one.eval()
    codes = one.encode(x)
    other(7 * x)  # trains its threshold
    few = one.restricted(torch.arange(3))
    for changed in (other, few):
        changed.double()
    assert one.sparsity.threshold == 0.4
    assert torch.equal(one.encode(x), codes)
    assert sparsity.threshold == -1 and units.mean.dtype == normalizer().mean.dtype


def test_it_tells_its_sizes():
    said = repr(Crosscoder(D_IN, D_SAE, BatchTopK(3, k_max=6, k_anneal_steps=9), encoder="mean"))
    assert f"d_in={D_IN}, d_sae={D_SAE}, n_models=2, code_norm='sum', encoder='mean'\n" in said
    assert "BatchTopK(k=3, k_max=6, k_anneal_steps=9, threshold_start=0.5, threshold_decay=0.99)" in said
    apart = Crosscoder(D_IN, D_SAE, BatchTopK(3), code_norm="decoupled")
    assert "code_norm='decoupled'" in repr(apart) and repr(apart).count("BatchTopK(k=3") == 2


def test_the_parts_of_a_crosscoder_come_to_its_device():
    parts = BatchTopK(3), normalizer()
    with torch.device("meta"):
        crosscoder = Crosscoder(D_IN, D_SAE, parts[0], normalizer=parts[1])
    assert {tensor.device.type for tensor in crosscoder.state_dict().values()} == {"meta"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_default_device_gives_the_same_start_there():
    with torch.device("cuda"):
        there = Crosscoder(D_IN, D_SAE, BatchTopK(3), normalizer=normalizer())
    here = Crosscoder(D_IN, D_SAE, BatchTopK(3), normalizer=normalizer())
    assert there(draw().cuda()).recon.device.type == "cuda"
    assert torch.equal(there.W_dec.cpu(), here.W_dec)
