"""DiffReport: a run folder, opened."""

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from tl_crosscoder.analysis.base import run
from tl_crosscoder.analysis.max_acts import MaxActs
from tl_crosscoder.analysis.table import ranked
from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.diffing.config import DiffConfig
from tl_crosscoder.diffing.examples import latent_examples
from tl_crosscoder.diffing.folder import RunFolder, write_json
from tl_crosscoder.figures import Panel
from tl_crosscoder.files import sha256
from tl_crosscoder.hub.save import WEIGHTS, load, read_config
from tl_crosscoder.models.activations import PairedActivations
from tl_crosscoder.report import write_report
from tl_crosscoder.studies import StudyResult
from tl_crosscoder.studies.behaviour import BehaviourResult
from tl_crosscoder.studies.substitution import SubstitutionResult

PAGES = 40  # latents with a page of their own


class DiffReport:
    """What a run found: ``crosscoder``, ``table``, ``metrics``, ``verdict``, read from its folder when first used."""

    def __init__(self, directory: str | Path):
        self.folder = RunFolder(Path(directory))
        for part in (self.folder.crosscoder, self.folder.table):
            if not part.exists():
                raise FileNotFoundError(
                    f"{directory} is not a finished run: {part.name} is missing; run capture, train and table first."
                )

    @cached_property
    def crosscoder(self) -> Crosscoder:
        return load(self.folder.crosscoder)

    @cached_property
    def table(self) -> pd.DataFrame:
        return pd.read_parquet(self.folder.table)

    @cached_property
    def metrics(self) -> dict[str, Any]:
        """Everything in ``metrics.json``; empty for a run made of single steps, or where the table was made anew since."""
        if not self.folder.metrics.exists():
            return {}
        metrics = json.loads(self.folder.metrics.read_text(encoding="utf-8"))
        return metrics if metrics.get("table_sha256") == sha256(self.folder.table) else {}

    @cached_property
    def config(self) -> DiffConfig:
        """What the crosscoder was made with."""
        return DiffConfig.of(read_config(self.folder.crosscoder).get("extra") or {})

    @cached_property
    def history(self) -> pd.DataFrame | None:
        if not self.folder.log.exists():
            return None
        return pd.read_json(self.folder.log, lines=True).set_index("step")

    @property
    def verdict(self) -> list[str]:
        """The headline and the sentences after it."""
        return self.metrics.get("verdict") or [
            f"{len(self.table):,} latents; no study was run on this crosscoder."
        ]

    def top(self, n: int, by: str | None = None) -> list[int]:
        """The ``n`` live latents highest in the run's ranking (or in column ``by``)."""
        return ranked(self.table, by or self.config.ranking)[:n]

    @cached_property
    def store(self) -> PairedActivations:
        """The captured activations, read as they are needed."""
        return PairedActivations.open(self.folder.acts, verify=False)

    @cached_property
    def held_out(self) -> PairedActivations:
        """The part of the store that the crosscoder never saw."""
        return self.store.split(1 - self.config.held_out, self.config.seed)[1]

    def add(self, result: StudyResult, name: str | None = None) -> Path:
        """Keep what a study found, under its key or ``name``; the next ``write()`` shows it."""
        path = self.folder.studies / f"{name or result.key}.json"
        path.parent.mkdir(exist_ok=True)
        write_json(path, {"weights_sha256": self._weights} | result.to_dict())
        return path

    @property
    def studies(self) -> dict[str, StudyResult]:
        """What was added, by name; without what was found with other weights than the crosscoder has now."""
        parts = self._studied()
        return {
            name: StudyResult.from_dict(part)
            for name, part in parts.items()
            if self._is_of_these_weights(part)
        }

    def write(self, pages: int = PAGES) -> Path:
        """Write ``report/`` from what the folder holds; the path of its ``index.html``.  Without ``acts/`` it has no examples."""
        latents, examples = self.top(pages), {}
        if self.folder.acts.exists():
            tops = MaxActs(self.crosscoder)
            run(self.crosscoder, self.held_out, [tops])
            examples = latent_examples(self.crosscoder, self.held_out, tops, latents)
        ranked = self.table.loc[latents + [j for j in self.table.index if j not in set(latents)]]
        behaviour = self.metrics.get("behaviour")
        write_report(
            self.folder.report,
            title=self.metrics.get("title", "What fine-tuning changed"),
            verdict=self.verdict,
            facts=self._facts(),
            table=ranked,
            history=self.history,
            panels=self._panels(),
            examples=examples,
            answers=behaviour["answers"] if behaviour else None,
        )
        return self.folder.report / "index.html"

    def _panels(self) -> list[Panel]:
        substituted = self.metrics.get("substitution", {}).items()
        panels = [
            SubstitutionResult.from_dict(part).panel(f"substitution-{number}", name)
            for number, (name, part) in enumerate(substituted)
        ]
        if removed := self.metrics.get("behaviour"):
            panels.append(BehaviourResult.from_dict(removed).panel())
        return panels + [found.panel(f"study-{name}") for name, found in self.studies.items()]

    def _studied(self) -> dict[str, dict[str, Any]]:
        files = sorted(self.folder.studies.glob("*.json"))
        return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in files}

    def _is_of_these_weights(self, part: dict[str, Any]) -> bool:
        return part["weights_sha256"] == self._weights

    @cached_property
    def _weights(self) -> str:
        return sha256(self.folder.crosscoder / WEIGHTS)

    def _facts(self) -> dict[str, str]:
        pair, numbers, cc = self.metrics.get("pair", {}), self.table.attrs.get("metrics", {}), self.crosscoder
        facts = {side: _named(pair[side]) for side in ("base", "tuned") if side in pair}
        facts |= {"hook": pair["hook"]} if "hook" in pair else {}
        facts |= {"dictionary": f"{cc.d_sae:,} latents of {cc.n_models} × {cc.d_in} dimensions"}
        if numbers:
            facts |= {
                "latents a token": f"{numbers['l0']:.1f}",
                "variance explained": f"base {numbers['fve_base']:.1%}, tuned {numbers['fve_tuned']:.1%}, "
                f"difference {numbers['fve_difference']:.1%}",
                "never active": f"{numbers['dead_fraction']:.1%}",
                "held-out tokens": f"{numbers['tokens']:,}",
            }
        if stale := [name for name, part in self._studied().items() if not self._is_of_these_weights(part)]:
            facts |= {"not shown": f"{', '.join(stale)}: found with other weights; run again"}
        if dropped := self.metrics.get("store", {}).get("dropped"):
            facts |= {"left out": ", ".join(f"{n:,} {reason}" for reason, n in dropped.items())}
        return facts

    def __repr__(self) -> str:
        return f"DiffReport({str(self.folder.root)!r}): {self.verdict[0]}"


def _named(model: dict[str, Any]) -> str:
    adapter = {"on": ", adapter", "merged": ", adapter merged"}.get(model.get("adapter") or "", "")
    return f"{model.get('name')}{adapter}"
