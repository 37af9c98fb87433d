"""Studies of crosscoders in which each model chooses for itself: what counts as written into a model is what that model chose."""

import numpy as np
import pytest
import torch

from tests.dictionary.test_per_model import D_SAE, above_threshold, acts, crosscoder, naive_codes, trained
from tests.studies.planted import planted_pair
from tl_crosscoder.analysis.coactivation import EDGES
from tl_crosscoder.analysis.table import latent_table
from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.dictionary.init import Init
from tl_crosscoder.dictionary.sparsity import PerModel, Threshold
from tl_crosscoder.models.corpus import Corpus
from tl_crosscoder.studies.behaviour import firing_on
from tl_crosscoder.studies.controls import written_magnitude
from tl_crosscoder.studies.mirror_pairs import mirror_pairs
from tl_crosscoder.types import BASE, TUNED


@pytest.fixture(scope="module")
def made():
    return trained().eval()


@pytest.fixture(scope="module")
def x():
    return torch.cat([acts(seed) for seed in range(30, 40)])


@pytest.fixture(scope="module")
def written(made, x):
    """The activation of each token and latent in each model, by the naive reference."""
    _, pre, gates = naive_codes(made, x, above_threshold(made))
    assert (gates[..., BASE] != gates[..., TUNED]).any()
    return (pre[..., None] * gates).detach().numpy()


def test_controls_are_matched_by_what_is_written_into_the_tuned_model(made, x, written):
    table = latent_table(made, x.split(64))
    norm = made.W_dec.detach().norm(dim=-1)[:, TUNED].numpy()
    assert written_magnitude(table) == pytest.approx(written[..., TUNED].mean(0) * norm, rel=1e-6)
    assert table["mean_act"].mul(table["frequency"]).fillna(0).tolist() == pytest.approx(
        written.max(-1).mean(0).tolist(), rel=1e-6
    )


def test_of_a_mirror_pair_the_one_fires_where_tuned_has_it_and_the_other_where_base_does(x):
    bars = (0.2, 1.5)  # so that tuned lacks much that its latents do in base
    made = crosscoder(PerModel(tuple(Threshold.of(torch.full((D_SAE,), bar)) for bar in bars))).eval()
    _, pre, gates = naive_codes(made, x, lambda s, m: s / made.W_dec[:, m].norm(dim=-1) > bars[m])
    written = (pre[..., None] * gates).detach().numpy()
    table = latent_table(made, [x])
    result = mirror_pairs(made, [x], table, cosine=-1.1, n_draws=1, progress=False)
    largest = table["max_act"].to_numpy(float)
    assert len(result.table) > 3
    for (j, i), histogram in zip(result.table[["tuned", "base"]].to_numpy(), result.histograms, strict=True):
        first, second = written[:, j, TUNED] / largest[j], written[:, i, BASE] / largest[i]
        bins = (np.digitize(first, EDGES), np.digitize(second, EDGES))
        want, *_ = np.histogram2d(*bins, bins=np.arange(6) - 0.5)
        assert histogram == want.tolist()


def test_the_mass_of_a_latent_on_answers_is_what_it_writes_into_the_tuned_model():
    pair, *_ = planted_pair()
    parts = (Threshold.of(torch.full((D_SAE,), 0.01)), Threshold.of(torch.full((D_SAE,), 0.08)))
    made = Crosscoder(
        pair.d_in, D_SAE, PerModel(parts), code_norm="decoupled", init=Init(norm=0.5, same=False)
    ).eval()
    answers = Corpus.from_chats(
        [[{"role": "user", "content": "a"}, {"role": "assistant", "content": "x and more x"}]], pair.tokenizer
    )
    batch = answers.batch([0])
    codes = made.encode_sparse(pair.capture(batch)[batch.assistant])
    there = codes.of_model(TUNED).dense().double().mean(0) * made.raw_rows()[:, TUNED].norm(dim=-1)
    assert codes.gates is not None and not codes.gates[:, TUNED].all()
    found = firing_on(made, pair, answers)["mass"]
    assert found.tolist() == pytest.approx(there.tolist(), rel=1e-5)
