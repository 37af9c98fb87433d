"""The command line as a user meets it: each test is a process of its own, or the same entry point in this one."""

import json
import signal
import subprocess
import sys
from dataclasses import asdict

import pandas as pd
import pytest
import torch
import typer

import tl_crosscoder as tlc
from tests.models.fake_pair import byte_tokenizer
from tests.models.tiny_models import tiny_llama_model
from tl_crosscoder import cli
from tl_crosscoder.cli.app import app
from tl_crosscoder.diffing.config import DiffConfig

VERBS = ("capture", "demo", "diff", "report", "table", "train")


def call(monkeypatch, capsys, *arguments):
    """(exit code, standard output, standard error) of one command."""
    monkeypatch.setattr(sys, "argv", ["tl-crosscoder", *map(str, arguments)])
    code = 0
    try:
        cli.main()
    except SystemExit as end:
        code = end.code or 0
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A base, a fine-tune and a model of another width, as folders; a text and a file of behaviours."""
    root = tmp_path_factory.mktemp("models")
    tokenizer = byte_tokenizer()
    for name, seed in (("base", 0), ("tuned", 1)):
        tiny_llama_model(seed, vocab=len(tokenizer)).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    other = byte_tokenizer(further=3)
    tiny_llama_model(2, vocab=len(other)).save_pretrained(root / "other")
    other.save_pretrained(root / "other")
    (root / "text.txt").write_text(
        "\n\n".join(f"document {i} says something about number {i * 7}" for i in range(60))
    )
    behaviours = [{"name": "Letters: an_odd name!", "keywords": ["e"], "heldout": ["hello", "bye"]}]
    (root / "behaviours.json").write_text(json.dumps(behaviours))
    return root


def test_help_names_every_verb_and_does_not_import_torch():
    code = """
import sys
from tl_crosscoder import cli

sys.argv = ["tl-crosscoder", "--help"]
try:
    cli.main()
except SystemExit:
    pass
assert "torch" not in sys.modules
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert all(verb in done.stdout for verb in VERBS)


