import operator
from collections.abc import Iterator

import pytest
import torch
from torch.utils.data import DataLoader

from tl_crosscoder.analysis.decoder_norms import DecoderNorms
from tl_crosscoder.analysis.table import latent_table
from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.dictionary.difference import difference
from tl_crosscoder.dictionary.init import Init
from tl_crosscoder.dictionary.losses import MSE, AuxK
from tl_crosscoder.dictionary.normalizer import Normalizer
from tl_crosscoder.dictionary.sparsity import BatchTopK
from tl_crosscoder.dictionary.synthetic import SyntheticPair
from tl_crosscoder.errors import ShapeMismatch
from tl_crosscoder.interventions import ablate, steer, substitute
from tl_crosscoder.training.config import TrainConfig
from tl_crosscoder.training.train import train

PAIR = SyntheticPair(d_in=24, n_shared=10, n_weak=0, n_base=4, n_tuned=4, n_decoupled=0, p=0.08)


def test_it_is_tuned_minus_base():
    x = torch.tensor([[[1.0, 2.0], [5.0, 1.0]]])
    assert [d.tolist() for d in difference([x])] == [[[[4.0, -1.0]]]]


def test_a_list_can_be_read_again_and_tells_its_length():
    x = PAIR.sample(64).x
    batches = difference(x.split(16))
    for _ in range(2):
        assert torch.equal(torch.cat(list(batches))[:, 0], x[:, 1] - x[:, 0])
    assert operator.length_hint(batches) == 4


def test_an_iterator_stays_an_iterator():
    assert isinstance(difference(PAIR.batches(8, n=2)), Iterator)
    assert len(list(difference(PAIR.batches(8, n=2)))) == 2


def test_a_fractional_k_is_refused_before_the_first_step():
    loader = DataLoader(PAIR.sample(70).x, batch_size=10)
    made = Crosscoder(PAIR.d_in, 24, BatchTopK(0.25), n_models=1)
    with pytest.raises(ValueError, match=r"are 2\.5 in a batch of 10 tokens"):
        train(made, difference(loader), [MSE()], TrainConfig(steps=2, progress=False))
    made = Crosscoder(PAIR.d_in, 24, BatchTopK(0.5), n_models=1)
    with pytest.raises(ValueError, match="in a smaller last batch"):
        train(made, difference(loader), [MSE()], TrainConfig(steps=2, progress=False))
    assert not hasattr(difference(list(loader)), "batch_size")


@pytest.mark.parametrize("shape", [(4, 3, 2), (4, 1, 2)])
def test_other_shapes_are_named(shape):
    with pytest.raises(ShapeMismatch, match=r"\[batch, model=2, d_in\], got \[4, "):
        list(difference([torch.zeros(shape)]))


@pytest.fixture(scope="module")
def trained():
    """A dictionary of the difference alone: the shared concepts cancel, eight one-sided ones are left."""
    crosscoder = Crosscoder(PAIR.d_in, 24, BatchTopK(1), n_models=1, init=Init(norm=0.5))
    config = TrainConfig(steps=500, lr=5e-3, progress=False)
    losses = [MSE(), AuxK(dead_after_tokens=5_000)]
    history = train(crosscoder, difference(PAIR.batches(512)), losses, config)
    return crosscoder, history


def test_a_dictionary_of_the_difference_finds_what_one_model_has_alone(trained):
    """x^tuned - x^base = Σ_tuned z u - Σ_base z u: directions +u of tuned-only and -u of base-only concepts."""
    crosscoder, history = trained
    sign = torch.tensor([{"tuned": 1.0, "base": -1.0}.get(kind, 0.0) for kind in PAIR.kinds])
    wanted = (PAIR.directions * sign[:, None])[sign != 0]
    found = torch.nn.functional.normalize(crosscoder.raw_rows().detach()[:, 0], dim=-1)
    assert len(wanted) == 8
    assert ((wanted @ found.T).amax(1) > 0.9).all()
    shared = PAIR.directions[sign == 0]
    fires = crosscoder.encode(torch.cat(list(difference([PAIR.sample(4096, seed=9).x])))).any(0)
    assert (shared @ found[fires].T).abs().max() < 0.8
    assert history.rows[-1]["fve_difference"] > 0.8


def test_its_table_has_what_needs_no_second_model(trained):
    crosscoder, _ = trained
    table = latent_table(crosscoder, difference([PAIR.sample(2000, seed=5).x]))
    assert {"frequency", "max_act"} <= set(table)
    assert not {"delta_norm", "nu_error", "difference_share", "class", "rank_score"} & set(table)
    assert table.attrs["metrics"]["fve"] > 0.8
    assert "fve_base" not in table.attrs["metrics"]
    with pytest.raises(ValueError, match=r"DecoderNorms compares base with tuned.*one model"):
        DecoderNorms(crosscoder)


def test_edits_name_the_model_that_is_not_there(trained):
    crosscoder, _ = trained
    acts = torch.zeros(1, 3, PAIR.d_in)
    for make in (
        lambda: steer(crosscoder, [0], 1.0),
        lambda: ablate(crosscoder, [0], acts),
        lambda: substitute(crosscoder, [0], acts),
    ):
        with pytest.raises(ValueError, match=r"model=1: this crosscoder has models 0\.\.0"):
            make()
    steered = steer(crosscoder, [3], 2.0, model=0)(acts)
    torch.testing.assert_close(steered[0, 0], 2 * crosscoder.raw_rows().detach()[3, 0])


def test_a_normaliser_can_be_fitted_to_differences():
    x = PAIR.sample(500).x
    normalizer = Normalizer.fit(difference([x]))
    assert normalizer.mean.shape == (1, PAIR.d_in)
    torch.testing.assert_close(normalizer.mean[0], (x[:, 1] - x[:, 0]).mean(0), rtol=1e-4, atol=1e-6)
