"""The pictures that go beside a card: of the latent table and of the studies, as far as there are data for them."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd

from tl_crosscoder.figures import Drawing, NotDrawn
from tl_crosscoder.figures.plots import (
    behaviour_bars,
    delta_norm_histogram,
    difference_share_bars,
    kl_bars,
    nu_scatter,
)
from tl_crosscoder.hub.study import Study

FOLDER = "figures"


def draw_pictures(folder: Path, study: Study) -> list[tuple[str, str]]:
    """What each picture shows and its path below ``folder``, where it now is; none of what has no data."""
    made = []
    for name, shows, draw in _all(study):
        try:
            drawing = draw()
        except NotDrawn:
            continue
        drawing.save(folder / FOLDER / f"{name}.png")
        made.append((shows, f"{FOLDER}/{name}.png"))
    return made


def _all(study: Study) -> Iterator[tuple[str, str, Callable[[], Drawing]]]:
    table, metrics = study.table, study.metrics
    if table is not None:
        yield (
            "delta-norm",
            "How many latents have which Δnorm; the tuned model's own stand at the right",
            lambda: delta_norm_histogram(table),
        )
        yield (
            "latent-scaling",
            "Latent Scaling with its gates; the lower left corner is truly tuned-only",
            lambda: nu_scatter(table),
        )
        yield (
            "difference",
            "The latents that explain most of the difference between the models",
            lambda: difference_share_bars(table),
        )
    for number, (name, part) in enumerate((metrics.get("substitution") or {}).items()):
        rows = pd.DataFrame([row for row in part.get("table") or [] if row.get("kl") is not None])
        yield (
            f"substitution-{number}",
            f"KL from the tuned model on {name}, base activations put into it; lower is closer",
            lambda rows=rows: kl_bars(rows),
        )
    answers = pd.DataFrame((metrics.get("behaviour") or {}).get("table") or [])
    yield "behaviour", "How often each behaviour shows under each condition", lambda: behaviour_bars(answers)
