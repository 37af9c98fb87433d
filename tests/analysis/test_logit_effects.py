"""What a latent promotes: known where its row is a row of the unembedding."""

import pytest
import torch

from tests.studies.planted import planted_crosscoder, planted_pair
from tl_crosscoder.analysis.logit_effects import causal_logit_effects, direct_effects, logit_effects
from tl_crosscoder.models.corpus import Corpus
from tl_crosscoder.models.shift import shift


@pytest.fixture(scope="module")
def planted():
    pair, change, _ = planted_pair()
    return pair, planted_crosscoder(pair, change)


def test_direct_effects_are_the_unembedding_of_the_normed_row_whatever_its_length(planted):
    pair, crosscoder = planted
    model = pair.tuned.model
    rows = crosscoder.raw_rows().detach()[:3, 1]
    normed = rows / rows.pow(2).mean(-1, keepdim=True).sqrt()  # RMSNorm of weight 1, eps aside
    wanted = (normed * model.model.norm.weight.detach()) @ model.lm_head.weight.detach().T
    torch.testing.assert_close(direct_effects(pair.tuned, rows), wanted, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(direct_effects(pair.tuned, 100 * rows), wanted, atol=1e-4, rtol=1e-4)


def test_a_row_of_the_unembedding_promotes_its_own_token(planted):
    pair, crosscoder = planted
    wanted = pair.tokenizer("q", add_special_tokens=False)["input_ids"][0]
    head = pair.tuned.model.lm_head.weight.detach()
    before = crosscoder.W_dec.detach().clone()
    with torch.no_grad():
        crosscoder.W_dec[2, 1] = 50 * (head[wanted] - head.mean(0)) / head[wanted].norm() ** 2
    try:
        effects = logit_effects(crosscoder, pair, [2], n=3)
    finally:
        with torch.no_grad():
            crosscoder.W_dec.copy_(before)
    first = effects.query("model == 'tuned' and way == 'promotes' and rank == 0")
    assert first["token"].item() == "q"
    assert (
        effects.query("way == 'promotes'")["effect"] > effects.query("way == 'suppresses'")["effect"].max()
    ).all()
    assert len(effects) == 2 * 2 * 3


def test_a_model_in_which_a_latent_writes_nothing_has_no_effects(planted):
    pair, crosscoder = planted
    assert set(logit_effects(crosscoder, pair, [0])["model"]) == {"tuned"}


def test_causal_effects_are_the_mean_change_of_log_p_by_a_loop(planted):
    pair, crosscoder = planted
    batch = Corpus.from_texts(["some words", "more"], pair.tokenizer, context=16, windows=False).batch([0, 1])
    effects = causal_logit_effects(crosscoder, pair, batch, {3: 2.0}, n=2).query("model == 'tuned'")
    changes = []
    where = batch.attention_mask & ~batch.first
    edit = shift(2 * crosscoder.raw_rows().detach()[3, 1], where)
    clean, moved = (pair.run(batch, e).log_softmax(-1) for e in (None, edit))
    for row, position in where.nonzero().tolist():
        changes.append(moved[row, position] - clean[row, position])
    mean = torch.stack(changes).mean(0)[: len(pair.tokenizer)]
    assert effects.query("way == 'promotes'")["effect"].iloc[0] == pytest.approx(mean.max().item(), abs=1e-5)
    assert effects.query("way == 'suppresses'")["effect"].iloc[0] == pytest.approx(
        mean.min().item(), abs=1e-5
    )
