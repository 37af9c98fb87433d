"""Answers while a fixed direction is added to the base model or taken from the tuned one, beside random directions of its norm."""

import hashlib
import json
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from tl_crosscoder.data.planted import Behaviour
from tl_crosscoder.figures.activation_difference import ADDED, DIFFERENCE, RANDOM, SUBTRACTED
from tl_crosscoder.models.drop import Drop
from tl_crosscoder.models.pair import ModelPair, Side
from tl_crosscoder.studies.intervals import wilson
from tl_crosscoder.studies.parts import Parts
from tl_crosscoder.studies.sweep import Sweep

#: whom, in which direction, what counts as success, and how it is said
WAYS: dict[str, tuple[Side, int, str, str]] = {
    ADDED: ("base", 1, "rate_coherent", "that show it"),
    SUBTRACTED: ("tuned", -1, "gone", "that do not show it"),
}


def steered_answers(
    pair: ModelPair,
    behaviour: Behaviour,
    direction: Tensor,
    norms: dict[float, float],
    n_controls: int,
    drop: Drop,
    max_new_tokens: int,
    seed: int,
    kept: Parts,
) -> pd.DataFrame:
    """The answers without steering and at each strength, with the difference and with random directions of its norm."""
    how: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": 0.0, "seed": seed}
    sweep = Sweep(pair, list(behaviour.heldout), None, drop=drop, **how)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(n_controls, len(direction), generator=generator, dtype=torch.float64)
    vectors = [(DIFFERENCE, direction), *((RANDOM, v) for v in drawn)]
    asked = hashlib.sha256(json.dumps(behaviour.heldout).encode()).hexdigest()[:16]
    strength = {norm: s for s, norm in norms.items()} | {0.0: 0.0}
    rows = []
    for way, (side, sign, _, _) in WAYS.items():
        for number, (name, vector) in enumerate(vectors):
            unit = (sign * vector / vector.norm()).float()
            at = [*norms.values()] + ([0.0] if number == 0 else [])
            answers = kept(f"{asked}-{side}-{number}", lambda s=side, v=unit, at=at: sweep.speak(s, v, at))
            about = {"behaviour": behaviour.name, "how": way, "direction": name}
            rows += [about | answer | {"strength": strength[answer["strength"]]} for answer in answers]
    frame = pd.DataFrame(rows)
    frame["shown"] = [behaviour.shown_in(answer) for answer in frame["answer"]]
    surprise = frame[["nll_base", "nll_tuned"]].min(axis=1) / frame["n_tokens"]
    frame["coherent"] = surprise <= surprise[frame["strength"] == 0].max() + 1e-6
    frame["perplexity"] = np.exp(surprise)
    return frame.drop(columns=["nll_base", "nll_tuned", "nll_text", "n_tokens"])


def rates(answers: pd.DataFrame) -> pd.DataFrame:
    """A row a behaviour, way, direction and strength: the shares of its answers; random directions are pooled."""
    keys, rows = ["behaviour", "how", "direction", "strength"], []
    groups: Any = answers.groupby(keys, sort=False)
    for key, group in groups:
        rate, low, high = wilson(int(group["shown"].sum()), len(group))
        shown, coherent = group["shown"], group["coherent"]
        row = {"rate": rate, "low": low, "high": high, "n": len(group)}
        row |= {"rate_coherent": (shown & coherent).mean(), "gone": (~shown & coherent).mean()}
        rows.append(dict(zip(keys, key, strict=True)) | row)
    return pd.DataFrame(rows).sort_values(keys, kind="stable", ignore_index=True)
