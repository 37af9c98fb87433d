"""``from_pretrained`` and ``push_to_hub``, by the names and arguments that people know from other libraries."""

from pathlib import Path

from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.hub.load import load
from tl_crosscoder.hub.publish import publish
from tl_crosscoder.hub.source import Source, parse_source


def from_pretrained(
    repo_id: str | Path,
    *,
    revision: str | None = None,
    subfolder: str = "",
    token: str | None = None,
    cache_dir: str | Path | None = None,
) -> Crosscoder:
    """The crosscoder of a repository on the Hub (at a branch, tag or commit) or in a folder, on the CPU and in ``eval()``.

    ``repo_id`` may also say it all: ``owner/repo@revision:subfolder``.  Every file is held to the checksums it was published with.
    """
    place = parse_source(repo_id)
    if isinstance(place, Source):
        place = Source(place.repo, revision or place.revision, subfolder or place.subfolder)
        return load(place, token=token, cache=cache_dir)
    return load(place / subfolder)


def push_to_hub(
    crosscoder: Crosscoder,
    repo_id: str,
    *,
    license: str,
    private: bool = True,
    token: str | None = None,
    **more,
) -> str:
    """The URL of the commit that now holds the crosscoder; ``more`` as :func:`tl_crosscoder.publish` takes it."""
    published = publish(crosscoder, repo_id, license=license, private=private, token=token, **more)
    return str(published.url)
