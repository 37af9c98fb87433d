"""Where a crosscoder is: a repository on the Hub, at a revision, in a folder of it; or a path on this machine."""

import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
_REPO = re.compile(rf"{_NAME}/{_NAME}")
_SHORT = re.compile(rf"(?P<repo>{_NAME}/{_NAME})(?:@(?P<revision>[^:@]+))?(?::(?P<subfolder>.+))?")
_HF = re.compile(
    rf"hf://(?P<repo>{_NAME}/{_NAME})(?:@(?P<revision>refs/[^/]+/[^/]+|[^/@]+))?(?:/(?P<subfolder>.+))?"
)
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Source:
    """A folder of a repository on the Hub; ``revision`` is a branch, a tag or a commit, None the newest of ``main``."""

    repo: str
    revision: str | None = None
    subfolder: str = ""

    def __post_init__(self):
        check_repo(self.repo)
        if self.revision is not None and not re.fullmatch(r"(?!.*\.\.)[\w][\w./+-]*", self.revision):
            raise ValueError(f"{self.revision!r} is no branch, tag or commit of {self.repo}.")
        if self.subfolder:
            check_inside(self.subfolder, "subfolder")

    @property
    def pinned(self) -> bool:
        """The revision is a commit, which never changes."""
        return bool(_COMMIT.fullmatch(self.revision or ""))

    def __str__(self) -> str:
        at = f"@{self.revision}" if self.revision else ""
        return f"{self.repo}{at}" + (f":{self.subfolder}" if self.subfolder else "")


def parse_source(text: str | Path | Source) -> Source | Path:
    """What ``owner/repo[@revision][:subfolder]``, ``hf://owner/repo[@revision][/subfolder]`` or a path stands for.

    A path that exists is a path, also where it reads like a repository; ``hf://`` says that the Hub is meant.
    """
    if not isinstance(text, str):
        return text
    if text.startswith("hf://"):
        if not (found := _HF.fullmatch(text)):
            raise ValueError(f"{text!r} is not hf://owner/repo[@revision][/subfolder].")
        return _source(found)
    path = Path(text).expanduser()
    if not path.exists() and (found := _SHORT.fullmatch(text)):
        return _source(found)
    return path


def check_repo(repo: str) -> None:
    """Refuse what cannot be the name of a repository."""
    if not _REPO.fullmatch(repo) or ".." in repo or "--" in repo or repo.endswith(".git"):
        raise ValueError(
            f"{repo!r} is not the name of a repository, owner/name in letters, digits, '-', '_' and '.'"
        )


def is_repo(name: str) -> bool:
    """Whether it could be the name of a repository, owner and all."""
    try:
        check_repo(name)
    except ValueError:
        return False
    return True


def check_inside(path: str, what: str) -> None:
    """Refuse a path that is absolute, climbs, or means something else on another system."""
    parts = path.split("/")
    windows = PureWindowsPath(path)
    sound = not (windows.drive or windows.root or "\\" in path) and PurePosixPath(path).as_posix() == path
    if not sound or any(part in ("", ".", "..") for part in parts) or not path.isprintable():
        raise ValueError(f"the {what} {path!r:.200} is not a plain path below the repository's root")


def _source(found: re.Match[str]) -> Source:
    return Source(found["repo"], found["revision"], (found["subfolder"] or "").rstrip("/"))
