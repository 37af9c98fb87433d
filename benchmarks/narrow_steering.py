"""What steering with a behaviour's latent does, over strengths and beside random latents at the same norm."""

from typing import Any

import numpy as np
import pandas as pd
import torch
from narrow_marks import Bench

from tl_crosscoder.data.planted import Behaviour
from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.models.pair import Side
from tl_crosscoder.studies.sweep import Sweep
from tl_crosscoder.types import BASE, TUNED

#: The three things that are asked: of whom, with which prompts, in which direction.
QUESTIONS: dict[str, tuple[Side, str, int]] = {
    "raise": ("tuned", "near", 1),
    "induce": ("base", "heldout", 1),
    "mitigate": ("tuned", "heldout", -1),
}
N_RANDOM = 2


def steering(
    bench: Bench,
    crosscoder: Crosscoder,
    table: pd.DataFrame,
    behaviour: Behaviour,
    latent: int,
    *,
    strengths: list[float],
    n_prompts: int,
) -> list[dict[str, Any]]:
    """Rates when a direction is added at every kept token: the latent's ``d_tuned − d_base``, its ``d_tuned``, random ``d_tuned``.

    Strength 1 adds the median norm of the tuned model's activations.  ``shown``: the share of the answers that show the behaviour;
    ``rate``: that show it and are coherent; ``gone``: that are coherent and do not.  Coherent: no more surprising, to the model
    that finds it the less so, than the most surprising answer of the two models on the same prompts without steering.
    """
    rows = crosscoder.raw_rows().detach()
    live = [j for j in table.index[table["n_fired"] > 0] if j != latent]
    others = np.random.default_rng(latent).choice(live, N_RANDOM, replace=False).tolist()
    directions = {"difference": rows[latent, TUNED] - rows[latent, BASE], "tuned": rows[latent, TUNED]}
    directions |= {f"random#{i}": rows[j, TUNED] for i, j in enumerate(others)}
    how: dict[str, Any] = {"max_new_tokens": bench.recipe.max_new_tokens, "temperature": 0.0, "seed": 0}
    found = []
    for kind in ("near", "heldout"):
        prompts = list(getattr(behaviour, kind))[:n_prompts]
        sweep = Sweep(bench.pair, prompts, None, drop=bench.recipe.drop, **how)
        nothing = torch.zeros_like(rows[0, TUNED])
        plain = {side: sweep.speak(side, nothing, [0.0]) for side in ("base", "tuned")}
        ceiling = max(surprise(answer) for said in plain.values() for answer in said) + 1e-6
        for question, (side, asked, sign) in QUESTIONS.items():
            if asked != kind:
                continue
            said = {("nothing", 0.0): plain[side]}
            for name, direction in directions.items():
                vector = direction / direction.norm().clamp(min=1e-12) * sweep.typical_norm["tuned"]
                answers = sweep.speak(side, vector, [sign * s for s in strengths])
                said |= {(name, s): [a for a in answers if a["strength"] == sign * s] for s in strengths}
            for (name, strength), answers in said.items():
                about = {"question": question, "direction": name, "strength": sign * strength}
                found.append(about | rates(behaviour, answers, ceiling))
    return found


def surprise(answer: dict[str, Any]) -> float:
    """Nats a token, for the unsteered model that finds it the less surprising."""
    return min(answer["nll_base"], answer["nll_tuned"]) / answer["n_tokens"]


def rates(behaviour: Behaviour, answers: list[dict[str, Any]], ceiling: float) -> dict[str, Any]:
    shown = np.array([behaviour.shown_in(answer["answer"]) for answer in answers])
    coherent = np.array([surprise(answer) <= ceiling for answer in answers])
    marks = {"shown": shown, "rate": shown & coherent, "gone": ~shown & coherent}
    return {name: float(mark.mean()) for name, mark in marks.items()} | {"answer": answers[0]["answer"]}