def test_the_whole_job_leaves_what_was_promised_and_a_verdict(models, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run with a space"
    code, out, err = call(
        monkeypatch, capsys, "diff", models / "base", models / "tuned", "--hook", "blocks.1.hook_resid_post",
        "--text", models / "text.txt", "--behaviours", models / "behaviours.json", "--out", run,
        "--d-sae", 64, "--k", 4, "--steps", 40, "--batch-size", 64, "--context", 32, "--quiet",
    )  # fmt: skip
    assert code == 0, err
    for part in (
        "crosscoder/config.json",
        "crosscoder/model.safetensors",
        "latents.parquet",
        "metrics.json",
        "report/index.html",
    ):
        assert (run / part).is_file(), part
    metrics = json.loads((run / "metrics.json").read_text())
    kept = json.loads((run / "crosscoder" / "config.json").read_text())["extra"]
    assert kept["capture"]["tokens"] == metrics["store"]["tokens"] and kept["capture"]["drop"]["first"]
    assert kept["pair"] == metrics["pair"]
    assert metrics["verdict"][0] in out
    assert metrics["behaviour"]["table"] and metrics["substitution"]["held-out text"]["table"]
    assert len(pd.read_parquet(run / "latents.parquet")) == 64
    assert str(models) not in (run / "metrics.json").read_text()


def test_a_job_that_was_stopped_goes_on(models, tmp_path, monkeypatch, capsys):
    stopped, original = [], tlc.MSE.__call__

    def stop_once(loss, x, out, crosscoder, progress):
        if progress.step == 7 and not stopped:
            stopped.append(progress.step)
            signal.raise_signal(signal.SIGINT)
        return original(loss, x, out, crosscoder, progress)

    monkeypatch.setattr(tlc.MSE, "__call__", stop_once)
    options = ("--hook", "blocks.1.hook_resid_post", "--text", models / "text.txt", "--context", 32)
    sizes = ("--d-sae", 32, "--k", 3, "--steps", 20, "--batch-size", 64, "--quiet")
    command = ("diff", models / "base", models / "tuned", *options, *sizes, "--out", tmp_path / "run")
    code, _, err = call(monkeypatch, capsys, *command)
    assert (code, stopped) == (130, [7])
    assert "the same command goes on from there" in err
    assert not (tmp_path / "run" / "crosscoder").exists()
    first = (tmp_path / "run" / "checkpoints" / "step-00000008" / "checkpoint.json").stat().st_mtime_ns
    code, _, err = call(monkeypatch, capsys, *command)
    assert code == 0, err
    assert (tmp_path / "run" / "report" / "index.html").is_file()
    last = json.loads((tmp_path / "run" / "train.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 20
    assert (tmp_path / "run" / "checkpoints" / "step-00000020").is_dir()
    kept = tmp_path / "run" / "checkpoints" / "step-00000008" / "checkpoint.json"
    assert kept.stat().st_mtime_ns == first  # it was gone on with, not made again


def test_the_steps_can_be_taken_one_by_one(models, tmp_path, monkeypatch, capsys):
    acts, crosscoder, table = tmp_path / "acts", tmp_path / "crosscoder", tmp_path / "latents.parquet"
    steps = [
        ("capture", models / "base", models / "tuned", "--hook", "blocks.1.hook_resid_post", "--text", models / "text.txt",
         "--context", 32, "--out", acts, "--quiet", "--json"),
        ("train", acts, "--out", crosscoder, "--d-sae", 32, "--k", 3, "--steps", 30, "--batch-size", 64, "--quiet", "--json"),
        ("table", crosscoder, acts, "--out", table, "--json"),
        ("report", tmp_path),
    ]  # fmt: skip
    for step in steps:
        code, out, err = call(monkeypatch, capsys, *step)
        assert code == 0, (step[0], err)
        if "--json" in step:
            assert isinstance(json.loads(out), dict)
    assert (tmp_path / "report" / "index.html").is_file()


@pytest.fixture
def acts(models, tmp_path, monkeypatch, capsys):
    """A captured store of the models."""
    options = (
        "--hook",
        "blocks.1.hook_resid_post",
        "--text",
        models / "text.txt",
        "--context",
        32,
        "--quiet",
    )
    call(
        monkeypatch,
        capsys,
        "capture",
        models / "base",
        models / "tuned",
        *options,
        "--out",
        tmp_path / "acts",
    )
    return tmp_path / "acts"


def test_a_published_training_goes_by_its_name(acts, tmp_path, monkeypatch, capsys):
    sizes = ("--d-sae", 40, "--steps", 12, "--batch-size", 64, "--quiet", "--json")
    for name, k in (("dsf", None), ("dfc", 4)):
        more = () if k is None else ("--k", k)
        out = tmp_path / name / "crosscoder"
        code, _, err = call(monkeypatch, capsys, "train", acts, "--recipe", name, "--out", out, *sizes, *more)
        assert code == 0, err
    tied, apart = (tlc.load(tmp_path / name / "crosscoder") for name in ("dsf", "dfc"))
    assert torch.equal(tied.W_dec[:4, 0], tied.W_dec[:4, 1])
    assert not apart.W_dec[:2, 1].any()
    assert apart.W_dec[:2, 0].any()


@pytest.mark.parametrize(
    ("asked", "n_alike"), [((), 32), (("--init-same", 0.5), 20), (("--init-same", 1), 40)]
)
def test_four_latents_of_five_start_alike_in_both_models_unless_another_share_is_asked_for(
    asked, n_alike, acts, tmp_path, monkeypatch, capsys
):
    out, sizes = tmp_path / "run" / "crosscoder", ("--d-sae", 40, "--steps", 1, "--batch-size", 64, "--quiet")
    code, _, err = call(monkeypatch, capsys, "train", acts, "--out", out, *asked, "--lr", 1e-9, *sizes)
    assert code == 0, err
    base, tuned = tlc.load(out).W_dec.unbind(1)
    alike = torch.nn.functional.cosine_similarity(base, tuned) > 0.999
    assert alike[:n_alike].all() and not alike[n_alike:].any()


@pytest.mark.parametrize("verb", ["diff", "train"])
def test_the_options_of_a_training_have_the_defaults_of_its_settings(verb):
    options = {option.name: option.default for option in typer.main.get_command(app).commands[verb].params}
    settings = asdict(DiffConfig())
    both = settings.keys() & options
    assert both == {"recipe", "d_sae", "k", "steps", "batch_size", "lr", "init_same", "seed"}
    assert {name: options[name] for name in both} == {name: settings[name] for name in both}


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (("--recipe", "minder"), "known: minder_l1"),
        (("--recipe", "dsf", "--k", 4), "dsf has no k"),
        (("--recipe", "dsf", "--init-same", 0.8), "decides the start itself"),
    ],
)
def test_a_recipe_that_is_not_there_is_refused_before_work(
    asked, message, acts, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "run" / "crosscoder"
    code, _, err = call(monkeypatch, capsys, "train", acts, *asked, "--out", out, "--quiet")
    assert (code, message in err) == (2, True), err
    assert not out.parent.exists()


@pytest.mark.parametrize(
    ("change", "exit_code", "message"),
    [
        ({"--hook": "blocks.9.hook_resid_post"}, 3, "3 blocks"),
        ({"tuned": "other"}, 3, "tokenizer"),
        ({"--text": "missing.txt"}, 2, "missing.txt"),
        ({"--k": "999"}, 2, "999"),
        ({"--limit": "0"}, 2, "--limit"),
        ({"tuned": None}, 2, "--adapter"),
    ],
)
def test_bad_input_is_one_clear_sentence_and_the_right_exit_code(
    change, exit_code, message, models, tmp_path, monkeypatch, capsys
):
    options = {"--hook": "blocks.1.hook_resid_post", "--text": str(models / "text.txt"), "--k": "4"} | {
        k: v for k, v in change.items() if k.startswith("--")
    }
    tuned = change.get("tuned", "tuned")
    positional = [models / "base"] + ([models / tuned] if tuned else [])
    flat = [part for pair in options.items() for part in pair]
    code, _, err = call(
        monkeypatch, capsys, "diff", *positional, *flat, "--d-sae", 64, "--out", tmp_path / "run", "--quiet"
    )
    assert code == exit_code, err
    assert message in err
    assert "Traceback" not in err
    assert not (tmp_path / "run").exists()


def test_an_unknown_demo_pair_is_named_with_the_known_ones(monkeypatch, capsys, tmp_path):
    code, _, err = call(monkeypatch, capsys, "demo", "--pair", "nothing", "--out", tmp_path / "x", "--quiet")
    assert code == 2 and "tiny" in err and "nothing" in err


def test_debug_shows_the_traceback(monkeypatch, capsys, tmp_path):
    with pytest.raises(KeyError):
        call(monkeypatch, capsys, "--debug", "demo", "--pair", "nothing", "--out", tmp_path / "x")


@pytest.mark.parametrize(("asked", "shown"), [((), "True"), (("--quiet",), "False")])
def test_quiet_also_silences_the_bars_of_the_library_that_loads_models(asked, shown, tmp_path, monkeypatch):
    """A process of its own, for the library asks once, when it is imported; the verb itself ends at once for want of a store."""
    monkeypatch.delenv(
        "HF_HUB_DISABLE_PROGRESS_BARS", raising=False
    )  # --quiet of another test in this process
    script = (
        "import sys; from tl_crosscoder import cli\n"
        "try: cli.main()\n"
        "except SystemExit: pass\n"
        "from transformers.utils import logging; print(logging.is_progress_bar_enabled())"
    )
    verb = ("train", str(tmp_path / "nothing"), *asked)
    done = subprocess.run([sys.executable, "-c", script, *verb], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == shown
