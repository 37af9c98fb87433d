import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tl_crosscoder.dictionary.scores import Crowded, ExactScores, GivenScores
from tl_crosscoder.dictionary.screening import ScreenedScores

KINDS = [ExactScores, ScreenedScores]


def draw(batch=40, n=24, d_sae=70, seed=0, whole=False):
    """Activations, encoder rows, bias and norms; ``whole``: small whole numbers, whose sums float32 holds exactly."""
    generator = torch.Generator().manual_seed(seed)
    x, rows = (torch.randn(size, n, generator=generator) for size in (batch, d_sae))
    bias, norms = torch.randn(d_sae, generator=generator), torch.rand(d_sae, generator=generator) + 0.1
    if whole:
        x, rows, bias = (3 * x).round(), (3 * rows).round(), (9 * bias).round()
        norms = torch.randint(0, 4, (d_sae,), generator=generator).float()
    return x, rows, bias, norms


def above(x, rows, bias, norms, bar):
    """The pairs above the bar, from sorting out the whole matrix in float64."""
    pre = x.double().numpy() @ rows.double().numpy().T + bias.double().numpy()
    scores = np.maximum(pre, 0) * norms.double().numpy()
    latents, tokens = np.nonzero((scores > np.broadcast_to(bar, scores.shape)).T)
    return tokens, latents, pre[tokens, latents]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    bar=st.sampled_from([0.0, 1.0, 4.0, 9.0, 30.0, 1e6]),
    kind=st.sampled_from(KINDS),
)
def test_every_pair_above_the_bar_is_found_and_no_other_ties_included(seed, bar, kind):
    """Whole numbers: every score is exact, and many lie exactly on the bar."""
    data = draw(seed=seed, whole=True)
    found = kind(*data).above(bar)
    tokens, latents, pre = above(*data, bar)
    assert found.tokens.tolist() == tokens.tolist()
    assert found.latents.tolist() == latents.tolist()
    assert found.pre_acts.tolist() == pre.tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_a_bar_for_each_latent(kind):
    data = draw(seed=1, whole=True)
    bar = torch.arange(70.0) % 7
    found = kind(*data).above(bar)
    tokens, latents, _ = above(*data, bar.numpy()[None])
    assert (found.tokens.tolist(), found.latents.tolist()) == (tokens.tolist(), latents.tolist())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_pre_activations_are_those_of_full_precision(kind, scale):
    x, rows, bias, norms = draw(seed=2)
    found = kind(scale * x, rows, scale * bias, norms).above(scale * 2.0)
    exact = scale * (x.double() @ rows.double().T + bias.double())[found.tokens, found.latents]
    torch.testing.assert_close(found.pre_acts.double(), exact, rtol=1e-5, atol=scale * 1e-5)
    assert len(found) > 100


def test_a_pair_that_rounding_hides_is_still_found():
    """1 + 2⁻⁸ − 2⁻²³ rounds down to 1: 64 such products lose half of a bar that only they reach.

    The exact score is 64 · (1 + 2⁻⁸)² ≈ 64.501 > 64.4; the product of the rounded numbers is 64.
    """
    value = 1 + 2.0**-8 - 2.0**-23
    x, rows = torch.full((1, 64), value), torch.full((3, 64), value)
    rows[0], rows[2] = 0, -value
    rounded = x.bfloat16().float() @ rows.bfloat16().float().T
    assert rounded[0, 1] == 64
    found = ScreenedScores(x, rows, torch.zeros(3), torch.ones(3)).above(64.4)
    assert (found.tokens.tolist(), found.latents.tolist()) == ([0], [1])


@pytest.mark.parametrize("seed", range(5))
def test_the_bound_holds_for_every_pair_of_a_hard_draw(seed):
    """Tokens of lengths from 10⁻³ to 10³: a bar just below each pair's own score must let that pair pass."""
    x, rows, bias, norms = draw(batch=30, n=90, d_sae=50, seed=seed)
    x *= torch.logspace(-3, 3, 30)[:, None]
    exact = (x.double() @ rows.double().T + bias.double()).relu() * norms
    for token in range(30):
        latent = int(exact[token].argmax())
        bar = float(exact[token, latent]) * (1 - 1e-6)
        found = ScreenedScores(x, rows, bias, norms).above(bar)
        assert (token, latent) in set(zip(found.tokens.tolist(), found.latents.tolist(), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_of_latents_give_what_one_block_gives(kind, monkeypatch):
    data = draw(batch=40, d_sae=200, seed=3, whole=True)
    whole = kind(*data).above(5.0)
    monkeypatch.setattr("tl_crosscoder.dictionary.scores.BLOCK_BYTES", 1)
    parts = kind(*data).above(5.0)
    assert torch.equal(whole.tokens, parts.tokens)
    assert torch.equal(whole.latents, parts.latents)
    assert torch.equal(whole.pre_acts, parts.pre_acts)


@pytest.mark.parametrize("kind", KINDS)
def test_more_pairs_than_the_limit_are_refused(kind):
    data = draw(whole=True)
    n = len(kind(*data).above(5.0))
    assert len(kind(*data, limit=n).above(5.0)) == n
    with pytest.raises(Crowded):
        kind(*data, limit=n - 1).above(5.0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_latent_without_decoders_is_never_found(kind):
    x, rows, bias, norms = draw()
    norms[7] = 0
    for bar in (0.0, 1.0):
        assert 7 not in kind(x, rows, bias, norms).above(bar).latents.tolist()


def test_given_scores_are_found_in_the_same_order():
    x, rows, bias, norms = draw(whole=True)
    given_scores, exact = (
        GivenScores(x @ rows.T + bias, norms).above(5.0),
        ExactScores(x, rows, bias, norms).above(5.0),
    )
    assert torch.equal(given_scores.tokens, exact.tokens)
    assert torch.equal(given_scores.latents, exact.latents)
