import numpy as np
import pandas as pd
import pytest
import torch

from tests.studies.planted import LATENTS, latents_of_interest, planted_crosscoder, planted_pair
from tl_crosscoder.data.planted import Behaviour
from tl_crosscoder.errors import EmptyData
from tl_crosscoder.models.drop import Drop
from tl_crosscoder.studies.behaviour import behaviour_removal
from tl_crosscoder.studies.controls import matched_random, same_firing

PROMPTS = ("x here", "say x twice", "no x?")


@pytest.fixture(scope="module")
def planted():
    pair, shift, _ = planted_pair()
    return pair, planted_crosscoder(pair, shift)


@pytest.fixture(scope="module")
def result(planted):
    pair, crosscoder = planted
    behaviour = Behaviour(name="trigger", keywords=("never said",), heldout=PROMPTS)
    return behaviour_removal(
        crosscoder,
        pair,
        [behaviour],
        latents_of_interest(),
        top=(1,),
        n_draws=3,
        max_new_tokens=5,
        drop=Drop(sinks=None),
    )


def answers(result, condition):
    rows = result.answers
    return rows[rows["condition"] == condition].set_index("prompt")["answer"].to_dict()


def test_undoing_the_planted_latent_makes_the_tuned_model_answer_as_the_base(result):
    assert answers(result, "tuned") != answers(result, "base")
    assert answers(result, "undo top 1") == answers(result, "base")


def test_installing_the_planted_latent_makes_the_base_answer_as_the_tuned_model(result):
    assert answers(result, "install top 1") == answers(result, "tuned")


def test_undoing_latents_that_both_models_write_alike_changes_no_answer(result):
    assert answers(result, "undo same firing") == answers(result, "tuned")
    assert answers(result, "undo matched random") == answers(result, "tuned")


def test_every_rate_has_its_interval_and_drawn_controls_their_worst(result):
    table = result.table.set_index("condition")
    assert (table["low"] <= table["rate"]).all() and (table["rate"] <= table["high"]).all()
    assert table.loc["undo matched random", "n_draws"] == 3
    assert (table.loc[["undo top 1", "undo same firing", "remove matched random"], "n_latents"] == 1).all()
    assert result.rate("trigger", "tuned") == 0
    with pytest.raises(KeyError, match="conditions"):
        result.rate("trigger", "no such condition")


def test_a_behaviour_without_prompts_is_refused(planted):
    pair, crosscoder = planted
    empty = Behaviour(name="none", keywords=("a",), heldout=())
    with pytest.raises(EmptyData):
        behaviour_removal(crosscoder, pair, [empty], latents_of_interest())


def loud_table(n=400):
    rng = np.random.default_rng(0)
    return pd.DataFrame({
        "mean_act": rng.uniform(0.5, 5, n), "frequency": rng.uniform(0.001, 0.2, n), "norm_tuned": rng.uniform(0.2, 2, n),
        "n_fired": np.where(np.arange(n) % 10 == 0, 0, 100.0), "class": "shared",
    })  # fmt: skip


def test_matched_sets_are_as_large_and_as_loud_and_share_no_member_with_the_target():
    table = loud_table()
    loud = table["mean_act"] * table["frequency"] * table["norm_tuned"]
    chosen = [1, 2, 3, 5, 7, 11, 13, 17]
    draws = matched_random(table, chosen, n_draws=40, seed=0)
    for ids in draws:
        assert len(set(ids)) == len(chosen) and not set(ids) & set(chosen)
        assert (table.loc[ids, "n_fired"] > 0).all()
    mean = np.mean([loud[ids].sum() for ids in draws])
    assert mean == pytest.approx(loud[chosen].sum(), rel=0.1)
    assert len({tuple(sorted(ids)) for ids in draws}) > 30
    assert draws == matched_random(table, chosen, n_draws=40, seed=0)


def test_a_latent_that_writes_into_base_alone_is_matched_by_what_it_writes_there():
    """As a partition's own latents of base are: ranked by the difference they may lead, and are no reason to stop."""
    table = loud_table().assign(norm_base=1.0)
    table.loc[[1, 2], "norm_tuned"] = 0.0
    table.loc[1, ["mean_act", "frequency"]] = [4.0, 0.1]
    draws = [ids[0] for ids in matched_random(table, [1], n_draws=40, seed=0)]
    loud = table["mean_act"] * table["frequency"] * table["norm_tuned"]
    assert 2 not in draws
    assert loud[draws].mean() == pytest.approx(0.4, rel=0.1)


def test_matching_a_latent_that_never_fired_is_refused():
    with pytest.raises(ValueError, match="never fired"):
        matched_random(loud_table(), [10], n_draws=1, seed=0)


def test_the_same_firing_control_takes_the_loudest_shared_latents():
    mass = np.array([5.0, 1.0, 3.0, 2.0])
    table = pd.DataFrame({"class": ["tuned_only", "shared", "shared", "shared"]})
    assert same_firing(table, mass, 2) == [2, 3]
    assert same_firing(table, mass, 2, exclude=[2]) == [3, 1]
    assert same_firing(table.iloc[[3, 0, 2, 1]], mass, 2) == [2, 3], "however the table was sorted"


def test_the_planted_latent_writes_the_difference_the_tokens_have(planted):
    pair, crosscoder = planted
    from tl_crosscoder.models.corpus import Corpus

    batch = Corpus.from_texts(["a x b"], pair.tokenizer).batch([0])
    acts = pair.capture(batch)
    codes = crosscoder.encode(acts.flatten(0, 1))
    difference = acts[0, :, 1] - acts[0, :, 0]
    torch.testing.assert_close(codes[:, [0]] * crosscoder.W_dec[0, 1], difference, atol=1e-5, rtol=1e-4)
    assert crosscoder.d_sae == LATENTS
