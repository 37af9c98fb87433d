import math
from dataclasses import replace

import pytest
import torch

from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.dictionary.losses import L1, AuxK, Delta
from tl_crosscoder.dictionary.normalizer import Normalizer
from tl_crosscoder.dictionary.partition import Partition
from tl_crosscoder.dictionary.synthetic import SyntheticPair
from tl_crosscoder.training.recipes import PRESETS, recipe
from tl_crosscoder.training.train import train

PAIR = SyntheticPair(d_in=21, n_shared=12, n_weak=3, n_base=4, n_tuned=4, n_decoupled=2, p=0.08)
D_SAE, BATCH, STEPS = 60, 64, 30
#: d_sae, batch, steps, lr, warm-up steps, decay, k, steps of annealing
PUBLISHED = {
    "minder_l1": (73_728, 2048, 97_656, 1e-4, 1000, 0.0, None, 0),
    "minder_batchtopk": (73_728, 2048, 97_656, 1e-4, 1000, 0.0, 100, 0),
    "kissane_l1": (16_384, 4096, 97_656, 5e-5, 0, 0.2, None, 0),
    "papergrade": (73_728, 4096, 24_414, 1e-4, 1000, 0.2, 100, 5000),
    "delta": (11_520, 4096, 50_000, 1e-4, 1000, 0.0, 600, 0),
    "dsf": (16_384, 4096, 97_656, 5e-5, 0, 0.2, None, 0),
    "dfc": (131_072, 2048, 100_000, 1e-4, 1000, 0.0, 200, 5000),
}


def small(name, steps=STEPS, **settings):
    k = None if PRESETS[name].k is None else 6
    return recipe(name, PAIR.d_in, d_sae=D_SAE, tokens=steps * BATCH, batch_size=BATCH, k=k, **settings)


