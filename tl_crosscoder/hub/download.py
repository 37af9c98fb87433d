"""A repository's files on this machine: all of one commit, each proven to be what was published."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from tl_crosscoder.errors import CorruptFile, HubError, HubUnreachable
from tl_crosscoder.files import sha256, write_atomically
from tl_crosscoder.hub.faults import TIMEOUT, explained, persistently
from tl_crosscoder.hub.manifest import MANIFEST, Entry, paths_in, read_manifest, verify_file
from tl_crosscoder.hub.source import Source, check_inside, parse_source

#: what a crosscoder of any format needs, and nothing large beside it
WEIGHTS = ("*.json", "*.safetensors")


@dataclass(frozen=True)
class Stored:
    """``size`` in bytes; ``digest`` as the Hub keeps the file: sha256 (64 digits), git's sha1 (40), None where it does not say."""

    size: int
    digest: str | None


@dataclass(frozen=True)
class Listing:
    """The files of a source at one commit, by their paths below its subfolder."""

    source: Source
    commit: str
    files: dict[str, Stored]

    def chosen(self, names: Sequence[str]) -> list[str]:
        """The files that match a pattern; ``*`` does not reach into folders."""
        return [path for path in sorted(self.files) if any(_matches(path, name) for name in names)]


def download(
    source: str | Path | Source,
    names: Sequence[str] = WEIGHTS,
    *,
    token: str | bool | None = None,
    cache: str | Path | None = None,
) -> Path:
    """A local folder that holds the files of the source that match ``names``, all of one commit; a path comes back as it is.

    ``names`` are patterns of paths below the subfolder.  Each file has the sha256 that the repository's ``manifest.json`` lists,
    or, without one, the checksum under which the Hub keeps it; one that has not is thrown out of the cache and fetched once more,
    then CorruptFile.  Offline the cache answers; a commit that it holds is not asked for again.  :func:`commit_of` reads the
    commit back from the folder.
    """
    place = parse_source(source)
    if isinstance(place, Path):
        return place
    cache = _cache(cache)
    listing = list_files(place, token=token, cache=cache)
    listed = _manifest(listing, token, cache)
    missing = [path for path in listed if path not in listing.files and any(_matches(path, n) for n in names)]
    if missing:
        raise CorruptFile(
            f"{place}: {MANIFEST} lists {missing[0]!r}, which {listing.commit[:8]} does not hold"
        )
    chosen = listing.chosen(names)
    if not chosen:
        raise HubError(f"{place} holds nothing like {' or '.join(names)}, but {_some(listing.files)}")
    for path in chosen:
        _check_name(listing, path)
    for path in chosen:
        _fetch(listing, path, listed.get(path), token, cache)
    if not place.pinned:  # the newest commit known of this branch or tag, for when there is no connection
        ref = _folder_of(place, cache) / "refs" / (place.revision or "main")
        ref.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(ref, lambda temporary: temporary.write_text(listing.commit))
    return _snapshot(listing, cache)


def list_files(
    source: Source, *, token: str | bool | None = None, cache: str | Path | None = None
) -> Listing:
    """What the source holds, and the commit it stands for now; from the cache offline, and for a commit known there."""
    from huggingface_hub import HfApi

    cached = _cached(source, _cache(cache))
    if source.pinned and cached is not None and MANIFEST in cached.files:
        return cached
    api = HfApi(token=token)
    try:
        with explained(f"looking up {source}, which is no path here", source.repo):
            info = persistently(
                lambda: api.model_info(
                    source.repo, revision=source.revision, files_metadata=True, timeout=TIMEOUT
                )
            )
    except HubUnreachable:
        if cached is None:
            raise
        return cached
    under = f"{source.subfolder}/" if source.subfolder else ""
    files = {
        file.rfilename: Stored(file.size or 0, file.lfs.sha256 if file.lfs else file.blob_id)
        for file in info.siblings or []
    }
    below = {path.removeprefix(under): stored for path, stored in files.items() if path.startswith(under)}
    if not below:
        raise HubError(f"{source} holds no files there, but {_some(files)}")
    return Listing(source, str(info.sha), below)


