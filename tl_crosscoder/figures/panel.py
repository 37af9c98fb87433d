"""One part of a report: a sentence or two, a figure, a table; and the parts that every report has."""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import pandas as pd

from tl_crosscoder.figures.drawing import Drawing, NotDrawn
from tl_crosscoder.figures.plots import (
    delta_norm_histogram,
    difference_share_bars,
    nu_scatter,
    training_curves,
)


@dataclass(frozen=True)
class Panel:
    """One section of the report's index page, in plain data.

    ``key`` names its anchor and its files (lower-case letters, digits and hyphens).  ``text`` is one or two sentences that say
    what is seen.  ``findings`` stand above the evidence: what was found.  ``figure`` is SVG text.  ``notes`` are caveats, printed
    small.
    """

    key: str
    title: str
    text: str = ""
    table: pd.DataFrame | None = None
    figure: str | None = None
    notes: tuple[str, ...] = ()
    findings: tuple[str, ...] = ()

    def __post_init__(self):
        if not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,63}", self.key):
            raise ValueError(
                f"a panel's key names its files: lower-case letters, digits and hyphens, got {self.key!r}"
            )

    def drawn(self, draw: Callable[[], Drawing]) -> "Panel":
        """This panel with the figure that ``draw()`` returns or, where its data are absent, with a note that says what is."""
        try:
            return replace(self, figure=draw().svg())
        except NotDrawn as reason:
            return replace(self, notes=(*self.notes, f"Not drawn: {reason}."))


TRAINING = Panel("training", "Training", "Where these curves have not settled, nothing below can be trusted.")
DELTA_NORM = Panel(
    "delta-norm",
    "Which model holds each latent",
    "Δnorm compares the norms of a latent's two decoder directions. What both models share stands in the middle; what fine-tuning "
    "added stands at the right.",
)
SCALING = Panel(
    "latent-scaling",
    "Is it really new?",
    "A latent can look tuned-only because the base model's copy was shrunk away (high ν of the error) or because other latents "
    "write it there (high ν of the reconstruction). The lower left corner survives both.",
)
DIFFERENCE = Panel(
    "difference",
    "What carries the difference",
    "The latents that explain most of the difference between the two models' activations.",
)


def standard_panels(table: pd.DataFrame, history: pd.DataFrame | None = None) -> list[Panel]:
    """What every report shows: the training curves, Δnorm, Latent Scaling and the shares of the difference."""
    curves = [] if history is None else [TRAINING.drawn(lambda: training_curves(history))]
    norms, scaling = (
        DELTA_NORM.drawn(lambda: delta_norm_histogram(table)),
        SCALING.drawn(lambda: nu_scatter(table)),
    )
    return [*curves, norms, scaling, DIFFERENCE.drawn(lambda: difference_share_bars(table))]
