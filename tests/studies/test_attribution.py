"""Logit differences attributed to latents, against a head that is linear, against finite differences, and through every library."""

import copy
import math
from importlib.metadata import version
from importlib.util import find_spec

import pandas as pd
import pytest
import torch

from tests.models.tiny_models import bridged, hooked, tiny_llama_model, traced, word_tokenizer
from tl_crosscoder import BASE, TUNED, BatchTopK, Crosscoder, Drop, Init, ModelPair, ablate
from tl_crosscoder.errors import ShapeMismatch
from tl_crosscoder.models.tokens import TokenBatch
from tl_crosscoder.studies.attribution import AttributionResult, attribution

EVERY = Drop(first=False, special=False, sinks=None)
SEES = {"bridge": bridged, "nnsight": traced} | (
    {"hooked": hooked} if int(version("transformer-lens").partition(".")[0]) < 4 else {}
)
if find_spec("nnsight") is None:
    del SEES["nnsight"]
CORRECT, WRONG = torch.tensor([7, 9]), torch.tensor([11, 30])


def models():
    return [tiny_llama_model(0), tiny_llama_model(1)]


def pair_at(layer: int, make=copy.deepcopy) -> ModelPair:
    made = [make(model) for model in models()]
    return ModelPair(*made, hook=f"blocks.{layer}.hook_resid_post", tokenizer=word_tokenizer())


def dictionary() -> Crosscoder:
    torch.manual_seed(3)
    crosscoder = Crosscoder(16, 24, BatchTopK(4), init=Init(norm=1.0, same=False)).eval()
    torch.nn.init.normal_(crosscoder.b_dec)
    crosscoder.sparsity.threshold.fill_(1.0)
    return crosscoder


def texts(padding: str = "right") -> TokenBatch:
    ids = torch.randint(3, 61, (2, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[1, 4:] = False
    return TokenBatch.from_ids(ids, mask).padded("left" if padding == "left" else "right")


def difference_of(pair, batch, edit=None, side="tuned"):
    logits = pair.run(batch, edit, side)
    place = batch.attention_mask.shape[1] - 1 - batch.attention_mask.flip(1).long().argmax(1)
    last = logits[torch.arange(2), place]
    return (last[torch.arange(2), CORRECT] - last[torch.arange(2), WRONG]).mean().item()


def test_where_the_rest_of_the_model_is_linear_gradient_and_ablation_agree_with_the_closed_form():
    # After the last block, with the final norm taken out, the logits are W_U h: only the last token counts.
    pair, crosscoder, batch = pair_at(2), dictionary(), texts()
    for backend in (pair.base, pair.tuned):
        backend.model.model.norm = torch.nn.Identity()
    result = attribution(crosscoder, pair, batch, CORRECT, WRONG, top=24, drop=EVERY)
    acts = pair.capture(batch)[torch.arange(2), batch.lengths - 1].double()
    f = crosscoder.encode(acts.float()).double()
    for name, model in (("base", BASE), ("tuned", TUNED)):
        W_U = pair.sides(name)[0].model.lm_head.weight.double()
        reads = W_U[CORRECT] - W_U[WRONG]
        want = (f * (reads @ crosscoder.raw_rows()[:, model].double().T)).mean(0)
        table = result.table.set_index("latent")
        assert want[table.index].abs().max() > 0.1
        for column in (f"gradient_{name}", f"exact_{name}"):
            torch.testing.assert_close(torch.tensor(table[column]), want[table.index], rtol=1e-4, atol=1e-5)
        total = result.totals.set_index("model").loc[name]
        assert total["total"] == pytest.approx((acts[:, model] * reads).sum(1).mean().item(), rel=1e-4)
        assert total["logit_difference"] == pytest.approx(total["total"], rel=1e-4)
        assert total["latents"] == pytest.approx(want.sum().item(), rel=1e-4)


def test_the_gradient_is_what_a_little_less_of_a_latent_does_and_exact_is_what_none_of_it_does():
    pair, crosscoder, batch = pair_at(0), dictionary(), texts()
    result = attribution(crosscoder, pair, batch, CORRECT, WRONG, top=3, drop=EVERY)
    where, acts = batch.attention_mask, pair.capture(batch)
    for _, row in result.table.head(3).iterrows():
        for side, model in (("base", BASE), ("tuned", TUNED)):
            taken = lambda scale, row=row, model=model: ablate(
                crosscoder, [int(row["latent"])], acts[:, :, 1 - model], model=model, scale=scale, mask=where
            )
            clean = difference_of(pair, batch, side=side)
            slope = (
                difference_of(pair, batch, taken(1.01), side) - difference_of(pair, batch, taken(0.99), side)
            ) / 0.02
            assert row[f"gradient_{side}"] == pytest.approx(slope, rel=0.02, abs=2e-4)
            lost = clean - difference_of(pair, batch, taken(0.0), side)
            assert row[f"exact_{side}"] == pytest.approx(lost, rel=1e-3, abs=1e-5)
    assert result.table["exact_tuned"].notna().sum() == 3


@pytest.mark.parametrize("library", SEES)
def test_every_library_attributes_alike(library):
    plain, other, batch = pair_at(1), pair_at(1, SEES[library]), texts("left")
    want, got = (attribution(dictionary(), pair, batch, 7, 11, top=4) for pair in (plain, other))
    assert list(got.table["latent"]) == list(want.table["latent"])
    for column in ("gradient_base", "gradient_tuned", "exact_base", "exact_tuned"):
        assert got.table[column].tolist() == pytest.approx(
            want.table[column].tolist(), rel=1e-3, abs=1e-5, nan_ok=True
        )


def test_padding_on_either_side_changes_nothing():
    pair = pair_at(1)
    left, right = (
        attribution(dictionary(), pair, texts(side), CORRECT, WRONG, top=4) for side in ("left", "right")
    )
    assert left.table["gradient_tuned"].tolist() == pytest.approx(
        right.table["gradient_tuned"].tolist(), abs=1e-5
    )
    assert left.to_dict()["totals"][1]["latents"] == pytest.approx(
        right.to_dict()["totals"][1]["latents"], abs=1e-5
    )


def test_the_parts_add_up_and_are_drawn_and_read_back():
    result = attribution(dictionary(), pair_at(1), texts(), 7, 11, top=4)
    totals = result.totals.set_index("model")
    assert totals.loc["tuned", "latents"] == pytest.approx(result.table["gradient_tuned"].sum(), rel=1e-6)
    assert "logit" in result.verdict and result.plot().svg().startswith("<svg")
    assert type(result).from_dict(result.to_dict()).verdict == result.verdict


def test_the_latent_that_counts_most_in_the_tuned_model_is_named_where_another_counts_more_in_base():
    table = pd.DataFrame(
        {
            "latent": [7, 3],
            "gradient_base": [5.0, 0.1],
            "gradient_tuned": [0.01, -2.0],
            "exact_base": [4.0, math.nan],
            "exact_tuned": [0.02, math.nan],
        }
    )
    totals = pd.DataFrame({"model": ["base", "tuned"], "logit_difference": [1.0, 2.0], "total": [1.0, 2.0]})
    said = AttributionResult(table, totals.assign(latents=1.5, error=0.1, bias=0.4)).verdict
    assert "latent 3 the most: -2 by gradient." in said


def test_a_wrong_number_of_ids_is_refused_before_anything_runs():
    with pytest.raises(ShapeMismatch, match="one for each of 2 texts; got 3"):
        attribution(dictionary(), pair_at(1), texts(), [1, 2, 3], 4)
