import json
import math

import numpy as np
import pandas as pd
import pytest

from tl_crosscoder.data.planted import Behaviour
from tl_crosscoder.studies.gate_audit.ablation import effects
from tl_crosscoder.studies.gate_audit.tasks import BehaviourTask, ExactMatch, Task, Unchanged

N = 80


def rows(right, on_task=True):
    """``right``: kind -> [condition, prompt] of 0 or 1; log-probability and KL follow it."""
    made, number = [], 0
    for kind, grid in right.items():
        for correct in np.atleast_2d(grid):
            for prompt, c in enumerate(correct):
                about = {
                    "condition": number,
                    "kind": kind,
                    "on_task": on_task,
                    "prompt": str(prompt),
                    "answer": "",
                }
                made.append(about | {"correct": bool(c), "log_prob": -1.0 - (1 - c), "kl": 1.0 - c})
            number += 1
    return pd.DataFrame(made)


ALL, NOTHING = np.ones(N), np.zeros(N)


def test_a_set_that_alone_is_needed_is_specific():
    rng = np.random.default_rng(0)
    matched = rng.random((20, N)) < 0.95
    found = effects(
        rows({"none": ALL, "gated": NOTHING, "matched": matched, "turned": [ALL] * 3}), 0.05, n_resamples=500
    )
    assert found["effect"] == pytest.approx(matched.mean()) and found["low"] > 0.9
    assert found["rank_p"] == 1 / 21 and found["mcnemar_none"] == [N, 0, pytest.approx(2**-79)]
    assert found["harmless_p"] == 1 and found["holm"]["correct"] < 1e-9 and found["accuracy_turned"] == 1
    assert "off_effect" not in found


def test_sets_that_all_do_nothing_are_equivalent():
    found = effects(rows({"none": ALL, "gated": ALL, "matched": [ALL] * 20}), 0.05, n_resamples=500)
    assert found["effect"] == 0 and found["equivalence_p"] == found["harmless_p"] == pytest.approx(0.95**N)
    assert found["rank_p"] == 1 and math.isnan(found["accuracy_turned"]) and found["mde"] < 0.05


def test_a_loss_that_other_prompts_share_is_not_the_tasks():
    on = rows({"none": ALL, "gated": NOTHING, "matched": [ALL] * 20})
    found = effects(
        pd.concat([on, rows({"none": ALL, "gated": NOTHING, "matched": [ALL] * 20}, False)]),
        0.05,
        n_resamples=500,
    )
    assert found["off_effect"] == 1 and found["on_minus_off_low"] == 0
    found = effects(
        pd.concat([on, rows({"none": ALL, "gated": ALL, "matched": [ALL] * 20}, False)]),
        0.05,
        n_resamples=500,
    )
    assert found["off_effect"] == 0 and found["on_minus_off_low"] == 1


def test_tasks_know_a_right_answer(tmp_path):
    path = tmp_path / "sums.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": f"{n}+1", "answer": str(n + 1)}) + "\n" for n in range(3)) + "\n"
    )
    task = ExactMatch.from_file(path)
    assert (task.name, task.prompts, task.gold) == ("sums", ("0+1", "1+1", "2+1"), ("1", "2", "3"))
    assert task.correct(1, " 2 ", "") and not task.correct(1, "2 or so", "")
    planted = BehaviourTask((Behaviour("a", ("x",), ("p", "q")), Behaviour("b", ("y",), ("r",))))
    assert (
        planted.prompts == ("p", "q", "r") and planted.correct(2, "Y", "") and not planted.correct(1, "y", "")
    )
    assert Unchanged("u", ("p",)).correct(0, "same", "same")
    assert all(isinstance(t, Task) for t in (task, planted, Unchanged("u", ("p",))))


@pytest.mark.parametrize("line", ["{", '{"prompt": "a"}', '["a", "b"]'])
def test_a_task_file_that_is_none_is_refused_with_its_line(tmp_path, line):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "a", "answer": "b"}\n' + line)
    with pytest.raises(ValueError, match="line 2: wanted"):
        ExactMatch.from_file(path)
    path.write_text("\n")
    with pytest.raises(ValueError, match="holds no prompt"):
        ExactMatch.from_file(path)