def run(chosen, seed=0, lr=1e-2):
    """The recipe on the planted pair, with a step size for a short run."""
    crosscoder = chosen.crosscoder(chosen.normalizer(PAIR.batches(BATCH, seed)))
    config = replace(chosen.config, lr=lr, progress=False, log_every=chosen.config.steps // 3)
    return crosscoder, train(crosscoder, PAIR.batches(BATCH, seed), chosen.losses, config)


@pytest.fixture(scope="module")
def trained():
    runs = {}

    def get(name):
        if name not in runs:
            runs[name] = run(small(name))
        return runs[name]

    return get


def test_there_is_a_preset_of_each_name():
    assert list(PRESETS) == list(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_left_alone_a_recipe_has_the_published_figures(name):
    d_sae, batch, steps, lr, warmup, decay, k, annealed = PUBLISHED[name]
    chosen = recipe(name, 2304)
    sparsity, config = chosen.settings["sparsity"], chosen.config
    assert (chosen.settings["d_sae"], chosen.batch_size, config.steps) == (d_sae, batch, steps)
    assert (config.lr, config.warmup_steps, config.decay_fraction) == (lr, warmup, decay)
    assert (sparsity.k_now, getattr(sparsity, "k_anneal_steps", 0)) == (k, annealed)
    for loss in chosen.losses:
        if isinstance(loss, AuxK):
            assert loss.dead_after_tokens == 10_000_000


def test_the_two_parts_of_delta_have_their_published_ks():
    sparsity = recipe("delta", 2304).settings["sparsity"]
    assert (sparsity.n_first, sparsity.first.k, sparsity.rest.k) == (0.2, 400, 200)


def test_annealing_starts_at_the_published_multiple_of_k():
    assert recipe("papergrade", 2304).settings["sparsity"].k_max == 1000
    assert recipe("dfc", 2304).settings["sparsity"].k_max == 1000
    assert recipe("dfc", 2304, k=8, d_sae=30).settings["sparsity"].k_max == 30  # no more than there are


def test_counts_of_steps_and_tokens_keep_their_share_of_a_smaller_run():
    """A tenth of the tokens in batches of 1024 are 9,765 steps, 1000 / 24,414 of which warm up and 5000 / 24,414 anneal."""
    chosen = recipe("papergrade", 2304, tokens=10_000_000, batch_size=1024)
    sparsity, steps = chosen.settings["sparsity"], chosen.config.steps
    assert steps == 9765
    assert chosen.config.warmup_steps == round(1000 / 24_414 * 9765)
    assert sparsity.k_anneal_steps == round(5000 / 24_414 * 9765)
    assert sparsity.threshold_start == pytest.approx(1000 / 24_414, rel=1e-3)
    assert 1 / (1 - sparsity.threshold_decay) == pytest.approx(1000 / 24_414 * 9765, rel=1e-2)
    dead = recipe("minder_batchtopk", 2304, tokens=20_000_000).losses[1].dead_after_tokens
    assert dead == pytest.approx(1_000_000, rel=1e-3)
    assert recipe("minder_batchtopk", 2304, tokens=20_000).losses[1].dead_after_tokens == 10_000


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_recipe_trains(trained, name):
    crosscoder, history = trained(name)
    assert len(history.rows) == 3
    assert all(math.isfinite(row["loss"]) for row in history.rows)
    assert history.rows[-1]["fve_base"] > history.rows[0]["fve_base"]
    assert all(p.isfinite().all() for p in crosscoder.parameters())
    out = crosscoder(
        PAIR.sample(256, seed=5).x
    )  # in evaluation mode, so with a threshold where one is needed
    assert out.codes.n_active > 0
    assert Crosscoder.from_config(crosscoder.config).config == crosscoder.config


@pytest.mark.parametrize("name", [name for name in PUBLISHED if PRESETS[name].k])
def test_recipes_with_k_end_with_k_latents_active(trained, name):
    crosscoder, _ = trained(name)
    assert crosscoder.train()(PAIR.sample(BATCH, seed=3).x).codes.n_active == 6 * BATCH
    crosscoder.eval()


def test_shared_decoders_of_dsf_are_the_same_to_the_bit(trained):
    crosscoder, _ = trained("dsf")
    rows = crosscoder.W_dec.detach()
    n = D_SAE // 10
    assert torch.equal(rows[:n, 0], rows[:n, 1])
    assert (rows[n:, 0] != rows[n:, 1]).all()
    norms = crosscoder.decoder_norms().detach()
    assert torch.equal(norms[:n, 0], norms[:n, 1])
    assert (rows[:n] - small("dsf").crosscoder(crosscoder.normalizer).W_dec[:n]).abs().max() > 1e-3


def test_the_shared_latents_of_dsf_are_cheaper():
    (l1,) = [loss for loss in small("dsf").losses if isinstance(loss, L1)]
    assert (l1.shared, l1.shared_factor) == (small("dsf").settings["partition"].shared, 0.15)


def test_dedicated_latents_of_dfc_are_exactly_zero_in_the_other_model(trained):
    crosscoder, _ = trained("dfc")
    n = D_SAE // 20
    assert crosscoder.partition == Partition(base=0.05, tuned=0.05)
    for rows in (crosscoder.W_dec.detach(), crosscoder.W_enc_rows.detach()):
        assert not rows[:n, 1].any()
        assert not rows[n : 2 * n, 0].any()
        assert (rows[:n, 0].any(-1) & rows[n : 2 * n, 1].any(-1)).all()
        assert rows[2 * n :].all()


def test_delta_starts_apart_where_latents_are_not_shared_and_chooses_them_apart():
    chosen = small("delta")
    crosscoder = chosen.crosscoder(chosen.normalizer(PAIR.batches(BATCH)))
    n = D_SAE // 5
    assert torch.equal(crosscoder.W_dec[:n, 0], crosscoder.W_dec[:n, 1])
    assert (crosscoder.W_dec[n:, 0] != crosscoder.W_dec[n:, 1]).all()
    assert crosscoder.encoder == "mean"
    acts = crosscoder(PAIR.sample(BATCH).x).acts
    assert (int((acts[:, :n] > 0).sum()), int((acts[:, n:] > 0).sum())) == (4 * BATCH, 2 * BATCH)
    (loss,) = [loss for loss in chosen.losses if isinstance(loss, Delta)]
    assert loss.shared == chosen.settings["sparsity"].n_first


@pytest.mark.parametrize("name", ["dsf", "dfc"])
def test_a_partition_outlives_a_hundred_steps_and_a_second_training(name):
    """Widths of 21 leave no block of rows whole, which is where fused arithmetic differs from row to row."""
    chosen = small(name, steps=100)
    crosscoder, _ = run(chosen)
    train(crosscoder, PAIR.batches(BATCH, 7), chosen.losses, replace(chosen.config, lr=1e-2, progress=False))
    parts, rows = crosscoder.partition.parts(D_SAE), crosscoder.W_dec.detach()
    assert torch.equal(rows[parts.shared, 0], rows[parts.shared, 1])
    assert not rows[parts.base, 1].any()
    assert not rows[parts.tuned, 0].any()


def test_the_normaliser_is_the_recipes():
    x = PAIR.sample(BATCH * 100).x
    assert torch.equal(small("minder_l1").normalizer([x]).scale, torch.ones(2))
    scaled = small("kissane_l1").normalizer(x.split(BATCH))
    torch.testing.assert_close((scaled.normalise(x)).norm(dim=-1).mean(0), torch.full((2,), PAIR.d_in**0.5))
    assert not scaled.mean.any()
    median = small("dfc").normalizer(x.split(BATCH))
    torch.testing.assert_close(
        median.normalise(x).norm(dim=-1).median(0).values, torch.full((2,), PAIR.d_in**0.5), rtol=1e-3, atol=0
    )
    common = small("delta").normalizer(x.split(BATCH))
    assert common.mean.any()
    assert common.scale[0] == common.scale[1]


def test_each_crosscoder_has_a_sparsity_of_its_own():
    chosen, identity = small("delta"), Normalizer.identity(2, PAIR.d_in)
    first, second = chosen.crosscoder(identity), chosen.crosscoder(identity)
    first.sparsity.first.threshold.fill_(3.0)
    assert second.sparsity.first.threshold < 0
    assert torch.equal(first.W_dec, second.W_dec)
    assert not torch.equal(small("delta", seed=1).crosscoder(identity).W_dec, first.W_dec)


@pytest.mark.parametrize(
    ("name", "arguments", "error", "reason"),
    [
        ("minder", {}, KeyError, "no recipe named 'minder'; known: minder_l1, minder_batchtopk"),
        ("minder_l1", {"k": 4}, ValueError, "minder_l1 has no k"),
        ("papergrade", {"tokens": 100}, ValueError, "tokens=100 are less than a batch of 4096"),
        ("papergrade", {"d_sae": 48}, ValueError, "k=100 latents are to be active on a token, of d_sae=48"),
        ("delta", {"k": 1}, ValueError, "two parts.*got k=1"),
    ],
)
def test_impossible_recipes_are_refused(name, arguments, error, reason):
    with pytest.raises(error, match=reason):
        recipe(name, 32, **arguments)


def test_every_recipe_names_its_source_and_what_it_leaves_open():
    for name in PRESETS:
        chosen = recipe(name, 64, d_sae=1024)
        assert chosen.source
        assert chosen.notes
