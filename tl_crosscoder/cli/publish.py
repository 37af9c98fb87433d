"""publish: a run, or a saved crosscoder, onto the Hub."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tl_crosscoder.cli.app import app, console
from tl_crosscoder.cli.options import Json

if TYPE_CHECKING:
    from tl_crosscoder.hub.publish import Publication


@app.command("publish")
def publish_command(
    run: Annotated[Path, typer.Argument(help="A run folder, or the folder of a saved crosscoder.")],
    repo: Annotated[str, typer.Argument(help="OWNER/NAME on the Hub; created if need be.")],
    license: Annotated[
        str | None, typer.Option(help="By its name on the Hub: apache-2.0, mit, gemma, other ...")
    ] = None,
    private: Annotated[bool, typer.Option("--private/--public", help="Who sees it.")] = True,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show files, checks and card; send nothing.")
    ] = False,
    report: Annotated[bool, typer.Option("--report", help="The run's report too.")] = False,
    figures: Annotated[bool, typer.Option("--figures", help="Pictures on the card, as PNG.")] = False,
    base_model: Annotated[
        list[str] | None,
        typer.Option(help="OWNER/NAME[@COMMIT] of a compared model on the Hub; twice, base first."),
    ] = None,
    dataset: Annotated[
        list[str] | None, typer.Option(help="A dataset it was trained on, by its name on the Hub.")
    ] = None,
    language: Annotated[
        list[str] | None, typer.Option(help="Of the text it was trained on: en, de ...")
    ] = None,
    allow: Annotated[
        list[str] | None, typer.Option(help="A text that looks secret and may be published.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Publish a crosscoder on the Hugging Face Hub, with its table and a model card, in one commit."""
    from tl_crosscoder.hub.publish import publish

    done = publish(
        run, repo, license=license, private=private, dry_run=dry_run, report=report, figures=figures, base_model=base_model or (),
        datasets=dataset or (), language=language or (), allow=allow or (),
    )  # fmt: skip
    if as_json:
        print(json.dumps(_figures(done)))
    else:
        _show(done)
    if done.refused:
        raise typer.Exit(1)


def _figures(done: "Publication") -> dict[str, object]:
    """The publication as JSON."""
    checks = [vars(check) for check in done.checks]
    known = {"repo": done.repo, "private": done.private, "commit": done.commit, "url": done.url}
    return known | {"files": done.files, "checks": checks, "card": done.card}


def _show(done: "Publication") -> None:
    """Print where it lies, or the card of a dry run; then files, checks and what comes of them."""
    if done.commit:
        print(f"published: {done.url}")
        print(f'load it:   tlc.from_pretrained("{done.repo}@{done.commit}")')
    else:
        print(done.card)
    for line in _listed(done.files):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    total = f"{_files(len(done.files))}, {_size(sum(done.files.values()))}"
    who = "private" if done.private else "public"
    console.print(f"  {total}, {who}, {done.repo}\n", markup=False, highlight=False, soft_wrap=True)
    for check in done.checks:
        mark = "✓" if check.passed else "✗" if check.needed else "–"
        console.print(f"  {mark} {check.name}: {check.text}", markup=False, highlight=False, soft_wrap=True)
    if not done.commit:
        verdict = (
            "it would be refused" if done.refused else "nothing was sent; leave out --dry-run to publish"
        )
        console.print(f"\n  dry run: {verdict}", markup=False, highlight=False, soft_wrap=True)


def _listed(files: dict[str, int]) -> list[str]:
    """A line for each file and folder at the root, with its size."""
    parts: dict[str, list[int]] = {}
    for path, size in files.items():
        first, *rest = path.split("/")
        parts.setdefault(first + "/" * bool(rest), []).append(size)
    return [
        f"  {name:<20} {_size(sum(sizes)):>9}" + (f"  {_files(len(sizes))}" if name.endswith("/") else "")
        for name, sizes in parts.items()
    ]


def _files(n: int) -> str:
    """``1 file``, ``2 files``."""
    return f"{n} file{'' if n == 1 else 's'}"


def _size(size: int) -> str:
    """Bytes in the unit that leaves three figures."""
    number, unit = float(size), "B"
    for larger in ("kB", "MB", "GB"):
        if number < 1000:
            break
        number, unit = number / 1000, larger
    return f"{number:.3g} {unit}"
