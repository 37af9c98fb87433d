from dataclasses import replace

import numpy as np
import pytest
import reference
import torch

from tl_crosscoder.dictionary.codes import DenseCodes
from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.dictionary.losses import L1, LOSSES, MSE, AuxK, L2Norm, Progress
from tl_crosscoder.dictionary.sparsity import BatchTopK, ReLU, TopK


def progress(d_sae, silent=(), step=50, steps=100):
    since = torch.zeros(d_sae, dtype=torch.int64)
    since[list(silent)] = 1_000
    return Progress(step, steps, 0, since)


def random_crosscoder(sparsity, d_in=3, d_sae=7, n_models=2, dtype=torch.float64):
    crosscoder = Crosscoder(d_in, d_sae, sparsity, n_models=n_models).to(dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in crosscoder.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=dtype))
    return crosscoder


def draw(batch=5, n_models=2, d_in=3, seed=2):
    return torch.randn(
        batch, n_models, d_in, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


@pytest.fixture
def by_hand():
    """d_in 2, two latents, two tokens; encoder and decoder are the unit vectors, doubled for tuned's first latent.

    x = [[(1, 0), (2, 0)], [(0, 3), (0, 3)]].  Pre-activations: token 0: (1·1 + 2·2, 0) = (5, 0); token 1: (0, 3 + 3) = (0, 6).
    Estimates: token 0: base (5, 0), tuned (10, 0); token 1: both (0, 6).
    Errors x - estimate: base (-4, 0), tuned (-8, 0); (0, -3) twice.  Norms of the decoders: latent 0: 1, 2; latent 1: 1, 1.
    """
    crosscoder = Crosscoder(2, 2, ReLU())
    with torch.no_grad():
        rows = torch.eye(2)[:, None].repeat(1, 2, 1)
        rows[0, 1] *= 2
        crosscoder.W_dec.copy_(rows)
        crosscoder.W_enc_rows.copy_(rows)
    return crosscoder, torch.tensor([[[1.0, 0.0], [2.0, 0.0]], [[0.0, 3.0], [0.0, 3.0]]])


@pytest.mark.parametrize(
    ("loss", "value"),
    [
        (MSE(), (16 + 64 + 9 + 9) / 2),
        (L2Norm(), (4 + 8 + 3 + 3) / 4),
        (L1(0.5), 0.5 * (5 * 3 + 6 * 2) / 2),
        (L1(0.5, norm="joint"), 0.5 * (5 * 5**0.5 + 6 * 2**0.5) / 2),
    ],
)
def test_losses_by_hand(by_hand, loss, value):
    crosscoder, x = by_hand
    assert loss(x, crosscoder(x), crosscoder, progress(2)).item() == pytest.approx(value, rel=1e-6)


def test_gradients_by_hand(by_hand):
    """dMSE/db_dec^m = -mean_n 2 e^m: base (-½·2·(-4), -½·2·(-3)) = (4, 3), tuned (8, 3); dL2Norm/db_dec = -mean e/‖e‖ = ¼ each."""
    crosscoder, x = by_hand
    MSE()(x, crosscoder(x), crosscoder, progress(2)).backward()
    assert crosscoder.b_dec.grad.tolist() == [[4, 3], [8, 3]]
    crosscoder.zero_grad()
    L2Norm()(x, crosscoder(x), crosscoder, progress(2)).backward()
    torch.testing.assert_close(crosscoder.b_dec.grad, torch.full((2, 2), 0.25))


@pytest.mark.parametrize("norm", ["sum", "joint"])
def test_losses_equal_the_loops_in_float64(norm):
    crosscoder, x = random_crosscoder(BatchTopK(3)), draw()
    out = crosscoder(x)
    target, estimate, acts = (t.detach().numpy() for t in (out.target, out.estimate, out.acts))
    W_dec = crosscoder.W_dec.detach().numpy()
    np.testing.assert_allclose(
        MSE()(x, out, crosscoder, progress(7)).item(), reference.mse(target, estimate), rtol=1e-12
    )
    np.testing.assert_allclose(
        L2Norm()(x, out, crosscoder, progress(7)).item(), reference.l2_norm(target, estimate), rtol=1e-12
    )
    l1 = L1(0.3, norm=norm)(x, out, crosscoder, progress(7)).item()
    np.testing.assert_allclose(l1, 0.3 * reference.l1(acts, W_dec, norm), rtol=1e-12)


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize(("k_aux", "k"), [(2, 2), (None, 1), (9, 3)])
def test_auxk_equals_the_loop_in_float64(relative, k_aux, k):
    crosscoder, x, dead = random_crosscoder(BatchTopK(2)), draw(), [1, 4, 6]
    out = crosscoder(x)
    loss = AuxK(weight=1.0, k_aux=k_aux, dead_after_tokens=1_000, relative=relative)
    expected = reference.auxk(
        *(t.detach().numpy() for t in (out.target, out.estimate, crosscoder.pre_acts(x), crosscoder.W_dec)),
        dead,
        k,
        relative,
    )
    np.testing.assert_allclose(loss(x, out, crosscoder, progress(7, dead)).item(), expected, rtol=1e-12)


def test_auxk_moves_dead_latents_only():
    crosscoder, x, dead = random_crosscoder(BatchTopK(2)), draw(), [1, 4, 6]
    AuxK(dead_after_tokens=1_000, k_aux=2)(x, crosscoder(x), crosscoder, progress(7, dead)).backward()
    living = [0, 2, 3, 5]
    assert crosscoder.b_dec.grad is None
    for parameter in (crosscoder.W_dec, crosscoder.W_enc_rows, crosscoder.b_enc):
        assert not parameter.grad[living].any()
        assert parameter.grad[dead].any()


def test_auxk_is_zero_while_everything_lives():
    crosscoder, x = random_crosscoder(BatchTopK(2)), draw()
    assert AuxK(dead_after_tokens=1_000)(x, crosscoder(x), crosscoder, progress(7)).item() == 0


def test_relative_auxk_of_a_perfect_reconstruction_is_zero_not_nan():
    crosscoder = Crosscoder(2, 3, ReLU())
    x = torch.zeros(4, 2, 2)
    loss = AuxK(dead_after_tokens=1_000, relative=True)(x, crosscoder(x), crosscoder, progress(3, [0]))
    assert loss.item() == 0


def test_l1_rises_from_zero_over_its_warmup(by_hand):
    crosscoder, x = by_hand
    values = [
        L1(1.0, warmup_fraction=0.5)(x, crosscoder(x), crosscoder, progress(2, step=s)).item()
        for s in (0, 25, 50, 99)
    ]
    assert values == pytest.approx([0, 6.75, 13.5, 13.5])


def test_the_unsquared_loss_has_a_finite_gradient_at_a_perfect_reconstruction():
    crosscoder = Crosscoder(2, 3, ReLU())
    x = torch.zeros(4, 2, 2)
    L2Norm()(x, crosscoder(x), crosscoder, progress(3)).backward()
    assert all(p.grad.isfinite().all() for p in crosscoder.parameters())


def test_the_joint_penalty_is_an_sae_on_the_concatenation():
    """Two models of width 3 and an SAE of width 6, written out, with the same numbers: the same losses."""
    crosscoder, x = random_crosscoder(ReLU()), draw()
    W_enc, W_dec, y = crosscoder.W_enc_rows.reshape(7, 6), crosscoder.W_dec.reshape(7, 6), x.reshape(5, 6)
    acts = (y @ W_enc.T + crosscoder.b_enc).relu()
    error = y - (acts @ W_dec + crosscoder.b_dec.flatten())
    sae = {"mse": error.square().sum(1).mean(), "l1": 0.1 * (acts @ W_dec.norm(dim=1)).mean()}
    for loss in (MSE(), L1(0.1, norm="joint", warmup_fraction=0.0)):
        value = loss(x, crosscoder(x), crosscoder, progress(7)).item()
        assert value == pytest.approx(sae[loss.name].item(), rel=1e-12)


def test_what_decoupling_costs_under_each_penalty():
    """Code 2, norms p = 1 (base) and q = 3 (tuned): one shared latent, or one latent for each model.

    Sum of norms: 2·(1 + 3) = 8 either way.  Joint: 2·√10 = 6.32 shared, 2·1 + 2·3 = 8 split.  L0: 1 or 2.
    """
    rows = torch.zeros(3, 2, 2)
    rows[0, 0, 0], rows[0, 1, 0] = 1, 3
    rows[1, 0, 0], rows[2, 1, 0] = 1, 3
    crosscoder = Crosscoder(2, 3, ReLU())
    with torch.no_grad():
        crosscoder.W_dec.copy_(rows)
    x = torch.zeros(1, 2, 2)

    def cost(norm, *active):
        out = crosscoder(x)
        acts = torch.zeros(1, 3)
        acts[0, list(active)] = 2.0
        out = replace(out, codes=DenseCodes(acts))
        assert torch.equal(
            crosscoder.decode(torch.tensor([[2.0, 0, 0]])), crosscoder.decode(torch.tensor([[0, 2.0, 2.0]]))
        )
        return L1(1.0, norm=norm)(x, out, crosscoder, progress(3)).item()

    assert (cost("sum", 0), cost("sum", 1, 2)) == (8, 8)
    assert (cost("joint", 0), cost("joint", 1, 2)) == (pytest.approx(2 * 10**0.5), 8)


@pytest.mark.parametrize("sparsity", [ReLU(), TopK(3), BatchTopK(3)])
@pytest.mark.parametrize(
    "loss", [MSE(), L2Norm(), L1(0.3), L1(0.3, norm="joint"), AuxK(dead_after_tokens=1_000, k_aux=2)]
)
def test_every_loss_passes_a_numerical_gradient_check(sparsity, loss):
    crosscoder, x = random_crosscoder(sparsity), draw()
    names, values = zip(
        *[(n, p.detach().clone().requires_grad_()) for n, p in crosscoder.named_parameters()], strict=True
    )
    detached = loss.name == "auxk"  # its residual is a constant: hold it fixed for the numerical side too
    fixed = crosscoder(x)

    def value(*parameters):
        out = torch.func.functional_call(crosscoder, dict(zip(names, parameters, strict=True)), (x,))
        if detached:
            out = replace(out, target=fixed.target, estimate=fixed.estimate)
        with torch.nn.utils.stateless._reparametrize_module(
            crosscoder, dict(zip(names, parameters, strict=True))
        ):
            return loss(x, out, crosscoder, progress(7, [1, 4, 6]))

    assert torch.autograd.gradcheck(value, values)


@pytest.mark.parametrize("loss", [MSE(), L2Norm(), L1(0.3, "joint", 0.1), AuxK(0.1, 5, 70, True)])
def test_describe_and_build_are_inverses(loss):
    assert LOSSES.build(LOSSES.describe(loss)) == loss


def test_relative_auxk_of_a_single_token_has_a_finite_gradient():
    crosscoder = random_crosscoder(BatchTopK(2))
    x = draw()[:1]
    loss = AuxK(dead_after_tokens=1_000, relative=True)(x, crosscoder(x), crosscoder, progress(7, [1, 4]))
    assert loss.item() == 0
    loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in crosscoder.parameters())


@pytest.mark.parametrize("k_aux", [0, -1])
def test_no_dead_latents_to_choose_is_refused(k_aux):
    with pytest.raises(ValueError, match=f"got {k_aux}"):
        AuxK(k_aux=k_aux)
