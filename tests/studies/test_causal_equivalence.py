"""Two tiny models whose shared latents do the same, something else, or nothing, by construction."""

import copy
import json

import numpy as np
import pandas as pd
import pytest
import torch

from tests.models.fake_pair import byte_tokenizer
from tests.models.tiny_models import tiny_llama_model
from tl_crosscoder.analysis.table import latent_table
from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.dictionary.init import Init
from tl_crosscoder.dictionary.sparsity import ReLU
from tl_crosscoder.errors import EmptyData
from tl_crosscoder.interventions import ablate
from tl_crosscoder.models.backends import HookBackend
from tl_crosscoder.models.capture import capture
from tl_crosscoder.models.corpus import Corpus
from tl_crosscoder.models.drop import Drop
from tl_crosscoder.models.pair import ModelPair
from tl_crosscoder.studies.causal_equivalence import EquivalenceResult, _scored, causal_equivalence
from tl_crosscoder.studies.probes import stratified
from tl_crosscoder.studies.result import StudyResult
from tl_crosscoder.studies.single_ablation import single_ablations

TEXTS = [
    f"{word} and {other}, then {word[::-1]}."
    for word in ("moon", "seven", "quick")
    for other in ("jam", "xylo", "bat")
]
HOOK = "blocks.1.hook_resid_post"


def pair_of(kind):
    """``same``: one model twice.  ``rotated``: tuned's readout is turned.  ``elsewhere``: the two read two dimensions
    each, not the same.  ``deaf``: tuned reads nothing."""
    tokenizer = byte_tokenizer()
    base = tiny_llama_model(seed=3, vocab=len(tokenizer))
    tuned = copy.deepcopy(base)
    turn = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(1)))[0]
    with torch.no_grad():
        if kind == "rotated":
            tuned.lm_head.weight.copy_(tuned.lm_head.weight @ turn)
        elif kind == "elsewhere":
            base.lm_head.weight[:, :14] = 0
            tuned.lm_head.weight.copy_(base.lm_head.weight.roll(-8, 1))
        elif kind == "deaf":
            tuned.lm_head.weight.zero_()
    return ModelPair(*(HookBackend(model, tokenizer) for model in (base, tuned)), hook=HOOK)


def crosscoder():
    """Random directions, the same in both models: every decoder cosine is 1."""
    made = Crosscoder(16, 6, ReLU(), init=Init(norm=1.0, seed=2))
    with torch.no_grad():
        made.b_enc[5] = -1e4  # never fires
    return made.eval()


def asked(kind, **options):
    pair, made = pair_of(kind), crosscoder()
    corpus = Corpus.from_texts(TEXTS, pair.tokenizer, context=32, windows=False)
    store = capture(pair, corpus, drop=Drop(sinks=None), progress=False)
    settings = {"latents": range(6), "n_probes": 32, "n_bootstrap": 50, "progress": False} | options
    return causal_equivalence(made, pair, store, latent_table(made, store), **settings), pair, store


@pytest.fixture(scope="module")
def same():
    return asked("same")


def test_one_model_twice_has_a_causal_equivalence_of_one(same):
    table = same[0].table.iloc[:5]
    assert table["cosine"].to_numpy() == pytest.approx(1) and table["ce"].to_numpy() == pytest.approx(1)
    assert table[["spearman", "partial", "logit_cosine"]].to_numpy() == pytest.approx(1)
    assert (table["mismatched"] < 0.999).all()


def test_a_readout_that_looks_elsewhere_lowers_it_though_the_decoders_still_agree():
    table = asked("elsewhere")[0].table.iloc[:5]
    assert table["cosine"].to_numpy() == pytest.approx(1)
    assert table["ce"].median() < 0.5 and table["partial"].median() < 0.5


def test_a_readout_that_is_only_turned_escapes_the_correlation_but_not_the_cosine_of_the_logits():
    # a readout that looks everywhere alike finds every direction equally large: the KLs agree while the models say other things
    table = asked("rotated")[0].table.iloc[:5]
    assert table["ce"].min() > 0.9
    assert table["logit_cosine"].abs().max() < 0.4


def test_a_model_that_does_not_react_gives_nan_and_no_error():
    table = asked("deaf")[0].table.iloc[:5]
    assert (table["mean_kl_tuned"] == 0).all() and (table["mean_kl_base"] > 0).all()
    assert table[["ce", "ce_low", "spearman", "partial", "logit_cosine"]].isna().to_numpy().all()


def test_a_latent_that_does_not_fire_has_no_figure_and_its_count(same):
    row = same[0].table.iloc[5]
    assert row["n_probes"] == 0 and np.isnan(row["ce"]) and np.isnan(row["mean_kl_base"])


def effects_of(n, base, tuned, latents=(0, 1)):
    rng = np.random.default_rng(0)
    rows = []
    for latent in latents:
        f = rng.exponential(size=n) + 0.1
        u, v = rng.uniform(0.5, 1.5, (2, n))
        rows.append(
            pd.DataFrame(
                {
                    "latent": latent,
                    "value": f,
                    "kl_base": base(f, u),
                    "kl_tuned": tuned(f, v),
                    "logit_cosine": 0.0,
                }
            )
        )
    return pd.concat(rows, ignore_index=True)


ABOUT = pd.DataFrame(
    {"class": "shared", "delta_norm": 0.5, "cosine": 1.0, "norm_base": 1.0, "norm_tuned": 1.0},
    index=pd.RangeIndex(2),
)


