"""The small parts of a repository's files on this machine: settings, headers and the tensors that say what the others mean."""

import zipfile
from collections.abc import Iterator
from io import BufferedReader, RawIOBase
from itertools import pairwise
from pathlib import Path

from tl_crosscoder.files import LIMIT, SIZES, read_header
from tl_crosscoder.hub.download import download, list_files
from tl_crosscoder.hub.faults import TIMEOUT, explained, persistently
from tl_crosscoder.hub.source import Source
from tl_crosscoder.hub.wanted import wanted

#: Bytes of a tensor, or of an entry of an archive, up to which it is fetched whole.
SMALL = 1 << 20


def outlined(place: Source, folder: Path, *, token: str | bool | None, cache: str | Path | None) -> Path:
    """The folder, now with the settings of the source and its files of weights: of their length, zeros where large tensors are."""
    listing = list_files(place, token=token, cache=cache)
    *settings, weights = wanted(place, list(listing.files))
    pinned = Source(place.repo, listing.commit, place.subfolder)
    here = [name for name in listing.files if "/" not in name]
    if any(name.endswith((".json", ".yaml")) for name in here):
        held = download(pinned, tuple(settings), token=token, cache=cache)
        for path in held.iterdir():
            if path.suffix in (".json", ".yaml") and path.is_file():
                (folder / path.name).write_bytes(path.read_bytes())
    for name in here:
        if name.endswith(weights.removeprefix("*")):
            _copy_small_parts(_Far(pinned, name, listing.files[name].size, token), folder / name)
    return folder


def _copy_small_parts(far: "_Far", path: Path) -> None:
    with path.open("wb") as near:
        near.truncate(far.size)

        def copy(start: int, stop: int) -> None:
            near.seek(start)
            near.write(far.part(start, stop))
            near.flush()

        if path.suffix == ".safetensors":
            head = far.part(0, min(8 + LIMIT, far.size))
            near.write(head)
            near.flush()
            for tensor in read_header(path, None).values():
                n = SIZES[tensor.dtype]
                for size in tensor.shape:
                    n *= size
                if n <= SMALL and tensor.start + n > len(head):
                    copy(tensor.start, tensor.start + n)
        else:
            for start, stop in _small_entries(far):
                copy(start, stop)


def _small_entries(far: "_Far") -> Iterator[tuple[int, int]]:
    """Where the archive's directory and its small entries lie."""
    with zipfile.ZipFile(BufferedReader(far, SMALL)) as archive:
        starts = sorted(entry.header_offset for entry in archive.infolist())
        yield archive.start_dir, far.size
        yield from ((a, b) for a, b in pairwise([*starts, archive.start_dir]) if b - a <= SMALL)


class _Far(RawIOBase):
    """A file on the Hub, of which only the parts that are asked for are fetched."""

    def __init__(self, place: Source, name: str, size: int, token: str | bool | None):
        self.place, self.name, self.size, self.token, self.at = place, name, size, token, 0

    def part(self, start: int, stop: int) -> bytes:
        """The bytes from ``start`` to before ``stop``."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        url = hf_hub_url(
            self.place.repo, self.name, subfolder=self.place.subfolder or None, revision=self.place.revision
        )
        headers = {**build_hf_headers(token=self.token), "Range": f"bytes={start}-{stop - 1}"}

        def get() -> bytes:
            with get_session().stream(
                "GET", url, headers=headers, follow_redirects=True, timeout=TIMEOUT
            ) as answer:
                hf_raise_for_status(answer)
                skip, got = (0 if answer.status_code == 206 else start), b""
                for piece in answer.iter_bytes():
                    got += piece
                    if len(got) >= skip + stop - start:
                        break
                return got[skip : skip + stop - start]

        with explained(f"looking into {self.name} of {self.place}", self.place.repo):
            return persistently(get)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self.at = offset + (0, self.at, self.size)[whence]
        return self.at

    def tell(self) -> int:
        return self.at

    def readinto(self, buffer) -> int:
        got = self.part(self.at, min(self.size, self.at + len(buffer))) if self.at < self.size else b""
        buffer[: len(got)] = got
        self.at += len(got)
        return len(got)
