import pytest
import torch
from synthetic_runs import small_pair

from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.dictionary.sparsity import BatchTopK, TopK
from tl_crosscoder.dictionary.synthetic import SyntheticPair


def perfect_crosscoder(pair: SyntheticPair) -> Crosscoder:
    """One latent for each concept, its decoders the planted directions times their gains."""
    crosscoder = Crosscoder(pair.d_in, len(pair.kinds), TopK(4))
    with torch.no_grad():
        crosscoder.W_dec.copy_(pair.directions[:, None] * pair.gains[:, :, None])
        crosscoder.W_enc_rows.copy_(crosscoder.W_dec)
    return crosscoder.eval()


def test_activations_are_the_planted_concepts_and_noise():
    pair = small_pair()
    batch = pair.sample(20_000)
    error = batch.x - batch.presence @ pair.directions
    assert error.std().item() == pytest.approx(pair.noise, rel=0.01)
    torch.testing.assert_close(pair.directions.norm(dim=1), torch.ones(len(pair.kinds)))


def test_each_kind_is_where_it_says():
    pair = small_pair()
    presence = pair.sample(20_000).presence
    kinds = torch.tensor([["shared", "weak", "base", "tuned", "decoupled"].index(k) for k in pair.kinds])
    base, tuned = presence.unbind(1)
    assert torch.equal(base[:, kinds == 0], tuned[:, kinds == 0])
    ratio = (base / tuned)[:, kinds == 1]
    assert ((ratio[~ratio.isnan()] > 0.249) & (ratio[~ratio.isnan()] < 0.401)).all()
    assert not tuned[:, kinds == 2].any()
    assert not base[:, kinds == 3].any()
    on = (base[:, kinds == 4] > 0, tuned[:, kinds == 4] > 0)
    for context, probability in ((on[0] & on[1], 0.05), (on[0] & ~on[1], 0.01), (~on[0] & on[1], 0.01)):
        assert context.float().mean().item() == pytest.approx(probability, rel=0.1)
    rate = (presence[:, :, kinds < 2] > 0).float().mean().item()
    assert rate == pytest.approx(pair.p, rel=0.05)


@pytest.mark.parametrize(("wide", "low"), [(False, 0.9), (True, 0.5)])
def test_decoupled_magnitudes_are_narrow_unless_wide(wide, low):
    pair = SyntheticPair(wide=wide)
    values = pair.sample(20_000).presence[:, :, -pair.n_decoupled :]
    values = values[values > 0]
    assert values.min().item() == pytest.approx(low, abs=0.01)
    assert values.max().item() == pytest.approx(2 - low, abs=0.01)


def test_the_identity_pair_is_identical_bit_for_bit():
    batch = small_pair("identity").sample(100)
    assert torch.equal(batch.x[:, 0], batch.x[:, 1])
    assert torch.equal(batch.presence[:, 0], batch.presence[:, 1])


def test_disjoint_halves_share_directions_and_no_tokens():
    pair = small_pair("disjoint")
    presence = pair.sample(20_000).presence
    shared = presence[:, :, : pair.n_shared]
    assert torch.corrcoef(shared.flatten(2).transpose(0, 1).flatten(1))[0, 1].abs() < 0.01
    tuned_only = [kind == "tuned" for kind in pair.kinds]
    assert not presence[:, :, tuned_only].any()


def test_the_same_seed_gives_the_same_tokens():
    pair = small_pair()
    assert torch.equal(pair.sample(50, seed=3).x, pair.sample(50, seed=3).x)
    assert not torch.equal(pair.sample(50, seed=3).x, pair.sample(50, seed=4).x)
    one, two = (list(pair.batches(20, seed=1, n=3)) for _ in range(2))
    assert len(one) == 3
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert not torch.equal(one[0], one[1])


def test_the_oracle_names_every_latent_of_a_perfect_dictionary():
    pair = small_pair()
    crosscoder = perfect_crosscoder(pair)
    labels = pair.label(crosscoder)
    assert labels["concept"].tolist() == list(range(len(pair.kinds)))
    assert labels["kind"].tolist() == pair.kinds
    presence = labels.groupby("kind")["base_presence"].median()
    assert presence["tuned"] < 0.02
    assert presence["shared"] == pytest.approx(1, abs=0.02)
    assert 0.25 < presence["weak"] < 0.40


