"""The mean difference: a planted shift is recovered and read, identical models have none, steering with it is what it says."""

import copy
import math

import numpy as np
import pytest
import torch

from tests.models.fake_pair import byte_tokenizer
from tests.models.tiny_models import tiny_llama_model
from tl_crosscoder.data.planted import Behaviour
from tl_crosscoder.errors import EmptyData
from tl_crosscoder.figures.activation_difference import ADDED, RANDOM, SUBTRACTED
from tl_crosscoder.models.backends import HookBackend
from tl_crosscoder.models.corpus import Corpus
from tl_crosscoder.models.drop import Drop
from tl_crosscoder.models.pair import ModelPair
from tl_crosscoder.studies.activation_difference import activation_difference
from tl_crosscoder.studies.result import StudyResult

SIZE = 2.0
WORDS = (
    "the sea was grey and the wind came from a far hill over old roofs while nobody said one word about it"
)
KEEP = Drop(sinks=None)


def pair_with(shift, noise: float = 0.0) -> ModelPair:
    """The tuned model embeds every token ``shift`` away, and with noise of its own for each token."""
    tokenizer = byte_tokenizer()
    base = tiny_llama_model(seed=3, vocab=len(tokenizer))
    tuned = copy.deepcopy(base)
    weight = tuned.get_input_embeddings().weight
    with torch.no_grad():
        weight += shift + noise * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    return ModelPair(
        HookBackend(base, tokenizer), HookBackend(tuned, tokenizer), hook="blocks.0.hook_resid_pre"
    )


def direction() -> torch.Tensor:
    v = torch.randn(16, generator=torch.Generator().manual_seed(5))
    return v / v.norm() * SIZE


def documents(n: int = 60) -> Corpus:
    rng, words = np.random.default_rng(0), WORDS.split()
    return Corpus.from_texts([" ".join(rng.choice(words, 12)) for _ in range(n)], byte_tokenizer())


def cosine(a, b) -> float:
    return float(torch.nn.functional.cosine_similarity(torch.tensor(a), torch.tensor(b), dim=0))


def test_a_planted_constant_shift_is_recovered_under_noise_as_large_as_itself():
    """Noise of norm about .5 · √16 = 2 for each token's embedding, the shift's own size; the mean keeps the shift alone."""
    v = direction()
    result = activation_difference(pair_with(v, noise=0.5), documents(400), drop=KEEP, progress=False)
    assert cosine(result.vectors[-1], v.double().tolist()) > 0.9
    exact = activation_difference(pair_with(v), documents(), drop=KEEP, progress=False)
    for vector in exact.vectors[1:]:
        assert cosine(vector, v.double().tolist()) > 0.9999
    row = exact.table.set_index("position").loc["all"]
    assert row["norm"] == pytest.approx(SIZE, rel=1e-4)
    assert row["share"] == pytest.approx(1, rel=1e-4)
    assert row["split_cosine"] == pytest.approx(1, rel=1e-4)
    assert "100%" in exact.verdict[0]


def test_the_table_is_what_a_loop_over_documents_finds():
    pair, texts = pair_with(direction(), noise=1.0), documents(9)
    result = activation_difference(pair, texts, drop=KEEP, n_first=3, progress=False)
    changes, norms = [], []
    for i in range(len(texts)):
        acts = pair.capture(texts.batch([i]))[0, :3].double()
        changes.append(acts[:, 1] - acts[:, 0])
        norms.append(acts[:, 1].norm(dim=-1))
    change, norm = torch.stack(changes), torch.stack(norms)
    table = result.table.set_index("position")
    for position, where in {"1": [1], "2": [2], "all": [1, 2]}.items():
        here = change[:, where].flatten(0, 1)
        row = table.loc[position]
        assert row["n"] == len(here)
        assert row["norm"] == pytest.approx(here.mean(0).norm().item(), rel=1e-6)
        assert row["share"] == pytest.approx(
            (here.mean(0).norm() / here.norm(dim=-1).mean()).item(), rel=1e-6
        )
        assert row["relative_norm"] == pytest.approx(
            (here.mean(0).norm() / norm[:, where].mean()).item(), rel=1e-6
        )
        halves = [change[half::2, where].flatten(0, 1).mean(0).tolist() for half in (0, 1)]
        assert row["split_cosine"] == pytest.approx(cosine(*halves), abs=1e-6)
    assert table.loc["0", "n"] == 0
    assert math.isnan(table.loc["0", "norm"])
    assert result.vectors[0] == []


