"""What an audit returns: counts, stability, ablation, and one word with its reasons."""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pandas as pd

from tl_crosscoder.figures import Drawing
from tl_crosscoder.figures.gate_counts import gate_counts
from tl_crosscoder.studies.result import StudyResult


@dataclass(frozen=True)
class AuditResult(StudyResult):
    """``word``: GATE_BROKEN, DISTRIBUTION_DRIFT, STABLE_NOT_CAUSAL, UNDERPOWERED or PASS, with its ``reasons``.

    ``table``: counts, one row an arm and threshold (see ``count_table``).  ``stability``: of the target arm's gated latents over
    seeds.  ``latents``: the first seed's gated latents with their words.  ``ablation``: what the task said, empty without one.
    ``answers``: every answer, with its condition.  ``settings``: gate, seeds, controls.
    """

    key: ClassVar = "audit"
    title: ClassVar = "Can the gate be trusted?"
    text: ClassVar = (
        "How many latents pass the gate in the pair, where both sides are the same (identity), where the difference is noise, and "
        "where the two sides read different texts (disjoint); whether other seeds find them again; whether a task needs them."
    )
    notes: ClassVar = (
        "Counts: mean a crosscoder, 95 % Poisson interval over the pooled seeds. Ratio: to the pair's own count.",
    )
    index: ClassVar = ("arm", "threshold")

    table: pd.DataFrame
    stability: pd.DataFrame
    latents: pd.DataFrame
    ablation: dict[str, Any]
    answers: pd.DataFrame
    word: str
    reasons: list[str]
    settings: dict[str, Any]

    @property
    def verdict(self) -> list[str]:
        """The word and why; then what the task said, with what it could not have seen."""
        gate = self.settings["gate"]
        said = f"{self.word} (gate: {gate['by']} above {gate['threshold']:.3g}, {len(self.settings['seeds'])} seeds)"
        return [f"{said}: {'; '.join(self.reasons)}.", *self._task(), *self._lower()]

    def _task(self) -> list[str]:
        if not self.ablation:
            return []
        a = self.ablation
        worst = f"matched sets leave {a['accuracy_matched']:.0%} (worst {a['accuracy_matched_worst']:.0%})"
        off = (
            f" Other prompts lose {a['off_effect']:+.0%} more than with matched sets."
            if "off_effect" in a
            else ""
        )
        return [
            f"Task {a['task']} ({a['n_prompts']} prompts, {a['n_latents']} latents taken out, {a['part']}): "
            f"{a['accuracy_none']:.0%} right, {a['accuracy_gated']:.0%} without the gated latents, {worst}; random directions "
            f"of their length leave {a['accuracy_turned']:.0%}. Effects below {a['mde']:.0%} could not have been seen.{off}"
        ]

    def _lower(self) -> list[str]:
        """Where nothing passes: at which threshold something would."""
        mine = self.table.query("arm == 'target'").sort_values(["threshold"])
        thresholds, means = mine["threshold"].to_numpy(float), mine["mean"].to_numpy(float)
        here = np.isclose(thresholds, self.settings["gate"]["threshold"])
        some = np.flatnonzero(means > 0)
        if not here.any() or means[here][0] > 0 or not len(some):
            return []
        last = some[-1]
        return [f"Above {thresholds[last]:.3g}, {means[last]:.3g} latents a crosscoder would pass."]

    def plot(self) -> Drawing:
        """The counts of each arm over the threshold."""
        return gate_counts(self.table, self.settings["gate"]["by"], self.settings["gate"]["threshold"])
