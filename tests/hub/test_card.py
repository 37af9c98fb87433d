"""The model card: metadata the Hub understands, figures as they were measured, hostile text as text, and code that runs."""

import re
from importlib.util import find_spec

import pytest
import torch
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

import tl_crosscoder as tlc
from tests.hub.published import EXTRA, FIGURES, METRICS, PAIR, small_crosscoder, small_table
from tl_crosscoder.hub.card import card
from tl_crosscoder.hub.study import Study

PATHS = ["config.json", "model.safetensors", "sae_lens/cfg.json", "latents.parquet", "report/index.html"]
STUDY = Study(EXTRA, small_table(), METRICS)


def made(study=STUDY, **more):
    settings = {"license": "mit", "datasets": ["me/corpus"], "language": ["en"]} | more
    return card("me/cc", small_crosscoder(), study, PATHS, **settings)


def blocks(text):
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def test_the_metadata_is_complete():
    data = ModelCard(made()).data
    assert data.library_name == "tl-crosscoder"
    assert data.license == "mit"
    assert set(data.tags) >= {
        "crosscoder",
        "model-diffing",
        "sparse-autoencoder",
        "mechanistic-interpretability",
        "transformer-lens",
    }
    assert data.base_model == ["google/gemma-2-2b", "google/gemma-2-2b-it"]
    assert data.base_model_relation == "adapter"
    assert data.datasets == ["me/corpus"]
    assert data.language == ["en"]
    assert data.model_name == "cc"
    found = {result.metric_type: result.metric_value for result in data.eval_results}
    assert found == {key: value for key, value in FIGURES.items() if key != "tokens"} | {
        "recovered_held_out_text": 0.875,
        "tuned_specific": 3,
    }


def test_the_page_tells_what_was_compared_measured_and_controlled():
    text = made()
    for words in (
        "# A tiny pair",
        "**Undoing 1 of 16 latents takes the behaviour away.**",
        "| model | [google/gemma-2-2b](https://huggingface.co/google/gemma-2-2b) |",
        f"| commit | `{'c' * 40}` | `not recorded` |",
        "| hook | `blocks.13.hook_resid_post` |",
        "| tokens left out | 12 first |",
        "| sparsity | `batch_topk(k=2,",
        "| threshold | 0.5 |",
        "| seed | `3` |",
        "On 4,096 tokens that the training never saw",
        "| variance explained, base | 75.0% |",
        "| latents a token (L0) | 2.12 |",
        "| `tuned_only` | 1 | 6.2% |",
        "3 latents pass both gates of Latent Scaling",
        "| random 3 | 2 | 1.5 | 2.5 | 0.0% |",
        "75.0% of the variance of the models' difference is left in its error.",
        "`report/index.html`",
    ):
        assert words in text, words


def test_a_crosscoder_without_figures_says_so_instead_of_leaving_it_open():
    text = made(Study())
    assert "No figures were published with it." in text
    assert "No table of the latents was published with it." in text
    assert "No causal study and no control was published with it" in text
    data = ModelCard(text).data
    assert data.base_model is None and data.eval_results is None and "transformer-lens" not in data.tags


def test_names_on_the_hub_can_be_given_with_their_commits():
    named = ("google/gemma-2-2b@" + "a" * 40, "me/tuned")
    text = made(Study({"pair": {"base": {"name": "base"}, "tuned": {"name": "tuned"}}}, named=named))
    assert f"| commit | `{'a' * 40}` | `not recorded` |" in text
    assert ModelCard(text).data.base_model == ["google/gemma-2-2b", "me/tuned"]


def test_local_names_are_not_claimed_to_be_on_the_hub():
    text = made(Study({"pair": {"base": {"name": "base"}, "tuned": {"name": "my model"}, "hook": "h"}}))
    assert "| model | `base` | `my model` |" in text
    assert ModelCard(text).data.base_model is None


@pytest.mark.allow_hosts(["127.0.0.1", "::1"])
@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
@pytest.mark.usefixtures("hub")
def test_the_load_snippet_runs_as_it_stands():
    done = tlc.publish(small_crosscoder(), "me/cc", license="mit")
    known = {}
    exec(blocks(done.card)[0], known)
    ours = small_crosscoder()
    assert known["acts"].shape == (8, 16)
    assert torch.equal(known["acts"], ours.encode(known["x"]))
    assert torch.equal(known["recon"], ours.decode(known["acts"]))


