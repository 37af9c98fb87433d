"""The studies' verbs on one small run, as a user asks them: what is printed, kept in the run, shown in the report."""

import json
import re
import shutil
import sys

import pandas as pd
import pytest

from tests.models.fake_pair import byte_tokenizer
from tests.models.tiny_models import tiny_llama_model
from tests.studies.test_openai_judge import endpoint
from tests.test_cli import call
from tl_crosscoder import cli
from tl_crosscoder.models.corpus import Corpus

SIZES = ("--d-sae", 64, "--k", 4, "--steps", 40, "--batch-size", 64, "--context", 32)


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    """(run, base, tuned, behaviours): a finished diff of two tiny models, made once."""
    root, tokenizer = tmp_path_factory.mktemp("studies"), byte_tokenizer()
    for name, seed in (("base", 0), ("tuned", 1)):
        tiny_llama_model(seed, vocab=len(tokenizer)).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    (root / "text.txt").write_text(
        "\n\n".join(f"document {i} says something about number {i * 7}" for i in range(80))
    )
    (root / "prompts.txt").write_text("\n".join(f"what is {i}?" for i in range(12)))
    (root / "open.txt").write_text("hello\n")
    behaviours = [{"name": "letters", "keywords": ["e"], "heldout": ["hello", "bye"]}]
    (root / "behaviours.json").write_text(json.dumps(behaviours))
    command = ("diff", root / "base", root / "tuned", "--hook", "blocks.1.hook_resid_post", "--text", root / "text.txt",
               "--prompts", root / "prompts.txt", "--max-new-tokens", 8, "--out", root / "run", *SIZES, "--quiet")  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["tl-crosscoder", *map(str, command)])
        with pytest.raises(SystemExit) as end:
            cli.main()
    assert not end.value.code
    return root / "run", root / "base", root / "tuned", root / "behaviours.json"


@pytest.fixture
def ask(known, monkeypatch, capsys):
    """A verb on the run; ``models``: with the two models named."""

    def asked(verb, *options, models=True):
        run, base, tuned, _ = known
        return call(monkeypatch, capsys, verb, run, *((base, tuned) if models else ()), *options)

    return asked


def kept(known, name):
    return json.loads((known[0] / "studies" / f"{name}.json").read_text())


@pytest.mark.parametrize(
    ("verb", "key", "options"),
    [
        ("mirror", "mirror-pairs", ("--draws", 2)),
        ("template", "template", ("--least", 2)),
        ("scaling", "scaling", ("--least", 5)),
    ],
)
def test_a_study_without_models_says_its_verdict_and_is_kept(verb, key, options, ask, known):
    code, out, err = ask(verb, *options, "--quiet", models=False)
    assert code == 0, err
    found = kept(known, key)
    assert found["verdict"] in out and "Warning" not in err


def test_substitution_is_asked_of_another_dictionary_too(ask, known):
    code, out, err = ask("substitution", "--main", "--published", "--against", known[0], "--quiet")
    assert code == 0, err
    found = kept(known, "substitution")
    kl = {row["condition"]: row["kl"] for row in found["table"] if row["tokens"] == "all"}
    assert kl["run: all"] == pytest.approx(kl["all"]) and kl["all"] < kl["none"]
    assert "run, " in out


def test_steering_answers_under_every_strength_and_keeps_the_answers(ask, known):
    options = (
        "--prompts",
        known[0].parent / "open.txt",
        "--strengths=-1,1",
        "--controls",
        1,
        "--text",
        2,
        "--max-new-tokens",
        4,
        "--quiet",
    )
    code, out, err = ask("steer", "--behaviours", known[3], *options)
    assert code == 0, err
    found = kept(known, "steering")
    assert {row["strength"] for row in found["table"]} == {-1.0, 0.0, 1.0}
    assert found["verdict"][0] in out and found["verdict"][0].startswith("letters, on its heldout prompts")
    assert all(row["shown"] == ("e" in row["answer"].lower()) for row in found["answers"])


def test_latents_are_described_scored_and_their_effects_shown(ask, known):
    code, out, err = ask("explain", "--top", 3, "--logits", "--causal")
    assert code == 0, err
    found = kept(known, "explain")
    assert len(found["table"]) == 6 and all(row["description"] for row in found["table"])
    assert {row["path"] for row in found["effects"]} == {"direct", "causal"}
    assert "promotes_tuned" in out and "top 3: detection score" in out


@pytest.mark.usefixtures("socket_enabled")
def test_a_judge_that_is_not_there_is_one_sentence_and_what_was_spoken_is_kept(ask, known, monkeypatch):
    monkeypatch.setattr("tl_crosscoder.studies.openai_judge.time.sleep", lambda _: None)
    options = (
        "--behaviours",
        known[3],
        "--strengths=3",
        "--controls",
        1,
        "--text",
        0,
        "--max-new-tokens",
        4,
        "--quiet",
    )
    with endpoint(lambda *_: (404, {})) as (url, seen):
        monkeypatch.setenv("OPENAI_BASE_URL", url)
        code, _, err = ask("steer", *options, "--judge", "nobody")
    assert code == 3 and "is there a model 'nobody'" in err and "Traceback" not in err
    assert len(seen) <= 16  # it does not go on asking
    spoken = {path: path.stat().st_mtime_ns for path in (known[0] / "studies" / "parts").rglob("base-*.json")}
    with endpoint(lambda *_: "perhaps") as (url, _):
        monkeypatch.setenv("OPENAI_BASE_URL", url)
        code, out, err = ask("steer", *options, "--judge", "mumbler")
    assert code == 0, err
    assert "letters: no answer could be judged; read the answers." in out
    assert spoken and all(path.stat().st_mtime_ns == when for path, when in spoken.items())