def test_one_document_has_no_halves_and_the_sentence_says_so():
    result = activation_difference(pair_with(direction()), documents(1), drop=KEEP, progress=False)
    assert result.table["split_cosine"].isna().all()
    assert "(too few documents to halve)" in result.verdict[0] and "nan" not in result.verdict[0]


def test_what_is_along_a_tokens_unembedding_reads_as_that_token():
    """The final norm only scales a direction; a row of the unembedding has the highest product with itself among equals."""
    pair = pair_with(torch.zeros(16))
    head = pair.tuned.model.get_output_embeddings().weight
    [token] = pair.tokenizer("q", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        head /= head.norm(dim=-1, keepdim=True)
        pair.tuned.model.get_input_embeddings().weight += head[token]
    result = activation_difference(pair, documents(), drop=KEEP, progress=False)
    rows = result.table.set_index("position")
    assert rows.loc["all", "promoted"].startswith("«q»")
    assert "«q»" not in rows.loc["all", "suppressed"]
    assert rows.loc["0", "promoted"] == ""


def test_a_pair_of_one_model_has_no_difference_and_nothing_is_steered():
    asked = Behaviour(name="none", keywords=("x",), heldout=("hello",))
    result = activation_difference(
        pair_with(torch.zeros(16)), documents(), [asked], drop=KEEP, progress=False
    )
    assert (result.table["norm"].dropna() == 0).all()
    assert result.table["share"].isna().all()
    assert (result.table["promoted"] == "").all()
    assert result.steered.empty
    assert "nothing to read" in result.verdict[0]


@pytest.fixture(scope="module")
def steered():
    """The shift is the whole difference, so that the base model plus it is the tuned model, whatever this says."""
    pair = pair_with(direction() * 3)
    said = tuple(WORDS[i : i + 9] for i in range(4))
    asked = Behaviour(name="odd_one", keywords=("never said",), heldout=said)
    return activation_difference(
        pair, documents(), [asked], drop=Drop(first=False, sinks=None, special=False), n_controls=2,
        strengths=(3.0,), max_new_tokens=6, progress=False,
    )  # fmt: skip


def answers(result, how, strength, name="mean difference"):
    rows = result.answers.set_index(["how", "strength", "direction"]).loc[(how, strength, name)]
    return rows.set_index("prompt")["answer"].to_dict()


def itself(result):
    return result.table.set_index("position").loc["all", "relative_norm"]


def test_added_to_base_the_whole_difference_makes_it_answer_as_the_tuned_model_and_taken_away_as_the_base(
    steered,
):
    base, tuned = answers(steered, ADDED, 0), answers(steered, SUBTRACTED, 0)
    assert base != tuned
    assert answers(steered, ADDED, itself(steered)) == tuned
    assert answers(steered, SUBTRACTED, itself(steered)) == base
    assert answers(steered, ADDED, itself(steered), RANDOM) != tuned


def test_every_rate_stands_beside_random_directions_and_a_guard(steered):
    table = steered.steered.set_index(["how", "direction", "strength"])
    assert table.loc[(ADDED, "mean difference", itself(steered)), "gone"] == 1
    assert table.loc[(ADDED, RANDOM, 3.0), "n"] == 8
    assert table.loc[(ADDED, RANDOM, 3.0), "gone"] < 1  # three times an activation's norm is no text any more
    assert (table["rate"] == 0).all()  # nobody says the keyword
    assert "odd_one" in steered.verdict[1]


def test_kept_answers_are_those_to_the_prompts_that_are_asked_now(tmp_path):
    pair = pair_with(direction())
    for prompts in (("one",), ("two", "three")):
        asked = Behaviour(name="a/b", keywords=("x",), heldout=prompts)
        result = activation_difference(
            pair, documents(9), [asked], drop=KEEP, n_controls=1, strengths=(0.5,), max_new_tokens=2, parts=tmp_path,
            progress=False,
        )  # fmt: skip
        assert set(result.answers["prompt"]) == set(prompts)


def test_a_result_comes_back_from_its_json_and_draws_itself(steered):
    again = StudyResult.from_dict(steered.to_dict())
    assert again.verdict == steered.verdict
    assert again.plot().svg() == steered.plot().svg()
    assert "position" in steered.panel().table.index.names


def test_what_leaves_no_token_is_refused_with_the_remedy():
    pair = pair_with(direction())
    with pytest.raises(EmptyData, match="first=False"):
        activation_difference(pair, documents(3), drop=KEEP, n_first=1, progress=False)
    with pytest.raises(EmptyData, match="a document or more"):
        activation_difference(pair, documents(3), n_first=0, progress=False)
    with pytest.raises(ValueError, match="above 0"):
        activation_difference(pair, documents(3), strengths=(-1.0,), progress=False)
