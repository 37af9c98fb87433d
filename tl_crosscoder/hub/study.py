"""What is known of a crosscoder when it is published."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from tl_crosscoder.hub.source import is_repo


@dataclass(frozen=True)
class Study:
    """What a crosscoder is published with, beside itself: ``extra`` of its config, the latent table, the run's figures.

    ``named`` are both models' names on the Hub, base first, each with or without ``@commit``: where they are given, they stand
    in place of those in ``extra``.  ``asked`` are the verdicts of studies that were made afterwards, by their keys.
    """

    extra: dict[str, Any] = field(default_factory=dict)
    table: pd.DataFrame | None = None
    metrics: dict[str, Any] = field(default_factory=dict)
    named: Sequence[str] = ()
    asked: dict[str, list[str]] = field(default_factory=dict)

    @property
    def pair(self) -> dict[str, Any]:
        found = self.extra.get("pair") or self.metrics.get("pair") or self.extra
        return found if isinstance(found, dict) else {}

    @property
    def validation(self) -> dict[str, Any]:
        """The figures of the whole dictionary that came with the table."""
        attrs = {} if self.table is None else self.table.attrs.get("metrics", {})
        found = attrs or self.metrics.get("dictionary") or self.extra.get("metrics")
        return found if isinstance(found, dict) else {}

    @property
    def kept(self) -> dict[str, Any]:
        """``extra`` with the figures, so that whoever loads the crosscoder can hold it to them (``check=``)."""
        figures = {
            name: value
            for name, value in self.validation.items()
            if isinstance(value, int | float) and math.isfinite(value)
        }
        return self.extra | ({"metrics": figures} if figures else {})

    @property
    def capture(self) -> dict[str, Any]:
        """Of which tokens the activations were."""
        found = self.extra.get("capture") or self.metrics.get("store")
        return found if isinstance(found, dict) else {}

    @property
    def config(self) -> dict[str, Any]:
        """How it was trained."""
        found = self.extra.get("config") or self.metrics.get("config")
        return found if isinstance(found, dict) else {}

    def model(self, side: str) -> dict[str, Any]:
        """The description of the base or the tuned model; a bare name is one too."""
        found = self.pair.get(side) or {}
        known = {"name": found} if isinstance(found, str) else found
        if len(self.named) != 2:
            return known
        name, _, revision = self.named[side == "tuned"].partition("@")
        return {**known, "name": name, "revision": revision or known.get("revision")}

    def base_models(self) -> list[str]:
        """The models' names, as far as they are names on the Hub."""
        names = [str(self.model(side).get("name") or "") for side in ("base", "tuned")]
        return list(dict.fromkeys(name for name in names if is_repo(name)))
