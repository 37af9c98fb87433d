"""The card before the Hub's own judges: the client's classes and the check of an upload; and its pictures."""

import json
import re

import numpy as np
import pandas as pd
import pytest
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from test_card import HOSTILE, STUDY, made

import tl_crosscoder as tlc
from tests.hub.local_hub import metadata_errors
from tests.hub.published import FIGURES, METRICS, run_folder, small_crosscoder, small_table
from tl_crosscoder.files import sha256
from tl_crosscoder.hub.pictures import draw_pictures
from tl_crosscoder.hub.study import Study

pytestmark = [
    pytest.mark.allow_hosts(["127.0.0.1", "::1"]),
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),
]


def test_the_clients_own_check_of_a_card_passes(hub):
    for card in (made(), made(Study()), made(Study({"pair": {"base": {"name": "base"}, "hook": "h"}}))):
        ModelCard(card).validate(repo_type="model")
    assert hub.asked("POST /api/validate-yaml") == 3


@pytest.mark.usefixtures("hub")
def test_the_clients_own_check_does_find_what_is_wrong():
    for old, new in (
        ("license: mit", "license: mine"),
        ("base_model_relation: adapter", "base_model_relation: diff"),
        ("- google/gemma-2-2b\n", "- gemma 2\n"),
        ("value: 0.75", "value: .nan"),
    ):
        assert old in made()
        with pytest.raises(ValueError, match="errors"):
            ModelCard(made().replace(old, new)).validate(repo_type="model")


@pytest.mark.parametrize("word", HOSTILE)
def test_hostile_names_leave_the_metadata_sound(word):
    study = Study(
        {"pair": {"base": {"name": word}, "tuned": {"name": word}}}, small_table(), {"title": word} | METRICS
    )
    assert metadata_errors(ModelCard(made(study)).data.to_dict()) == []


def test_results_come_back_as_the_clients_own_and_go_out_as_they_came():
    data = ModelCard(made()).data
    assert isinstance(data, ModelCardData)
    assert all(isinstance(result, EvalResult) for result in data.eval_results)
    assert {result.task_type for result in data.eval_results} == {"model-diffing"}
    assert {result.dataset_type for result in data.eval_results} == {"me/corpus"}
    assert {result.dataset_name for result in data.eval_results} == {"4,096 held-out tokens"}
    again = ModelCard(f"---\n{data.to_yaml()}\n---\n").data
    assert again.to_dict() == data.to_dict()


def test_a_publication_passes_the_check_that_the_hub_makes_of_it(hub):
    tlc.publish(small_crosscoder(), "me/cc", license="mit", language=["en"])
    assert hub.asked("POST /api/validate-yaml") == 1
    with pytest.raises(ValueError, match=r"Invalid metadata in README\.md.\n.*'English' is no code"):
        tlc.publish(small_crosscoder(), "me/dd", license="mit", language=["English"])
    assert set(hub.repositories["me/dd"].head.files) == {".gitattributes"}


def drawable():
    """A table with all that the pictures show."""
    table = small_table().assign(difference_share=np.linspace(0.3, 0, 16), n_fired=200.0, max_act=1.0)
    table.attrs["metrics"] = FIGURES
    return table


def test_the_page_shows_the_pictures_that_were_published_with_it(hub, tmp_path):
    run = run_folder(tmp_path / "run", report=False)
    drawable().to_parquet(run / "latents.parquet")
    done = tlc.publish(run, "me/cc", license="mit", figures=True)
    shown = re.findall(r"!\[[^\]]+\]\((figures/[a-z0-9-]+\.png)\)", done.card)
    assert shown == [f"figures/{name}.png" for name in ("delta-norm", "latent-scaling", "difference")]
    there = hub.repositories["me/cc"].head.files
    assert {path for path in there if path.startswith("figures/")} == set(shown)
    assert all(there[path].startswith(b"\x89PNG") for path in shown)
    again = tlc.publish(run, "me/cc", license="mit")  # without: they go in the same commit
    assert "figures/" not in again.card
    assert not any(path.startswith("figures/") for path in hub.repositories["me/cc"].head.files)


def test_a_picture_without_data_is_left_out_and_an_empty_panel_too(tmp_path):
    rows = METRICS["substitution"]["held-out text"]["table"]
    study = Study({}, pd.DataFrame({"delta_norm": [0.5, 0.9]}), {"substitution": {"<b>x": {"table": rows}}})
    assert [path for _, path in draw_pictures(tmp_path, study)] == [
        "figures/delta-norm.png",
        "figures/substitution-0.png",
    ]
    assert draw_pictures(tmp_path, Study()) == []
    assert "<b>x" not in made(STUDY, pictures=draw_pictures(tmp_path, study))


def test_the_page_tells_what_later_studies_of_these_very_weights_found(tmp_path):
    run = run_folder(tmp_path / "run")
    (run / "studies").mkdir()
    weights = sha256(run / "crosscoder" / "model.safetensors")
    for name, digest, verdict in (
        ("gate-audit", weights, ["Refused: 3 of 4 controls pass.", "See <b>the table</b>."]),
        ("stability", weights, "84% are found again."),
        ("scaling", "0" * 64, "of another crosscoder"),
    ):
        part = {"study": name, "weights_sha256": digest, "verdict": verdict}
        (run / "studies" / f"{name}.json").write_text(json.dumps(part))
    told = tlc.publish(run, "me/cc", license="mit", dry_run=True).card
    assert "- **gate audit**: Refused: 3 of 4 controls pass. See &lt;b&gt;the table&lt;/b&gt;." in told
    assert "- **stability**: 84% are found again." in told
    assert "of another crosscoder" not in told
    (run / "metrics.json").unlink()
    assert "No causal study" not in tlc.publish(run, "me/cc", license="mit", dry_run=True).card
