"""The vectors that steering adds: chosen latents, alone and together, and controls of the same norm."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.studies.controls import matched_random
from tl_crosscoder.types import BASE, TUNED
from tl_crosscoder.widths import refuse_unlike

LATENTS, RANDOM_LATENTS, RANDOM_DIRECTIONS = "latents", "random latents", "random directions"


@dataclass(frozen=True)
class Push:
    """What is added at strength 1: a vector in raw units.  ``unit``: the activation that is, of a single latent."""

    target: str
    kind: str
    draw: int
    vector: Float[Tensor, " d_in"]
    unit: float = math.nan


def pushes(
    crosscoder: Crosscoder,
    table: pd.DataFrame,
    latents: Sequence[int],
    *,
    part: Literal["whole", "difference"],
    n_controls: int,
    seed: int,
) -> list[Push]:
    """Each latent, all together, and ``n_controls`` of each kind for each, drawn anew and scaled to its norm.

    Latents that write nothing of the ``part`` (tied decoders have no difference) are no controls; where too few others are left
    for a set, there are random directions alone.
    Raises ValueError for latents that never fired, or that write nothing.
    """
    refuse_unlike(crosscoder, "steering both models along one direction")
    raw = crosscoder.raw_rows().detach().float().cpu()
    rows = raw[:, TUNED] - raw[:, BASE] if part == "difference" else raw[:, TUNED]
    largest = torch.zeros(len(rows)).index_copy_(
        0, torch.tensor(table.index.to_numpy(int)), torch.tensor(table["max_act"].to_numpy("float32"))
    )
    if silent := [j for j in latents if not largest[j] > 0]:
        raise ValueError(
            f"latents {silent} never fired: strength 1 is the largest activation, and they have none."
        )
    targets = {f"latent {j}": [j] for j in latents}
    if len(targets) > 1:
        targets[f"all {len(targets)}"] = list(latents)

    def written(ids: list[int]) -> Tensor:
        return (largest[ids, None] * rows[ids]).sum(0)

    made: list[Push] = []
    live = table.index[table["n_fired"].to_numpy() > 0]
    mute = [j for j in live.tolist() if not rows[j].any()]
    n_free = len(set(live) - {*mute, *latents})
    for number, (name, ids) in enumerate(targets.items()):
        vector = written(ids)
        size = vector.norm()
        if not size > 0:
            where = (
                "the tuned model that base's decoder has not" if part == "difference" else "the tuned model"
            )
            raise ValueError(f"{name} writes nothing into {where}: there is no direction to steer along.")
        made.append(Push(name, LATENTS, 0, vector, float(largest[ids[0]]) if len(ids) == 1 else math.nan))
        draws = (
            matched_random(
                table, ids, n_draws=n_controls, seed=seed + number, exclude=sorted({*latents, *mute})
            )
            if n_free >= len(ids)
            else []
        )
        generator = torch.Generator().manual_seed(seed + number)
        for draw in range(n_controls):
            free = torch.randn(len(vector), generator=generator)
            others = [(RANDOM_LATENTS, written(draws[draw]))] if draws else []
            for kind, v in (*others, (RANDOM_DIRECTIONS, free)):
                made.append(Push(name, kind, draw, v / v.norm() * size))
    return made


def digest(made: list[Push]) -> str:
    """sha256 of the vectors and what they are called: all that steering takes from the crosscoder."""
    names = repr([(p.target, p.kind, p.draw) for p in made]).encode()
    return hashlib.sha256(names + torch.stack([p.vector for p in made]).numpy().tobytes()).hexdigest()
