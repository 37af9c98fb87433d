"""Which files of a repository a crosscoder is in."""

from tl_crosscoder.errors import UnreadableFormat
from tl_crosscoder.hub.source import Source


def wanted(place: Source, files: list[str]) -> tuple[str, ...]:
    """Patterns of the files to download: settings and weights; pickled weights only where there are no others."""
    here = [path for path in files if "/" not in path]
    for suffix in (".safetensors", ".pt", ".pth"):
        if any(path.endswith(suffix) for path in here):
            return ("*.json", "*.yaml", f"*{suffix}")
    folders = sorted(
        {path.rsplit("/", 1)[0] for path in files if path.endswith((".safetensors", ".pt", ".pth"))}
    )
    where = (
        f"there are weights in {', '.join(folders[:8]):.300}; name one: {place}:{folders[0]}"
        if folders
        else "nor anywhere below it"
    )
    raise UnreadableFormat(f"{place}: no .safetensors or .pt file there, {where}")
