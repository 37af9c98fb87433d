"""A folder into a repository of the Hub: all of it in one commit on top of a known one, or nothing."""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from tl_crosscoder import __version__
from tl_crosscoder.errors import HubConflict, HubError
from tl_crosscoder.hub.download import digest
from tl_crosscoder.hub.faults import TIMEOUT, explained, persistently
from tl_crosscoder.hub.manifest import MANIFEST, paths_in, read_manifest

if TYPE_CHECKING:
    from huggingface_hub import HfApi, ModelInfo

KEPT = "README.md"  # may be there before the first publication: the Hub offers to write one with a new repository


def push(folder: Path, repo: str, *, private: bool, token: str | None = None) -> str:
    """The commit that holds the folder, which has a manifest; the newest one, if it does already.

    The repository is created if it does not exist.  The commit names the one before it, so that of two who publish at once one is
    refused (HubConflict); where an answer was lost, it is found out whether the commit was made.  Files of an earlier publication
    that the folder has not are deleted; a repository that holds others under our names is refused.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    with explained(f"publishing {repo}", repo):
        persistently(lambda: api.create_repo(repo, private=private, exist_ok=True))
        before = persistently(lambda: api.model_info(repo, files_metadata=True, timeout=TIMEOUT))
        _check_visibility(repo, before, private)
        if _holds(before, folder):
            return str(before.sha)
        deleted = _outdated(api, repo, before, folder)
        try:
            return _commit(api, repo, folder, deleted, str(before.sha))
        except HubConflict as error:
            now = persistently(lambda: api.model_info(repo, timeout=TIMEOUT))
            raise HubConflict(
                f"someone else changed {repo} while this was being published; it is now at {str(now.sha)[:8]}, "
                "and nothing of yours was written.  Look at it, then publish again."
            ) from error


def _check_visibility(repo: str, info: "ModelInfo", private: bool) -> None:
    if bool(info.private) != private:
        is_, asked = ("private", "public") if info.private else ("public", "private")
        raise HubError(
            f"{repo} exists and is {is_}, and you asked for {asked}; change it in its settings, or ask for {is_}.  "
            "Nothing was published."
        )


def _outdated(api: "HfApi", repo: str, info: "ModelInfo", folder: Path) -> list[str]:
    """Files of the publication before this one that the folder has not."""
    there, ours = set(_files(info)), set(paths_in(folder))
    listed = None
    if MANIFEST in there:
        path = persistently(lambda: api.hf_hub_download(repo, MANIFEST, revision=info.sha))
        listed = read_manifest(Path(path))
    if listed is None and (taken := sorted(ours & there - {KEPT})):
        raise HubError(
            f"{repo} holds {taken[0]!r}, which was not published from here; choose another name, or delete it there first"
        )
    return sorted((set(listed or ()) - ours) & there)


def _commit(api: "HfApi", repo: str, folder: Path, deleted: list[str], parent: str) -> str:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete
    from huggingface_hub.errors import HfHubHTTPError

    operations: list = [CommitOperationAdd(path, str(folder / path)) for path in paths_in(folder)]
    operations += [CommitOperationDelete(path) for path in deleted]
    message = f"Publish with tl-crosscoder {__version__}"

    def commit() -> str:
        try:
            with warnings.catch_warnings():  # a table belongs to this model
                warnings.filterwarnings("ignore", "It seems that you are about to commit a data file")
                return api.create_commit(repo, operations, commit_message=message, parent_commit=parent).oid
        except HfHubHTTPError as error:
            if error.response.status_code not in (409, 412):
                raise
            now = api.model_info(repo, files_metadata=True, timeout=TIMEOUT)
            if _holds(now, folder):  # an earlier try was done, and only its answer was lost
                return str(now.sha)
            raise

    with explained(f"publishing {repo}", repo):
        return persistently(commit)


def _holds(info: "ModelInfo", folder: Path) -> bool:
    """Whether the repository has every file of the folder, byte for byte, by the checksums the Hub gives."""
    there = _files(info)
    return all(
        path in there and digest(folder / path, there[path]) == there[path] for path in paths_in(folder)
    )


def _files(info: "ModelInfo") -> dict[str, str]:
    """Path -> sha256 of a large file, git's sha1 of a small one."""
    return {
        file.rfilename: file.lfs.sha256 if file.lfs else str(file.blob_id) for file in info.siblings or []
    }
