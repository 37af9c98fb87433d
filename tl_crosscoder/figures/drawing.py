"""How everything here draws: one style, one palette, and SVG text with the same bytes for the same figure.

Blue is the base model and orange the tuned one, everywhere (after Okabe and Ito's colour-blind-safe palette).  The background is
transparent and the greys are readable on white and on black, so that one file serves both.
"""

import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tl_crosscoder.files import write_atomically

BLUE, ORANGE, DARK, INK, SOFT, FAINT = "#2a6fb0", "#d8701c", "#565656", "#7a7a7a", "#9d9d9d", "#c4c4c4"
STYLE: dict[Any, Any] = {
    "svg.hashsalt": "tl_crosscoder",
    "svg.fonttype": "none",
    "text.parse_math": False,
    "axes.unicode_minus": True,
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlesize": 8.5,
    "axes.titlelocation": "left",
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "lines.linewidth": 1.2,
    "legend.frameon": False,
}

#: direction ("x", "y") -> (column of the latent table, axes): lets the page's reader select latents by dragging
Brushes = dict[str, tuple[str, Any]]


class NotDrawn(ValueError):
    """A figure whose data are absent; the message says what is missing."""


@dataclass(frozen=True)
class Drawing:
    """A figure before it is one: SVG text for a page, a matplotlib figure, a file; a notebook shows it by itself.

    ``draw`` puts it on a matplotlib figure of ``size`` inches, and may return the axes that a page's reader can select in.
    """

    draw: Callable[[Any], Brushes | None] = field(repr=False)
    size: tuple[float, float] = (7.5, 3.0)

    def figure(self) -> Any:
        """The matplotlib ``Figure``."""
        with _styled():
            return self._drawn()[0]

    def svg(self) -> str:
        """SVG text; the same bytes for the same data."""
        out = io.StringIO()
        metadata: Any = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        with _styled():
            figure, brushes = self._drawn()
            figure.savefig(out, format="svg", transparent=True, metadata=metadata)
        text = out.getvalue()
        return text[text.index("<svg") :].replace("<svg ", f"<svg {_brush_attributes(figure, brushes)}", 1)

    def save(self, path: str | Path) -> Path:
        """The file, in the format of its suffix (.svg, .png, .pdf), written whole or not at all."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        kind = path.suffix.removeprefix(".").lower()

        def write(temporary: Path) -> None:
            if kind == "svg":
                temporary.write_text(self.svg(), encoding="utf-8", newline="\n")
                return
            metadata: Any = {"CreationDate": None} if kind == "pdf" else None
            with _styled():
                self._drawn()[0].savefig(temporary, format=kind, dpi=160, metadata=metadata)

        write_atomically(path, write)
        return path

    def _repr_svg_(self) -> str:
        return self.svg()

    def _drawn(self) -> tuple[Any, Brushes]:
        from matplotlib.figure import Figure

        figure = Figure(figsize=self.size, dpi=72, layout="constrained")
        return figure, self.draw(figure) or {}


@contextmanager
def _styled() -> Iterator[None]:
    import matplotlib

    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # the page's own fonts have the glyph
        yield


def _brush_attributes(figure: Any, brushes: Brushes) -> str:
    """Where the axes lie in the drawing and which values their ends have: ``data-x="column start stop low high"``."""
    written = ""
    for way, (name, axes) in brushes.items():
        box, height = axes.get_window_extent(), figure.bbox.height
        start, stop = (box.x0, box.x1) if way == "x" else (height - box.y0, height - box.y1)
        low, high = axes.get_xlim() if way == "x" else axes.get_ylim()
        written += f'data-{way}="{name} {start:.2f} {stop:.2f} {low:g} {high:g}" '
    return written
