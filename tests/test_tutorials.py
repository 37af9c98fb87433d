"""The tutorials run, at toy size, and the notebooks beside them are their executed copies."""

import os
import re
import subprocess
import sys
from pathlib import Path

import jupytext
import pytest

import tl_crosscoder

ROOT = Path(tl_crosscoder.__file__).parent.parent / "tutorials"
FEW_QUESTIONS = {
    'demo_corpus(pair, RECIPES["tiny"], seed=0)': (
        'demo_corpus(pair, __import__("dataclasses").replace(RECIPES["tiny"], n_questions=20, n_ordinary=20, n_planted=20), 0)'
    ),
}
TOY = {
    "1_known_difference": {
        "STEPS, BATCH, TOKENS = 400, 512, 20_000": "STEPS, BATCH, TOKENS = 40, 128, 4_000"
    },
    "2_base_vs_tuned": {
        "STEPS, D_SAE, TOKENS, DRAWS = 780, 1024, 200_000, 10": "STEPS, D_SAE, TOKENS, DRAWS = 30, 128, 12_000, 2",
        **FEW_QUESTIONS,
    },
    "3_is_it_real": {
        "STEPS, D_SAE, TOKENS = 500, 1024, 120_000": "STEPS, D_SAE, TOKENS = 20, 64, 6_000",
        "task=tlc.BehaviourTask(TINY.behaviours)": "task=tlc.BehaviourTask(TINY.behaviours[:1])",
        **FEW_QUESTIONS,
    },
    "4_narrow_finetune": {
        "STEPS, D_SAE, TOKENS, DRAWS = 780, 1024, 200_000, 5": "STEPS, D_SAE, TOKENS, DRAWS = 30, 128, 12_000, 2",
        **FEW_QUESTIONS,
        "take(20_000, seed=0)": "take(2_000, seed=0)",
    },
    "5_read_a_published_crosscoder": {
        "STEPS, D_SAE, TOKENS = 400, 512, 60_000": "STEPS, D_SAE, TOKENS = 120, 128, 12_000",
        **FEW_QUESTIONS,
    },
    "6_add_crosscoder_hooks_to_your_workflow": {
        "STEPS, D_SAE, TOKENS = 780, 1024, 120_000": "STEPS, D_SAE, TOKENS = 30, 128, 12_000",
        **FEW_QUESTIONS,
    },
}
NAMES = sorted(path.stem for path in ROOT.glob("[0-9]_*.py"))


@pytest.mark.parametrize("name", NAMES)
def test_a_tutorial_runs_from_top_to_bottom(name, tmp_path):
    code = (ROOT / f"{name}.py").read_text(encoding="utf-8")
    for large, small in TOY[name].items():
        assert large in code, f"{name} no longer says {large!r}"
        code = code.replace(large, small)
    (tmp_path / "toy.py").write_text(code, encoding="utf-8")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "toy.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("name", NAMES)
def test_the_notebook_beside_a_tutorial_is_its_executed_copy(name):
    source = jupytext.read(ROOT / f"{name}.py")
    notebook = jupytext.read(ROOT / f"{name}.ipynb")
    assert [cell.source for cell in notebook.cells] == [cell.source for cell in source.cells]
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code)
    assert not any(output.output_type == "error" for cell in code for output in cell.outputs)
    assert not re.search(r"/(home|root|tmp|work)/", (ROOT / f"{name}.ipynb").read_text(encoding="utf-8"))
