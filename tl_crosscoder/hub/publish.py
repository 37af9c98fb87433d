"""A crosscoder onto the Hub: laid out in a folder, checked, and committed as one, or not at all."""

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.files import read_json, sha256
from tl_crosscoder.hub.card import card
from tl_crosscoder.hub.checks import Check, check_all
from tl_crosscoder.hub.folder import saved_in
from tl_crosscoder.hub.manifest import paths_in, write_manifest
from tl_crosscoder.hub.pictures import draw_pictures
from tl_crosscoder.hub.push import push
from tl_crosscoder.hub.save import WEIGHTS, load, read_config, save
from tl_crosscoder.hub.source import check_repo
from tl_crosscoder.hub.study import Study
from tl_crosscoder.models.manifest import MANIFEST as ACTS_MANIFEST
from tl_crosscoder.models.manifest import read_manifest, trained_on

README, TABLE, REPORT, ACTS = "README.md", "latents.parquet", "report", "acts"
LARGEST_METRICS = 64 << 20  # bytes


@dataclass(frozen=True)
class Publication:
    """What was published, or would be: ``files`` in bytes; ``commit`` is None after a dry run."""

    repo: str
    private: bool
    files: dict[str, int]
    card: str
    checks: tuple[Check, ...]
    commit: str | None = None

    @property
    def refused(self) -> list[Check]:
        """The checks that forbid it."""
        return [check for check in self.checks if check.needed and not check.passed]

    @property
    def url(self) -> str | None:
        """The page of the commit."""
        from huggingface_hub import constants

        return f"{constants.ENDPOINT}/{self.repo}/tree/{self.commit}" if self.commit else None


def publish(
    what: Crosscoder | str | Path,
    repo: str,
    *,
    license: str | None = None,
    private: bool = True,
    dry_run: bool = False,
    report: bool | str | Path = False,
    figures: bool = False,
    base_model: Sequence[str] = (),
    datasets: Sequence[str] = (),
    language: Sequence[str] = (),
    table: pd.DataFrame | None = None,
    metrics: dict[str, Any] | None = None,
    extra: dict[str, Any] | None = None,
    allow: Sequence[str] = (),
    token: str | None = None,
) -> Publication:
    """What is on the Hub now under ``repo``, "owner/name", in one commit; with ``dry_run`` what would be, without a request.

    ``what``: a run folder, the folder of a saved crosscoder, or a crosscoder, with the latent ``table``, the run's ``metrics`` and
    ``extra`` as :func:`tl_crosscoder.save` takes it.  The repository is created if need be, and then holds ``config.json``,
    ``model.safetensors``, ``sae_lens/``, ``latents.parquet``, the card and ``manifest.json``; on request the ``report/`` (of the
    run, or a folder) and ``figures/``, pictures of the table and the studies that the card shows.  What an earlier publication
    left there and this one has not is deleted in the same commit.

    ``license`` is a name that the Hub knows, such as ``apache-2.0`` or ``other``.  ``base_model`` are both models' names on the
    Hub, base first, each with or without ``@commit``, by default those that were compared.  ``allow`` are texts that look secret
    and may be published all the same.  The token is the one of ``hf auth login`` or ``HF_TOKEN`` unless given.

    Raises ValueError for a check that failed, before anything is sent; HubError, or its HubUnreachable and HubConflict, with
    nothing published.
    """
    for name in (repo, *(model.partition("@")[0] for model in base_model)):
        check_repo(name)
    if len(base_model) not in (0, 2):
        raise ValueError(f"base_model wants both models, base first, got {', '.join(base_model)}")
    crosscoder, study, from_run = _opened(what, Study(extra or {}, table, metrics or {}, base_model))
    pages = _report(report, from_run)
    with tempfile.TemporaryDirectory(prefix="publish-") as temporary:
        folder = save(crosscoder, Path(temporary) / "files", extra=study.kept, table=study.table)
        if study.table is not None:
            study.table.to_parquet(folder / TABLE)
        if pages:
            _copy_report(pages, folder / REPORT)
        pictures = draw_pictures(folder, study) if figures else ()
        text = card(
            repo, crosscoder, study, paths_in(folder), pictures, license=license, datasets=datasets, language=language
        )  # fmt: skip
        (folder / README).write_text(text, encoding="utf-8")
        write_manifest(folder)
        checks = check_all(folder, crosscoder, study, license, allow)
        files = {path: (folder / path).stat().st_size for path in paths_in(folder)}
        publication = Publication(repo, private, files, text, checks)
        if dry_run:
            return publication
        if publication.refused:
            raise ValueError("; ".join(f"{check.name}: {check.text}" for check in publication.refused))
        return replace(publication, commit=push(folder, repo, private=private, token=token))


def _report(report: bool | str | Path, run: Path | None) -> Path | None:
    """The folder of the report that goes along, if one does: the run's, or the one that was given."""
    if not report:
        return None
    if report is True and run is None:
        raise FileNotFoundError("report=True wants a run folder; give the report's own folder")
    pages = run / REPORT if run and report is True else Path(str(report))
    if not (pages / "index.html").is_file():
        raise FileNotFoundError(
            f"no report at {pages}; write it with `tl-crosscoder report`, or leave it out"
        )
    return pages


def _copy_report(pages: Path, to: Path) -> None:
    """The report's files and nothing that they only point to."""
    if links := [path for path in sorted(pages.rglob("*")) if path.is_symlink()]:
        raise ValueError(
            f"{links[0]} is a link, and what it leads to may not be meant for others; copy it, or take it out"
        )
    shutil.copytree(pages, to)


def _opened(what: Crosscoder | str | Path, study: Study) -> tuple[Crosscoder, Study, Path | None]:
    """The crosscoder, what there is to say of it, and the run folder if it is one."""
    if isinstance(what, Crosscoder):
        return what, study, None
    run = Path(what).expanduser()
    folder = saved_in(run)
    extra, table, metrics = read_config(folder)["extra"], study.table, study.metrics
    if (
        folder != run and (run / ACTS / ACTS_MANIFEST).is_file()
    ):  # crosscoders did not always keep it themselves
        extra = trained_on(read_manifest(run / ACTS)) | extra
    extra |= study.extra
    if table is None and folder != run and (run / TABLE).is_file():
        table = pd.read_parquet(run / TABLE)
        if not metrics and (run / "metrics.json").is_file():
            known = read_json(run / "metrics.json", LARGEST_METRICS)
            metrics = (
                known if known.get("table_sha256") == sha256(run / TABLE) else {}
            )  # else of another table
    asked = study.asked or (_asked_afterwards(run, sha256(folder / WEIGHTS)) if folder != run else {})
    return (
        load(folder),
        replace(study, extra=extra, table=table, metrics=metrics, asked=asked),
        run if folder != run else None,
    )


def _asked_afterwards(run: Path, weights: str) -> dict[str, list[str]]:
    """What the run's later studies say, as far as they looked at these weights."""
    parts = {path.stem: read_json(path, LARGEST_METRICS) for path in sorted((run / "studies").glob("*.json"))}
    said = {
        name: part.get("verdict") for name, part in parts.items() if part.get("weights_sha256") == weights
    }
    return {
        name: [verdict] if isinstance(verdict, str) else list(verdict)
        for name, verdict in said.items()
        if verdict
    }
