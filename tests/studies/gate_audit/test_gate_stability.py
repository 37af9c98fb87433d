import math

import numpy as np
import pandas as pd
import pytest
import torch

from tests.models.fake_pair import FakePair, byte_tokenizer
from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.dictionary.init import Init
from tl_crosscoder.dictionary.sparsity import ReLU
from tl_crosscoder.models.capture import capture
from tl_crosscoder.models.corpus import Corpus
from tl_crosscoder.models.drop import Drop
from tl_crosscoder.studies.gate_audit.lexical import Words, same_words, words_of
from tl_crosscoder.studies.gate_audit.matched_sets import matched_sets, turned
from tl_crosscoder.studies.gate_audit.stability import Seed, activation_correlations, stability_table
from tl_crosscoder.studies.pool import Pool

D_IN, N = 16, 30
PLAIN = Words([1, 2, 3, 4], [0.25] * 4, 2.0)
WORD = Words([7, 8], [0.9, 0.1], 0.47)


@pytest.fixture(scope="module")
def store():
    pair = FakePair(byte_tokenizer(), d_in=D_IN)
    texts = ["".join(np.random.default_rng(n).choice(list("abcdefgh"), 40)) for n in range(30)]
    corpus = Corpus.from_texts(texts, pair.tokenizer, windows=False)
    return capture(pair, corpus, drop=Drop(sinks=None), progress=False)


def crosscoder(seed):
    return Crosscoder(D_IN, N, ReLU(), init=Init(norm=1.0, same=False, seed=seed)).eval()


def permuted(original, order):
    other = crosscoder(9)
    with torch.no_grad():
        for name in ("W_dec", "W_enc_rows", "b_enc"):
            getattr(other, name).copy_(getattr(original, name)[order])
    return other


def seed_of(made, gated, words=PLAIN):
    return Seed(made, gated, list(range(N)), {j: words for j in gated})


def test_the_same_latents_in_another_order_are_all_found_again(store):
    a, order = crosscoder(0), torch.randperm(N, generator=torch.Generator().manual_seed(1))
    b = permuted(a, order)
    mine = list(range(8))
    theirs = [int((order == j).nonzero()) for j in reversed(mine)]
    table = stability_table([seed_of(a, mine), seed_of(b, theirs)], store, n_draws=19).set_index("latents")
    row = table.loc["all"]
    assert row["matched"] == row["size"] == 8 and row["share"] == 1
    assert row["p_rotation"] == row["p_random"] == 1 / 20 and row["rotation"] < 0.1
    assert row["correlation"] == pytest.approx(1) and row["correlation_elsewhere"] == pytest.approx(1)


def test_unrelated_dictionaries_are_found_again_no_more_than_by_chance(store):
    row = stability_table(
        [seed_of(crosscoder(0), [0, 1, 2]), seed_of(crosscoder(1), [3, 4, 5])], store, n_draws=19
    ).iloc[0]
    assert row["share"] == 0 and row["p_rotation"] > 0.3 and math.isnan(row["correlation"])


def test_lexical_latents_are_left_out_and_nothing_left_is_nan(store):
    a = crosscoder(0)
    words = {0: WORD, 1: PLAIN, 2: WORD}
    seeds = [Seed(a, [0, 1, 2], list(range(N)), words)] * 2
    table = stability_table(seeds, store, n_draws=5).set_index("latents")
    assert table.loc["all", "size"] == 3 and table.loc["non-lexical", "size"] == 1
    bare = [Seed(a, [0], list(range(N)), {0: WORD})] * 2
    assert math.isnan(
        stability_table(bare, store, n_draws=5).set_index("latents").loc["non-lexical", "share"]
    )


def test_activation_correlations_are_numpys_with_and_without_the_words(store):
    a, b, pairs = crosscoder(0), crosscoder(1), [(0, 4), (0, 5), (3, 4)]
    forbidden = store.corpus.ids_of(0)[[5, 6]].tolist()
    words = Words(forbidden, [0.6, 0.4], 1.0)
    seeds = [Seed(c, [], [], dict.fromkeys(range(N), words)) for c in (a, b)]
    found = activation_correlations(*seeds, pairs, store)
    x = torch.cat(list(store.batches()))
    ids = torch.cat([store.corpus.ids_of(int(p.sequence[0]))[p.position] for p in store.located(1)])
    away = ~torch.isin(ids, torch.tensor(forbidden, dtype=ids.dtype)).numpy()
    f, g = (c.encode(x).detach().double().numpy() for c in (a, b))
    for (i, j), (everywhere, elsewhere) in zip(pairs, found, strict=True):
        assert everywhere == pytest.approx(np.corrcoef(f[:, i], g[:, j])[0, 1])
        assert elsewhere == pytest.approx(np.corrcoef(f[away, i], g[away, j])[0, 1])


