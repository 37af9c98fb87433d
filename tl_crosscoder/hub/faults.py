"""What goes wrong between here and the Hub, in words that say what to do; and again, where trying again may help."""

import logging
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from tl_crosscoder.errors import HubConflict, HubError, HubUnreachable

Answer = TypeVar("Answer")

logger = logging.getLogger(__name__)

WAITS = (1.0, 2.0, 4.0, 8.0)  # seconds before the second try and those after it
#: Seconds after its beginning at which a call is not made again.  The Hub's client waits as well, 23 s for one file, and asks
#: for it in two ways: a Hub that answers nothing but errors is given up after a minute at most.
PATIENCE = 30.0
#: Seconds in which the Hub has to answer a question; its client would wait for ever.  Uploads take as long as they take.
TIMEOUT = 10.0
PASSING = (408, 429, 500, 502, 503, 504)


def persistently(call: Callable[[], Answer]) -> Answer:
    """What the call answers, tried again where the Hub was busy or the connection broke, as long as PATIENCE lasts.

    Each wait is logged as a warning, which Python shows unless told otherwise.
    """
    begun = time.monotonic()
    for wait in WAITS:
        try:
            return call()
        except Exception as error:
            cause = _underlying(error)
            pause = _asked_pause(cause) or wait
            if not _passing(cause) or time.monotonic() - begun + pause > PATIENCE:
                raise
            logger.warning("%s; asking again in %.0f s", _short(cause), pause)
            time.sleep(pause * random.uniform(1, 1.25))  # apart from others who were turned away with us
    return call()


@contextmanager
def explained(doing: str, repo: str) -> Iterator[None]:
    """Errors of the Hub's client leave the block as HubError and its kinds; ``doing`` opens each message."""
    begun = time.monotonic()
    try:
        yield
    except Exception as error:
        if (known := _explanation(repo, _underlying(error), time.monotonic() - begun)) is None:
            raise
        kind, words = known
        raise kind(f"{doing}: {words}") from error


def _explanation(repo: str, error: BaseException, seconds: float) -> tuple[type[HubError], str] | None:
    from huggingface_hub import errors

    words: tuple[tuple[type[Exception], type[HubError], str], ...] = (
        (
            errors.OfflineModeIsEnabled,
            HubUnreachable,
            "HF_HUB_OFFLINE is set, and this needs the Hub; unset it.",
        ),
        (
            errors.LocalEntryNotFoundError,
            HubUnreachable,
            f"the Hub cannot be reached, and the cache of this machine lacks a part of {repo}; fetch it once with a connection.",
        ),
        (
            errors.GatedRepoError,
            HubError,
            f"{repo} is gated; ask for access on its page, log in with `hf auth login`, then try again.",
        ),
        (
            errors.RepositoryNotFoundError,
            HubError,
            f"there is no {repo}, or it is private and you may not see it; check the name, or log in with `hf auth login`.",
        ),
        (errors.RevisionNotFoundError, HubError, f"{repo} has no such branch, tag or commit."),
        (errors.RemoteEntryNotFoundError, HubError, f"{repo} listed it, but it is not there; try again."),
    )
    for kind, ours, text in words:
        if isinstance(error, kind):
            return ours, text
    if isinstance(error, errors.HfHubHTTPError):
        return _status(repo, error, seconds)
    if isinstance(error, _broken()):
        return (
            HubUnreachable,
            f"no answer from the Hub ({type(error).__name__}) in {seconds:.0f} s; check the connection and try again.",
        )
    if isinstance(error, OSError) and "Consistency check failed" in str(error):
        return HubUnreachable, "it came cut short; check the connection and try again."
    return None


def _status(repo: str, error, seconds: float) -> tuple[type[HubError], str]:
    status = error.response.status_code
    said = f"  The Hub says: {error.server_message.strip()[:200]}" if error.server_message else ""
    if status == 401:
        return HubError, f"the Hub does not accept the token; log in with `hf auth login`.{said}"
    if status == 403:
        return (
            HubError,
            f"your token may not do this to {repo}; give it the permission to write, and take a name of yours or of an "
            f"organisation you belong to.{said}",
        )
    if status in (409, 412):
        return HubConflict, f"someone else changed {repo} at the same time; look at it, then try again.{said}"
    if status == 429:
        pause = _asked_pause(error)
        when = f"in {pause:.0f} s" if pause else "in some minutes"
        return HubError, f"the Hub allows no more requests for now; try again {when}.{said}"
    if status >= 500:
        return HubUnreachable, f"the Hub answered {status} for {seconds:.0f} s; try again later.{said}"
    return HubError, f"the Hub answered {status}.{said}"


def _underlying(error: BaseException) -> BaseException:
    """What an upload failed of, or why a file that is not in the cache could not be fetched either."""
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    cause = error.__cause__
    if isinstance(error, RuntimeError) and isinstance(cause, _broken()):
        return cause
    if isinstance(error, LocalEntryNotFoundError) and isinstance(cause, HfHubHTTPError):
        return cause
    return error


def _passing(error: BaseException) -> bool:
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in PASSING
    return isinstance(error, _broken())


def _short(error: BaseException) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    return f"the Hub answered {status}" if status else f"no answer from the Hub ({type(error).__name__})"


def _broken() -> type[Exception]:
    """What a broken connection raises: an error of whichever HTTP library the Hub's client is built on."""
    from huggingface_hub.errors import HfHubHTTPError

    return HfHubHTTPError.__bases__[0]


def _asked_pause(error: BaseException) -> float | None:
    """The seconds of a Retry-After header; dates and nonsense count as none."""
    asked = getattr(getattr(error, "response", None), "headers", {}).get("Retry-After", "")
    return float(asked) if asked.isdecimal() else None