def test_scores_by_hand():
    """6 tuned-only concepts: calling 3 of them and 1 shared latent is right 3 times in 4 and finds 3 of 6."""
    pair = small_pair()
    crosscoder = perfect_crosscoder(pair)
    called = torch.zeros(len(pair.kinds), dtype=torch.bool)
    tuned = [c for c, kind in enumerate(pair.kinds) if kind == "tuned"]
    called[tuned[:3]] = True
    called[0] = True
    score = pair.score(crosscoder, called)
    assert (score.precision, score.recall) == (0.75, 0.5)
    assert score.calls == {"shared": 1, "tuned": 3}


def test_a_silent_latent_is_dead_and_no_call_has_no_precision():
    pair = small_pair()
    crosscoder = perfect_crosscoder(pair)
    with torch.no_grad():
        crosscoder.b_enc[4] = -100
    assert pair.label(crosscoder)["kind"][4] == "dead"
    score = pair.score(crosscoder, torch.zeros(len(pair.kinds), dtype=torch.bool))
    assert score.precision != score.precision
    assert score.recall == 0


def test_labels_are_read_in_eval_mode_and_the_mode_comes_back():
    pair = small_pair()
    crosscoder = Crosscoder(pair.d_in, len(pair.kinds), BatchTopK(4))
    crosscoder.load_state_dict(
        {**perfect_crosscoder(pair).state_dict(), "sparsity.threshold": torch.tensor(1.0)}
    )
    labels = pair.label(crosscoder)
    assert crosscoder.training
    assert crosscoder.sparsity.training
    assert crosscoder.sparsity.threshold == 1  # not tracked on the labelled tokens
    assert labels.equals(pair.label(crosscoder.eval()))
    assert not crosscoder.training


def test_the_default_device_does_not_matter():
    """Directions and activations are on the CPU."""
    expected = small_pair().sample(10)
    with torch.device("meta"):
        batch = small_pair().sample(10)
    assert torch.equal(batch.x, expected.x)
    assert torch.equal(batch.presence, expected.presence)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_crosscoder_on_a_gpu_is_labelled_where_it_is():
    pair = small_pair()
    crosscoder = perfect_crosscoder(pair)
    here = pair.label(crosscoder)["concept"].tolist()
    assert pair.label(crosscoder.cuda())["concept"].tolist() == here


def test_a_concept_of_its_own_latent_is_recovered_and_a_latent_is_given_away_once():
    """A dictionary without the latents of concepts 0 and 1 but two of concept 5 recovers all but those two."""
    pair = small_pair()
    whole = pair.recovery(perfect_crosscoder(pair))
    assert whole["kind"].tolist() == pair.kinds[: -pair.n_decoupled]
    assert whole["latent"].tolist() == list(range(len(whole)))
    assert whole["correlation"].min() > 0.6
    assert whole["frequency"].mean() == pytest.approx(pair.p, rel=0.05)
    crosscoder = perfect_crosscoder(pair)
    with torch.no_grad():
        for lost in (0, 1):
            crosscoder.W_dec[lost], crosscoder.W_enc_rows[lost] = (
                crosscoder.W_dec[5],
                crosscoder.W_enc_rows[5],
            )
    recovery = pair.recovery(crosscoder)
    assert (recovery["correlation"] > 0.6).tolist() == [c > 1 for c in range(len(recovery))]
    assert len(set(recovery["latent"])) == len(recovery)


def test_a_rare_tuned_only_concept_is_as_rare_as_asked_for():
    pair = SyntheticPair(n_tuned=6, p_tuned=0.004)
    presence = pair.sample(50_000).presence[:, 1]
    tuned = torch.tensor([kind == "tuned" for kind in pair.kinds])
    shared = torch.tensor([kind == "shared" for kind in pair.kinds])
    assert (presence[:, tuned] > 0).float().mean().item() == pytest.approx(0.004, rel=0.1)
    assert (presence[:, shared] > 0).float().mean().item() == pytest.approx(0.03, rel=0.02)


def test_a_dictionary_of_the_difference_is_labelled_by_the_difference():
    """One latent for each direction that base lacks, on tuned - base."""
    pair = small_pair()
    tuned = [c for c, kind in enumerate(pair.kinds) if kind == "tuned"]
    crosscoder = Crosscoder(pair.d_in, len(tuned), TopK(1), n_models=1)
    with torch.no_grad():
        crosscoder.W_enc_rows.copy_(pair.directions[tuned, None])
    assert pair.label(crosscoder)["concept"].tolist() == tuned
    assert pair.label(crosscoder)["base_presence"].max() < 0.05