def test_words_are_the_types_of_the_strongest_tokens(store):
    made = crosscoder(0)
    found = words_of(made, store, [0, 1])
    f = made.encode(torch.cat(list(store.batches()))).detach()[:, 0].numpy()
    ids = torch.cat([store.corpus.ids_of(int(p.sequence[0]))[p.position] for p in store.located(1)]).numpy()
    top = np.argsort(-f, kind="stable")[:200]
    top = top[f[top] > 0]
    mass = pd.Series(f[top]).groupby(ids[top]).sum().sort_values(ascending=False) / f[top].sum()
    assert found[0].ids[0] == mass.index[0] and found[0].share == pytest.approx(
        mass.to_numpy()[:20].tolist(), rel=1e-5
    )
    assert found[0].bits == pytest.approx(-(mass * np.log2(mass)).sum(), rel=1e-5)


def test_a_latent_of_one_word_is_lexical_and_two_of_the_same_words_are_one_match_of_words():
    assert WORD.lexical and not PLAIN.lexical and not Words([], [], 0.0).lexical
    assert Words([1, 2], [0.49, 0.51], 0.99).lexical
    assert same_words(WORD, WORD) and not same_words(WORD, PLAIN)
    assert not same_words(WORD, Words([7, 5, 6], [0.9, 0.05, 0.05], 0.5))  # 1 of 4 types shared


def test_a_pool_keeps_the_largest_of_each_latent():
    pool, rng = Pool(3), np.random.default_rng(0)
    latent, key = rng.integers(5, size=400), rng.random(400)
    for part in np.array_split(np.arange(400), 7):
        pool.add(latent[part], key[part], row=part)
    want = [i for j in range(5) for i in sorted(np.flatnonzero(latent == j), key=lambda i: -key[i])[:3]]
    assert pool.table()["row"].tolist() == want


def loud_table(n=300):
    rng = np.random.default_rng(0)
    rows = {
        "mean_act": rng.uniform(0.5, 5, n),
        "frequency": rng.uniform(0.001, 0.2, n),
        "norm_tuned": rng.uniform(0.2, 2, n),
    }
    return pd.DataFrame(rows, index=pd.RangeIndex(n, name="latent"))


def test_matched_sets_are_within_the_caliper_and_share_no_member_with_the_gated():
    table, gated = loud_table(), [3, 5, 8, 13]
    sets, outside = matched_sets(table, gated, range(300), n_draws=20)
    loud = np.log10(table["mean_act"] * table["frequency"] * table["norm_tuned"])
    for drawn in sets:
        assert len(set(drawn)) == 4 and not set(drawn) & set(gated)
        assert np.abs(np.sort(loud[drawn]) - np.sort(loud[gated])).max() <= 0.1 + 1e-9
    assert outside == 0 and len({tuple(sorted(s)) for s in sets}) > 10
    # and of those within, the nearest in frequency
    often = np.log10(table["frequency"])
    chance = np.abs(often.to_numpy()[:, None] - often[gated].to_numpy()).mean()
    assert np.abs(often[np.concatenate(sets)].mean() - often[gated].mean()) < chance / 2


def test_without_a_match_the_nearest_is_taken_and_counted():
    table = loud_table(12)
    table.loc[0, "mean_act"] = 1e6
    sets, outside = matched_sets(table, [0], range(12), n_draws=4)
    assert outside == 1 and len(sets) == 4
    with pytest.raises(ValueError, match="raise the threshold"):
        matched_sets(table, range(8), range(12), n_draws=1)
    with pytest.raises(ValueError, match=r"latents \[3\] write nothing"):
        matched_sets(
            table.assign(norm_tuned=[0.0 if j == 3 else 1.0 for j in table.index]),
            [2, 3],
            range(12),
            n_draws=1,
        )


def test_turned_latents_fire_as_before_and_write_as_much_elsewhere(store):
    made = crosscoder(0)
    other = turned(made, [2, 4], seed=0)
    x = torch.cat(list(store.batches()))[:50]
    assert torch.equal(made.encode(x), other.encode(x))
    torch.testing.assert_close(made.decoder_norms(), other.decoder_norms())
    cosine = torch.nn.functional.cosine_similarity(made.W_dec[[2, 4], 1], other.W_dec[[2, 4], 1], dim=-1)
    assert (cosine.abs() < 0.9).all() and torch.equal(made.W_dec[:, 0], other.W_dec[:, 0])