@pytest.mark.slow
@pytest.mark.skipif(find_spec("sae_lens") is None, reason="needs sae-lens")
@pytest.mark.allow_hosts(["127.0.0.1", "::1"])
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("hub")
def test_the_sae_lens_snippet_runs_as_it_stands():
    done = tlc.publish(small_crosscoder(), "me/cc", license="mit")
    known = {}
    exec(blocks(done.card)[1], known)
    x, ours = torch.randn(5, 2, 6), small_crosscoder()
    assert torch.equal(known["sae"].encode(x.flatten(1)) > 0, ours.encode(x) > 0)


HOSTILE = [
    "</script><img src=x onerror=alert(1)>",
    "a | b\n---\nlicense: other",
    "---",
    "`code` ``more`` ```",
    "[x](javascript:alert(1)) ![y](http://z)",
    "\u202eevil \x00 \u2028",
    "{{ 7 * 7 }} {% raw %}",
    "key: 'v' \"w\" # no",
]


def check_inert(word):
    """The card around one word: the metadata as without it, and the page only text where the word stands."""
    pair = PAIR | {"base": PAIR["base"] | {"revision": word, "class": word}, "hook": word}
    row = {"condition": word, "tokens": "all", "kl": 1.0, "ci_low": 0.5, "ci_high": 2.0, "recovered": 0.5}
    metrics = {"title": word, "verdict": [word, word], "substitution": {"text": {"table": [row]}}}
    text = made(Study({"pair": pair, "config": {"recipe": word}}, small_table(), metrics))
    parsed, reference = ModelCard(text), ModelCard(made())
    for name in (
        "license",
        "library_name",
        "tags",
        "base_model",
        "base_model_relation",
        "datasets",
        "language",
    ):
        assert parsed.data.to_dict().get(name) == reference.data.to_dict().get(name)
    tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(parsed.text)
    inline = [child for token in tokens for child in token.children or ()]
    assert not [token for token in [*tokens, *inline] if token.type in ("html_block", "html_inline", "image")]
    links = {token.attrGet("href") for token in inline if token.type == "link_open"}
    assert links == {f"https://huggingface.co/{PAIR[side]['name']}" for side in ("base", "tuned")}
    plain = MarkdownIt("commonmark").enable("table").parse(reference.text)
    for kind in ("table_open", "heading_open", "fence"):
        assert sum(token.type == kind for token in tokens) == sum(token.type == kind for token in plain), kind
    assert _widths(tokens) <= {2, 3, 5}


def _widths(page):
    """The numbers of cells in a row; the tables here have 2, 3 or 5 columns, the same in each of their rows."""
    widths, cells, table = set(), 0, None
    for token in page:
        table = None if token.type == "table_open" else table
        cells = 0 if token.type == "tr_open" else cells + (token.type in ("td_open", "th_open"))
        if token.type == "tr_close":
            table = table or cells
            assert cells == table
            widths.add(cells)
    return widths


@pytest.mark.parametrize("word", HOSTILE)
def test_hostile_words_stay_words(word):
    check_inert(word)


@settings(max_examples=40, deadline=None)
@given(
    st.text(
        st.characters(codec="utf-8") | st.sampled_from("|`*<>[]()!#-_~\\&\n:{}%'\""), min_size=1, max_size=30
    )
)
def test_any_words_stay_words(word):
    check_inert(word)


def test_the_page_tells_with_which_tokenizer_and_what_became_of_the_first_token():
    capture = {
        "tokens": 9000, "bos": {"id": 2, "sequences_opened_by_it": 1234}, "drop": {"first": True}, "dropped": {"first": 1234},
        "tokenizer_sha256": "a" * 64, "chat_template_sha256": None,
    }  # fmt: skip
    text = made(Study({"pair": PAIR, "capture": capture}))
    assert "| first token | 1,234 sequences begin with BOS (id 2); it was left out |" in text
    assert f"| tokenizer | vocabulary `{'a' * 16}` |" in text
    adapted = {"base": {"name": "a/b"}, "tuned": {"name": "a/b", "adapter_name": "moon"}}
    assert "| [a/b](https://huggingface.co/a/b) + adapter `moon` |" in made(Study({"pair": adapted}))