def test_unrelated_effects_that_grow_with_the_activation_correlate_but_not_given_it():
    effects = effects_of(2000, lambda f, u: f**2 * u, lambda f, v: f**2 * v)
    row = _scored(effects.assign(conversation=effects.index), [0, 1], ABOUT, 20, 0).iloc[0]
    assert row["ce"] > 0.8 and row["mismatched"] > 0.8  # the null has as much: nothing is shared but the size
    assert abs(row["partial"]) < 0.15


@pytest.mark.parametrize("n", [0, 1, 7, 8])
def test_fewer_than_eight_probes_say_nothing(n):
    effects = effects_of(n, lambda f, u: f + u, lambda f, v: f + v, (0,))
    row = _scored(effects.assign(conversation=effects.index), [0], ABOUT, 20, 0).iloc[0]
    assert row["n_probes"] == n and (n < 8) == np.isnan(row["ce"])


def test_the_batched_effect_is_that_of_an_ablation_of_one_latent_alone(same):
    _, pair, store = same
    made, corpus = crosscoder(), store.corpus
    probes = asked_probes(same)
    fast = single_ablations(made, pair, corpus, probes, max_tokens=64)
    for row, (_, probe) in zip(fast.itertuples(), probes.iterrows(), strict=True):
        ids = corpus.ids_of(int(probe["sequence"]))[: int(probe["position"]) + 1].long()[None]
        mask = torch.zeros_like(ids, dtype=torch.bool)
        mask[0, -1] = True
        acts = pair.capture(ids)
        for side, model, kl in (("base", 0, row.kl_base), ("tuned", 1, row.kl_tuned)):
            edit = ablate(made, [int(probe["latent"])], acts[:, :, 1 - model], model=model, mask=mask)
            both = [pair.run(ids, e, side=side)[0, -1].double().log_softmax(-1) for e in (edit, None)]
            naive = torch.nn.functional.kl_div(
                both[1], both[0], log_target=True, reduction="sum"
            )  # KL(ablated ‖ clean)
            assert kl == pytest.approx(naive.item(), rel=1e-3, abs=1e-9)


def asked_probes(same):
    return same[0].effects[["latent", "value", "sequence", "position"]].iloc[::17]


def test_probes_are_active_tokens_weak_and_strong_alike(same):
    effects = same[0].effects
    assert (effects["value"] > 0).all() and (effects.groupby("latent").size() == 32).all()
    rows = pd.DataFrame({"value": np.r_[np.linspace(0, 1, 990), np.linspace(9, 10, 10)]})
    drawn = stratified(rows, 16, np.random.default_rng(0))["value"]
    assert (drawn > 8).sum() == 8  # two of eight strata have any: half of the draws each


def test_the_published_variant_probes_the_last_tokens_of_texts():
    result, _, store = asked("same", variant="published")
    lengths = store.corpus.lengths.numpy()
    effects = result.effects
    assert (effects["position"] == lengths[effects["sequence"]] - 1).all()
    assert result.table["n_probes"].max() <= len(lengths)


def test_finished_parts_are_read_again(tmp_path, monkeypatch):
    first = asked("same", parts=tmp_path)[0]

    def never(*_, **__):
        raise AssertionError("computed again")

    monkeypatch.setattr("tl_crosscoder.studies.causal_equivalence.single_ablations", never)
    again = asked("same", parts=tmp_path)[0]
    pd.testing.assert_frame_equal(first.table, again.table)


def test_the_files_have_the_published_names_and_columns(same, tmp_path):
    written = same[0].write(tmp_path)
    assert [path.name for path in written] == [
        "causal_validation.csv",
        "cosine_vs_causal.png",
        "cosine_vs_causal.pdf",
    ]
    columns = pd.read_csv(written[0]).columns.tolist()
    assert columns[:8] == [
        "feature", "class", "delta_norm", "cosine", "mean_KL_A", "mean_KL_B", "pearson_CE", "n_probes_fired",
    ]  # fmt: skip


def test_the_result_is_read_back_and_says_its_figures(same):
    result = same[0]
    read = StudyResult.from_dict(json.loads(result.to_json()))
    assert isinstance(read, EquivalenceResult) and read.effects.empty
    pd.testing.assert_frame_equal(read.table, result.table)
    assert "Of 5 shared latents" in result.verdict[0] and "median 1.00" in result.verdict[0]
    assert result.panel().figure is not None


def test_the_sentence_tells_a_low_equivalence_from_one_that_is_only_measured_low():
    table = pd.DataFrame(
        {
            "class": ["shared", "shared", "shared", "other", "shared"],
            "cosine": 0.9,
            "ce": [0.2, 0.4, 0.9, 0.3, np.nan],
            "ce_high": [0.3, 0.8, 1.0, 0.6, np.nan],
            "n_probes": [16, 16, 16, 16, 3],
        }
    ).assign(partial=0.1, mismatched=0.1, logit_cosine=0.1)
    assert EquivalenceResult(table, pd.DataFrame(), "active").verdict == [
        "Of 3 shared latents with decoder cosine above 0.7, 2 (67%) have a causal equivalence below 0.5, 1 of them with its whole "
        "interval (median 0.40; given the activation 0.10; of mismatched latents 0.10; cosine of the logit changes 0.10).",
        "1 other latent: median CE 0.30.",
        "No CE for 1 latent with fewer than 8 probes.",
    ]


def test_nothing_to_ask_about_is_refused():
    with pytest.raises(EmptyData, match="at least one latent"):
        asked("same", latents=[])
