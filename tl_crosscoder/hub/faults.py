"""What goes wrong between here and the Hub, in words that say what to do; and again, where trying again may help."""

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from tl_crosscoder.errors import HubConflict, HubError, HubUnreachable

Answer = TypeVar("Answer")

WAITS = (1.0, 2.0, 4.0, 8.0)  # seconds before the second try and those after it
LONGEST_WAIT = 60.0  # seconds: a Hub that asks for more is not waited for
PASSING = (408, 429, 500, 502, 503, 504)


def persistently(call: Callable[[], Answer]) -> Answer:
    """What the call answers, tried again, a few times, where the Hub was busy or the connection broke."""
    for wait in WAITS:
        try:
            return call()
        except Exception as error:
            if not _passing(error):
                raise
            if (pause := _asked_pause(error) or wait) > LONGEST_WAIT:
                raise
            time.sleep(pause * random.uniform(1, 1.25))  # apart from others who were turned away with us
    return call()


@contextmanager
def explained(doing: str, repo: str) -> Iterator[None]:
    """Errors of the Hub's client leave the block as HubError and its kinds; ``doing`` opens each message."""
    from huggingface_hub import errors

    try:
        yield
    except HubError:
        raise
    except errors.OfflineModeIsEnabled as error:
        raise HubUnreachable(f"{doing}: HF_HUB_OFFLINE is set, and this needs the Hub; unset it.") from error
    except errors.LocalEntryNotFoundError as error:
        if isinstance(error.__cause__, errors.HfHubHTTPError):
            raise _of_status(doing, repo, error.__cause__) from error
        raise HubUnreachable(
            f"{doing}: the Hub cannot be reached, and this machine's cache lacks a part of {repo}; "
            "fetch it once with a connection."
        ) from error
    except errors.GatedRepoError as error:
        raise HubError(
            f"{doing}: {repo} is gated; ask for access on its page, log in with `hf auth login`, then try again."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise HubError(
            f"{doing}: there is no {repo}, or it is private and you are not logged in; "
            "check the name, or log in with `hf auth login`."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise HubError(f"{doing}: {repo} has no such branch, tag or commit.") from error
    except errors.RemoteEntryNotFoundError as error:
        raise HubError(f"{doing}: a file that {repo} listed is not there any more; try again.") from error
    except errors.HfHubHTTPError as error:
        raise _of_status(doing, repo, error) from error
    except _broken() as error:
        raise HubUnreachable(
            f"{doing}: no answer from the Hub, {type(error).__name__} {error}; check the connection and try again."
        ) from error
    except OSError as error:
        if "Consistency check failed" not in str(error):
            raise
        raise HubUnreachable(f"{doing}: it came cut short however often it was asked for.") from error


def _of_status(doing: str, repo: str, error) -> HubError:
    status, said = error.response.status_code, (error.server_message or "").strip()[:200]
    said = f" ({said})" if said else ""
    if status == 401:
        return HubError(f"{doing}: the Hub does not accept the token; log in with `hf auth login`.{said}")
    if status == 403:
        return HubError(
            f"{doing}: the token may not write to {repo}; it needs the write permission, and its owner a place in "
            f"that organisation.{said}"
        )
    if status in (409, 412):
        return HubConflict(
            f"{doing}: someone else changed {repo} at the same time; look at it, then try again.{said}"
        )
    if status == 413:
        return HubError(f"{doing}: the Hub refuses a file of this size.{said}")
    if status == 429:
        return HubError(f"{doing}: the Hub allows no more requests for now; try again in some minutes.{said}")
    if status >= 500:
        return HubError(
            f"{doing}: the Hub answered {status} however often it was asked; try again later.{said}"
        )
    return HubError(f"{doing}: the Hub answered {status}.{said}")


def _passing(error: Exception) -> bool:
    from huggingface_hub import errors

    if isinstance(error, errors.HfHubHTTPError):
        return error.response.status_code in PASSING
    return isinstance(error, _broken())


def _broken() -> type[Exception]:
    """What a broken connection raises: an error of whichever HTTP library the client of the Hub is built on."""
    from huggingface_hub.errors import HfHubHTTPError

    return HfHubHTTPError.__bases__[0]


def _asked_pause(error: Exception) -> float | None:
    """The seconds of a Retry-After header; dates and nonsense count as none."""
    asked = getattr(getattr(error, "response", None), "headers", {}).get("Retry-After", "")
    return float(asked) if asked.isdecimal() else None
