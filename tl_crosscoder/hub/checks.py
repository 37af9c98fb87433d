"""What is looked at before anything is published: the weights, the licence, secrets, and what the card can say."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.hub.sae_lens.artifact import FOLDER
from tl_crosscoder.hub.sae_lens.thresholds import inexpressible
from tl_crosscoder.hub.save import load
from tl_crosscoder.hub.secrets import find_secrets
from tl_crosscoder.hub.study import Study


@dataclass(frozen=True)
class Check:
    """One thing that was looked at; where it is ``needed`` and has not ``passed``, nothing is published."""

    name: str
    passed: bool
    text: str
    needed: bool = True


def check_all(
    folder: Path, crosscoder: Crosscoder, study: Study, license: str | None, allow: Iterable[str]
) -> tuple[Check, ...]:
    """Each check of a folder that is laid out, in the order they are shown in."""
    return (
        _same(crosscoder, load(folder)),
        _licence(license),
        _base_models(study.base_models()),
        _nothing_secret(folder, allow),
        _sae_lens(crosscoder),
        _measured(study),
    )


def _sae_lens(crosscoder: Crosscoder) -> Check:
    if reason := inexpressible(crosscoder):
        return Check("SAE-Lens", False, f"left out: {reason}", needed=False)
    return Check("SAE-Lens", True, f"{FOLDER}/ is what SAE.from_pretrained reads")


def _same(crosscoder: Crosscoder, again: Crosscoder) -> Check:
    """What is about to be sent has been read back; NaN and Inf do not get this far."""
    ours, theirs = crosscoder.state_dict(), again.state_dict()
    same = ours.keys() == theirs.keys() and all(torch.equal(ours[name].cpu(), theirs[name]) for name in ours)
    text = (
        "bit-equal when read back, and finite"
        if same
        else "the weights read back differ from those in memory"
    )
    return Check("weights", same, text)


def _licence(license: str | None) -> Check:
    sound = bool(license) and str(license).replace("-", "").replace(".", "").isalnum()
    want = "give one, such as license='apache-2.0', 'mit', 'cc-by-4.0', 'gemma' or 'other'"
    return Check("licence", sound, str(license) if sound else f"{license!r} is none; {want}")


def _base_models(names: Sequence[str]) -> Check:
    if len(names) > 1:
        return Check("base models", True, ", ".join(names))
    found = f"only {names[0]} is" if names else "neither is"
    text = (
        f"{found} known by a name on the Hub; name both with base_model=[...], so that their pages link here"
    )
    return Check("base models", False, text, needed=False)


def _nothing_secret(folder: Path, allow: Iterable[str]) -> Check:
    found = find_secrets(folder, tuple(allow))
    more = f" and {len(found) - 5} more" if len(found) > 5 else ""
    text = "; ".join(found[:5]) + more + ": take it out, or say that it may be there with allow=[...]"
    return Check(
        "nothing secret or local",
        not found,
        text if found else "no token, key, home folder or user name in any file",
    )


def _measured(study: Study) -> Check:
    if study.table is None:
        return Check("validation", False, "no latent table, so the card has no figures", needed=False)
    words = "the latent table" + (
        " and the run's studies" if study.metrics.get("verdict") else ", but no study"
    )
    return Check("validation", True, words)
