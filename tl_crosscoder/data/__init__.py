"""Files that ship with the package: the tiny pair, adapters for SmolLM2 and samples of open text."""

from importlib.resources import files
from pathlib import Path


def data_path(name: str) -> Path:
    """The shipped file or folder ``name``, such as ``"tiny/base"``.  Unknown names raise FileNotFoundError."""
    root = Path(str(files("tl_crosscoder.data")))
    path = root / name
    if not path.exists():
        shipped = sorted(str(p.relative_to(root)) for p in root.glob("*/*") if not p.name.startswith("_"))
        raise FileNotFoundError(f"no shipped data named {name!r}; there are: {', '.join(shipped)}")
    return path
