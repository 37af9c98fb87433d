"""What a crosscoder's files are and mean, told in a second, without torch and without reading the weights."""

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tl_crosscoder.hub.formats.base import Conventions
from tl_crosscoder.hub.formats.detect import described, detect
from tl_crosscoder.hub.source import Source, parse_source

WORDS = {
    "format": "format", "models": "models", "sparsity": "sparsity", "b_dec": "b_dec", "ranking": "ranked by",
    "threshold": "threshold", "normalisation": "normalisation", "folding": "folded", "bos": "first token", "hook": "hook",
    "language_models": "language models",
}  # fmt: skip


@dataclass(frozen=True)
class Inspection:
    """``tensors``: dtype and shape of each, by name; ``bytes``: of the file of weights."""

    source: str
    file: str
    bytes: int
    conventions: Conventions
    tensors: dict[str, tuple[str, tuple[int, ...]]]
    pickled: bool

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        said = self.conventions.as_dict()
        tensors = {name: [dtype, list(shape)] for name, (dtype, shape) in self.tensors.items()}
        about = {"source": self.source, "file": self.file, "bytes": self.bytes, "pickled": self.pickled}
        return {**about, **said, "notes": list(said["notes"]), "tensors": tensors}

    def __str__(self) -> str:
        """A screenful; control characters of the files are shown, not obeyed."""
        said = self.conventions
        rows = [
            (
                "file",
                f"{self.file}, {self.bytes / 1e6:,.1f} MB"
                + (", a pickle: walked here, not run" if self.pickled else ""),
            ),
            ("size", f"{said.n_models} models x {said.d_in} d_in, {said.d_sae:,} latents, {self._dtypes()}"),
            *((word, getattr(said, name)) for name, word in WORDS.items()),
            *(("claims", f"{name} {value:.4g}") for name, value in said.claims.items()),
            *(("note", note) for note in said.notes),
            *((f"MISSING {name}", why) for name, why in said.wants.items()),
        ]
        width = max(len(word) for word, _ in rows)
        loads = f"needs {', '.join(f'{name}=' for name in said.wants)}" if said.wants else "loads as it is"
        return "\n".join(
            [f"{plain(self.source)}: {loads}", *(f"  {word:<{width}}  {plain(text)}" for word, text in rows)]
        )

    def _dtypes(self) -> str:
        return "/".join(sorted({dtype for dtype, _ in self.tensors.values() if "F" in dtype}))


def inspect(
    source: str | Path | Source, *, token: str | bool | None = None, cache: str | Path | None = None
) -> Inspection:
    """Format, sizes and every convention of the crosscoder at a path or ``owner/repo[@revision][:subfolder]``.

    Of a repository only the settings and the beginnings of its files are fetched.  Where :func:`tl_crosscoder.load` would refuse,
    the reason is in ``conventions.wants``, or raised.
    """
    place = parse_source(source)
    with ExitStack() as stack:
        path = place
        if isinstance(place, Source):
            from tl_crosscoder.hub.outline import outlined

            path = outlined(place, Path(stack.enter_context(TemporaryDirectory())), token=token, cache=cache)
        assert isinstance(path, Path)
        form, contents = detect(path)
        said = described(form, contents)
        tensors = {name: (tensor.dtype, tensor.shape) for name, tensor in contents.tensors.items()}
        size = contents.weights.stat().st_size
        return Inspection(str(place), contents.weights.name, size, said, tensors, contents.pickled)


def plain(text: str) -> str:
    """One line without control characters, and so without colours, cursor moves or a change of direction."""
    return "".join(letter if letter.isprintable() else f"\\x{ord(letter):02x}" for letter in text)