def commit_of(folder: Path) -> str | None:
    """The commit of a folder that ``download`` gave; None for any other folder."""
    found = re.search(r"/snapshots/([0-9a-f]{40})(/|$)", folder.absolute().as_posix())
    return found[1] if found else None


def _manifest(listing: Listing, token: str | bool | None, cache: Path) -> dict[str, Entry]:
    if MANIFEST not in listing.files:
        return {}
    return read_manifest(_fetch(listing, MANIFEST, None, token, cache)) or {}


def _check_name(listing: Listing, path: str) -> None:
    """A name that would lead out of the repository's folder, on whatever system, comes from nobody's good will."""
    try:
        check_inside(path, "file")
    except ValueError as error:
        raise CorruptFile(f"{listing.source}: {error}; nothing was fetched") from error


def _fetch(listing: Listing, path: str, entry: Entry | None, token: str | bool | None, cache: Path) -> Path:
    """One file, fetched where it is not in the cache, and checked either way."""
    from huggingface_hub import hf_hub_download

    source = listing.source

    def get() -> Path:
        return Path(
            hf_hub_download(
                source.repo,
                path,
                subfolder=source.subfolder or None,
                revision=listing.commit,
                token=token,
                cache_dir=cache,
            )
        )

    def fetched() -> Path:
        with explained(f"fetching {path} of {source}", source.repo):
            return persistently(get)

    try:
        return _checked(fetched(), listing.files[path], entry)
    except CorruptFile as altered:
        try:
            again = fetched()
        except HubUnreachable as error:
            raise HubUnreachable(f"{altered}; and it cannot be fetched again: {error}") from error
        return _checked(again, listing.files[path], entry)


def _checked(file: Path, stored: Stored, entry: Entry | None) -> Path:
    """The file, if it is the one that was published; otherwise CorruptFile, and the cache does not hold it any more."""
    try:
        if entry is not None:
            verify_file(file, entry)
        elif stored.digest is not None and (found := digest(file, stored.digest)) != stored.digest:
            raise CorruptFile(
                f"{file}: checksum {found[:12]}…, where the Hub lists {stored.digest[:12]}…; it was altered on its way"
            )
    except CorruptFile:
        for altered in (file.resolve(), file.parent / file.readlink() if file.is_symlink() else file, file):
            altered.unlink(missing_ok=True)
        raise
    return file


def digest(file: Path, like: str) -> str:
    """sha256, or the sha1 that git gives a file, whichever has as many digits."""
    if len(like) == 64:
        return sha256(file)
    content = file.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _cached(source: Source, cache: Path) -> Listing | None:
    """What the cache holds of the source, and what the manifest there says it should."""
    repo = _folder_of(source, cache)
    ref = repo / "refs" / (source.revision or "main")
    commit = source.revision if source.pinned else ref.read_text().strip() if ref.is_file() else None
    if commit is None or not re.fullmatch("[0-9a-f]{40}", commit):
        return None
    folder = repo / "snapshots" / commit / source.subfolder
    files = {path: _stored(folder / path) for path in paths_in(folder)}
    if not files:
        return None
    listed = read_manifest(folder / MANIFEST) if MANIFEST in files else None
    expected = {path: Stored(entry.size, None) for path, entry in (listed or {}).items()}
    return Listing(source, commit, expected | files)


def _stored(file: Path) -> Stored:
    """The cache names its files by the Hub's checksum, where the system has links."""
    name = file.readlink().name if file.is_symlink() else ""
    known = re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", name)
    return Stored(file.stat().st_size, name if known else None)


def _cache(cache: str | Path | None) -> Path:
    from huggingface_hub import constants

    return Path(cache or constants.HF_HUB_CACHE).expanduser()


def _folder_of(source: Source, cache: Path) -> Path:
    return cache / f"models--{source.repo.replace('/', '--')}"


def _snapshot(listing: Listing, cache: Path) -> Path:
    return _folder_of(listing.source, cache) / "snapshots" / listing.commit / listing.source.subfolder


def _matches(path: str, name: str) -> bool:
    return fnmatchcase(path, name) and path.count("/") == name.count("/")


def _some(files: dict[str, Stored]) -> str:
    paths = sorted(files)
    return ", ".join(paths[:8]) + (f" and {len(paths) - 8} more" if len(paths) > 8 else "") or "nothing"
