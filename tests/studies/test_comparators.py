import pandas as pd
import pytest
import torch

from tests.studies.planted import LATENTS, latents_of_interest, planted_crosscoder, planted_pair
from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.dictionary.init import Init
from tl_crosscoder.dictionary.sparsity import ReLU
from tl_crosscoder.errors import ShapeMismatch
from tl_crosscoder.models.corpus import Corpus
from tl_crosscoder.models.drop import Drop
from tl_crosscoder.studies.comparators import Comparator
from tl_crosscoder.studies.dictionaries import Dictionary, n_active
from tl_crosscoder.studies.substitution import substitution

SINKS = Drop(sinks=None)


@pytest.fixture(scope="module")
def planted():
    pair, shift, trigger = planted_pair()
    return pair, planted_crosscoder(pair, shift), shift, trigger


@pytest.fixture(scope="module")
def corpus(planted):
    texts = ["one x two x three", "nothing here", "x marks the place", "xx and x and no more"]
    return Corpus.from_texts(texts, planted[0].tokenizer, context=32, windows=False)


def activations(pair, corpus):
    batch = corpus.batch(range(len(corpus)))
    return pair.capture(batch)[batch.attention_mask]


def sae(planted) -> Crosscoder:
    """Of the tuned model: latent 1 fires on the trigger's new place and writes it; latent 0 on everything, and writes more."""
    pair, crosscoder, shift, _ = planted
    made = Crosscoder(pair.d_in, 2, ReLU(), n_models=1)
    with torch.no_grad():
        made.W_enc_rows.zero_()
        made.W_enc_rows[1, 0] = crosscoder.W_enc_rows[0, 1]
        made.b_enc[1], made.b_enc[0] = crosscoder.b_enc[0], 1.0
        made.W_dec[1, 0], made.W_dec[0, 0] = shift, 3 * shift.flip(0)
    return made.eval()


def study(planted, corpus, against):
    pair, crosscoder, *_ = planted
    return substitution(
        crosscoder, pair, corpus, latents_of_interest(), drop=SINKS, top=(1,), n_specific=4, n_random=2,
        n_bootstrap=200, against=against,
    )  # fmt: skip


def kl(result):
    return result.table[result.table["tokens"] == "all"].set_index("condition")["kl"]


def test_an_sae_of_one_model_that_knows_the_change_wins_it_back(planted, corpus):
    pair = planted[0]
    other = Comparator.measured(sae(planted), [activations(pair, corpus)], reads="each")
    result = study(planted, corpus, {"SAE": other})
    values = kl(result)
    assert values["none"] > 1e-3
    for condition in ("SAE: all", "SAE: top 1 ranked"):
        assert values[condition] < 0.01 * values["none"]
    # the latent that fires everywhere writes the same in both models: no change
    assert values["SAE: random 1"] == pytest.approx(values["none"], rel=1e-4)
    assert values["SAE: error"] == pytest.approx(values["none"], rel=1e-4)
    assert "SAE, " in result.verdict and "its 1 highest-ranked latents 100%" in result.verdict


def test_the_own_crosscoder_as_its_own_rival_comes_out_the_same(planted, corpus):
    crosscoder = planted[1]
    values = kl(study(planted, corpus, {"twin": Comparator(crosscoder, latents_of_interest())}))
    own = [name for name in values.index if f"twin: {name}" in values.index]
    assert {"all", "error", "top 1 ranked", "random 1", "delta_norm top"} <= set(own)
    for name in own:
        assert values[f"twin: {name}"] == pytest.approx(values[name], rel=1e-9)


def test_a_denser_dictionary_is_brought_down_to_the_same_number_of_active_latents(planted, corpus):
    pair = planted[0]
    dense = Crosscoder(pair.d_in, 4 * LATENTS, ReLU(), init=Init(norm=1.0, seed=2)).eval()
    other = Comparator.measured(dense, [activations(pair, corpus)])
    [own, rival] = study(planted, corpus, {"dense": other}).dictionaries.to_dict("records")
    assert rival["l0_own"] > own["l0"] == own["l0_own"] > 0
    assert rival["l0"] == pytest.approx(own["l0"])


def test_what_is_kept_are_the_pairs_that_write_most(planted, corpus):
    dictionary = Dictionary(sae(planted), "each")
    acts = activations(planted[0], corpus)
    whole, cut = dictionary.codes(acts), dictionary.codes(acts, 7)
    norms = dictionary.crosscoder.decoder_norms().detach()[:, 0]
    for each, fewer in zip(whole, cut, strict=True):
        assert each is not None and fewer is not None
        written = (each.dense() * norms).flatten()
        bar = written.sort(descending=True).values[6]
        # of equal ones any may stay: all that are above the seventh do, and nothing below it
        kept = (fewer.dense() * norms).flatten()
        assert torch.equal(kept > bar, written > bar) and not ((kept > 0) & (written < bar)).any()
    assert n_active(cut) == 7


def test_the_change_of_an_sae_is_what_its_codes_of_the_two_models_differ_by(planted, corpus):
    dictionary, acts = Dictionary(sae(planted), "each"), activations(planted[0], corpus)
    made = dictionary.crosscoder
    with torch.no_grad():
        f = [made.encode(acts[:, [m]]) for m in (0, 1)]
    codes = dictionary.codes(acts)
    rows = made.raw_rows().detach()[:, 0]
    torch.testing.assert_close(dictionary.written(codes), (f[1] - f[0]) @ rows, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(dictionary.written(codes, additive=True), f[1] @ rows, rtol=1e-4, atol=1e-4)
    assert not dictionary.bias.any()


def test_the_table_of_an_sae_is_that_of_a_loop(planted, corpus):
    acts = activations(planted[0], corpus)
    made = sae(planted)
    table = Comparator.measured(made, acts.split(5), reads="each").table
    with torch.no_grad():
        f = [made.encode(acts[:, [m]]).double() for m in (0, 1)]
    norms = made.decoder_norms().detach()[:, 0].double()
    torch.testing.assert_close(torch.tensor(table["change"].to_numpy()), (f[1] - f[0]).abs().mean(0) * norms)
    assert table["n_fired"].tolist() == ((f[0] != 0) | (f[1] != 0)).sum(0).tolist()


def test_what_cannot_be_compared_is_refused(planted, corpus):
    made = sae(planted)
    with pytest.raises(ValueError, match='reads="difference" if'):
        Comparator.measured(made, [activations(planted[0], corpus)])
    with pytest.raises(ValueError, match="does not fit a dictionary of 1"):
        Dictionary(made, "both")
    narrow = Crosscoder(planted[0].d_in // 2, 4, ReLU())
    with pytest.raises(ShapeMismatch, match="at one hook"):
        study(planted, corpus, {"narrow": Comparator(narrow, pd.DataFrame())})