def test_single_latents_are_taken_out_of_both_models(ask, known):
    code, out, err = ask("equivalence", "--shared", 3, "--other", 1, "--probes", 8, "--quiet")
    assert code == 0, err
    found = kept(known, "equivalence")
    assert found["verdict"][0] in out and len(found["table"]) == 3  # there are shared ones only


def test_the_mean_difference_needs_no_dictionary(ask, known):
    code, out, err = ask("activation-difference", "--behaviours", known[3], "--max-new-tokens", 4, "--quiet")
    assert code == 0, err
    assert kept(known, "activation-difference")["verdict"][0] in out


def test_the_audit_ends_in_one_of_its_words(ask, known):
    code, out, err = ask("audit", "--seeds", 2, "--steps", 10, "--least", 2, "--quiet", models=False)
    assert code == 0, err
    found = kept(known, "audit")
    assert found["word"] in ("GATE_BROKEN", "DISTRIBUTION_DRIFT", "STABLE_NOT_CAUSAL", "UNDERPOWERED", "PASS")
    assert out.lstrip().startswith(found["word"])


def test_without_plain_text_the_mean_difference_says_that_it_reads_chats(ask, monkeypatch):
    flags_of = Corpus.flags_of
    every = lambda corpus, i: {name: each | True for name, each in flags_of(corpus, i).items()}
    monkeypatch.setattr(Corpus, "flags_of", every)
    asked = ("activation-difference", "--documents", 2, "--max-new-tokens", 2)
    said, quiet = ask(*asked)[2], ask(*asked, "--quiet")[2]
    assert "the run has no plain text" in " ".join(said.split()) and "no plain text" not in quiet


def test_a_run_compared_with_itself_is_the_same(known, monkeypatch, capsys, tmp_path):
    run = known[0]
    code, out, err = call(
        monkeypatch, capsys, "compare", run, run, "--draws", 2, "--out", tmp_path, "--quiet"
    )
    assert code == 0, err
    table = pd.DataFrame(json.loads((tmp_path / "result.json").read_text())["table"])
    assert (table.loc[table["class"] == "all", "share"] == 1).all() and "(100%)" in out
    assert (tmp_path / "figure.png").is_file()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"hook": "blocks.0.hook_resid_post"}, "trained at blocks.1.hook_resid_post, the other at blocks.0"),
        (
            {"tuned": {"fingerprint": "f" * 64}},
            "on the tuned model tuned, weights .*, the other on tuned, weights ffffffffffff",
        ),
    ],
)
def test_runs_of_other_models_are_not_compared(changed, message, known, monkeypatch, capsys, tmp_path):
    other = shutil.copytree(known[0], tmp_path / "other", ignore=shutil.ignore_patterns("acts"))
    config = json.loads((other / "crosscoder" / "config.json").read_text())
    pair = config["extra"]["pair"]
    for name, value in changed.items():
        pair[name] = pair[name] | value if isinstance(value, dict) else value
    (other / "crosscoder" / "config.json").write_text(json.dumps(config))
    code, _, err = call(monkeypatch, capsys, "compare", known[0], other, "--quiet")
    assert code == 3 and re.search(message, " ".join(err.split()))


@pytest.mark.parametrize(
    ("verb", "options", "message"),
    [
        ("equivalence", ("--latents", "3,x"), "wanted numbers with commas between them, got '3,x'"),
        ("explain", ("--latents", ","), "wanted numbers with commas between them, got ','"),
        ("steer", ("--adapter", "lora"), "--adapter lora wants BASE beside it"),
        ("substitution", ("--reads", "each"), "--reads says what an --against reads; there is none"),
        ("substitution", ("--tokens", 0), "Invalid value for '--tokens'"),
        (
            "audit",
            ("--off-task", __file__),
            "--off-task wants what it is held against: --task, or --behaviours",
        ),
    ],
)
def test_an_option_that_could_do_nothing_is_refused(verb, options, message, ask):
    code, _, err = ask(verb, *options, models=False)
    assert (code, message in err) == (2, True), err


def test_a_plain_prompt_is_attributed_whole_however_long_it_is(ask, known):
    found = []
    for times in (20, 40):  # 160 and 320 tokens of one byte
        code, _, err = ask(
            "attribute",
            "--plain",
            "--prompt",
            "a moon. " * times,
            "--correct",
            "x",
            "--wrong",
            "y",
            "--top",
            1,
        )
        assert code == 0, err
        found.append(kept(known, "attribution")["totals"])
    assert found[0] != found[1]


@pytest.mark.slow  # every study's figure is drawn
def test_what_was_asked_stands_in_the_report(ask, known):
    code, _, err = ask("mirror", "--draws", 1, "--quiet", models=False)
    assert code == 0, err
    code, _, err = ask("report", models=False)
    assert code == 0, err
    assert "Concepts cut in two" in (known[0] / "report" / "index.html").read_text()
