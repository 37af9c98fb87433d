"""``load(..., check=pair)`` on two live models: a claim that holds, and every kind that does not."""

import pandas as pd
import pytest
import torch

import tl_crosscoder as tlc
from tests.hub import format_writers as writers
from tl_crosscoder.demo import demo_pair
from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.dictionary.sparsity import ReLU
from tl_crosscoder.errors import PairMismatch
from tl_crosscoder.hub.same_models import refuse_other_models
from tl_crosscoder.models.pair import ModelPair

WIDTH = 2 * 128


@pytest.fixture(scope="module")
def pair():
    return demo_pair("tiny")


def mirror(kept: int = WIDTH) -> Crosscoder:
    """A latent for each sign of each of the first ``kept`` numbers of both models: what it keeps it keeps exactly.

    No number of a residual stream is 0, so that exactly ``kept`` latents are active a token; with all of them FVE is 1.
    """
    made = Crosscoder(128, 2 * WIDTH, ReLU())
    eye = torch.eye(WIDTH)[:, None].repeat(1, 2, 1) * torch.tensor([1.0, -1.0])[None, :, None]
    eye[kept:] = 0
    with torch.no_grad():
        made.W_enc_rows.copy_(eye.reshape(2 * WIDTH, 2, 128))
        made.W_dec.copy_(eye.reshape(2 * WIDTH, 2, 128))
        made.b_enc.zero_()
        made.b_dec.zero_()
    return made.eval()


@pytest.mark.allow_hosts(["127.0.0.1", "::1"])
@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
@pytest.mark.usefixtures("hub")
def test_a_published_card_whose_figures_hold_on_live_models_passes_with_them(pair):
    table = pd.DataFrame({"delta_norm": [0.5] * 2 * WIDTH})
    table.attrs["metrics"] = {"tokens": 4096, "l0": 256.0, "fve": 1.0}
    done = tlc.publish(mirror(), "me/cc", table=table, extra={"pair": pair.description()}, license="mit")
    assert "| latents a token (L0) | 256 |" in done.card and "| variance explained | 100.0% |" in done.card
    fit = tlc.origin(tlc.load("me/cc", check=pair)).fit
    assert fit is not None and 3000 < fit.tokens <= 4096
    assert fit.claimed == {"l0": 256.0, "fve": 1.0}
    assert fit.measured == pytest.approx(
        {"l0": WIDTH, "fve": 1.0, "fve_base": 1.0, "fve_tuned": 1.0}, rel=1e-4
    )


def test_claims_that_do_not_hold_are_refused_with_both_figures(pair, tmp_path):
    """The base model's half alone: 128 latents a token, and nothing of the tuned model."""
    half = mirror(WIDTH // 2)
    claims = {"l0": 50.0, "fve_base": 1.0, "fve_tuned": 1.0}
    tlc.save(half, tmp_path / "c", extra={"pair": pair.description(), "metrics": claims})
    with pytest.raises(PairMismatch) as refused:
        tlc.load(tmp_path / "c", check=pair)
    assert "128 latents are active a token, the files claim 50" in str(refused.value)
    assert "fve_tuned is 0, the files claim 1" in str(refused.value)
    assert "fve_base is" not in str(refused.value)  # that claim holds


def test_another_hook_other_models_and_exchanged_models_are_refused_by_name(pair, tmp_path):
    folder = tlc.save(mirror(), tmp_path / "c", extra={"pair": pair.description()})
    base, tuned = pair.base.model, pair.tuned.model
    elsewhere = ModelPair(base, tuned, hook="blocks.4.hook_resid_post", tokenizer=pair.tokenizer)
    with pytest.raises(
        PairMismatch, match=r"read at blocks\.4\.hook_resid_post, the crosscoder at blocks\.2"
    ):
        tlc.load(folder, check=elsewhere)
    exchanged = ModelPair(tuned, base, hook=pair.hook, tokenizer=pair.tokenizer)
    with pytest.raises(PairMismatch, match=r"the other way round.*Make it ModelPair\(tuned, base\)"):
        tlc.load(folder, check=exchanged)
    known = pair.description()
    other = {**known, "base": {**known["base"], "fingerprint": "f" * 64}}
    tlc.save(mirror(), tmp_path / "other", extra={"pair": other})
    with pytest.raises(PairMismatch, match=r"trained on another base model: base at .* weights ffffffffffff"):
        tlc.load(tmp_path / "other", check=pair)


def test_fingerprints_of_models_that_were_read_in_another_way_prove_nothing(pair):
    known = pair.description()
    for changed in ({"dtype": "bfloat16"}, {"class": "HookedTransformer"}, {"adapter": "on"}):
        refuse_other_models({**known, "base": {**known["base"], "fingerprint": "f" * 64, **changed}}, known)
    refuse_other_models(
        {**known, "base": {**known["base"], "fingerprint": "f"}, "transformers": "4.0"}, known
    )
    refuse_other_models(None, known)


@pytest.mark.slow
def test_the_files_of_another_tool_are_held_to_live_models_as_well(pair, tmp_path):
    theirs = writers_folder(tmp_path / "c")
    fit = tlc.origin(tlc.load(theirs, check=pair)).fit
    assert (
        fit is not None and fit.measured["l0"] == WIDTH and fit.measured["fve"] == pytest.approx(1, abs=1e-4)
    )


def writers_folder(folder):
    """dictionary_learning's layout of the same dictionary."""
    made = mirror()
    tensors = {
        "encoder.weight": made.W_enc.detach(), "encoder.bias": made.b_enc.detach(),
        "decoder.weight": made.W_dec.detach().permute(1, 0, 2), "decoder.bias": made.b_dec.detach(),
    }  # fmt: skip
    writers.write(folder, "model.safetensors", tensors, {"activation_dim": 128, "dict_size": 2 * WIDTH})
    return folder
