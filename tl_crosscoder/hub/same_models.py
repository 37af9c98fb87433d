"""Whether two pairs of models are one, as far as what was kept with a crosscoder can tell."""

from collections.abc import Iterator
from typing import Any

from tl_crosscoder.errors import PairMismatch

#: A fingerprint tells two models apart only where they were read in the same way.
READ_ALIKE = ("class", "dtype", "adapter")


def refuse_other_models(trained: Any, given: dict[str, Any]) -> None:
    """Raise PairMismatch where the models stand the other way round, or are others than the crosscoder's own.

    ``trained`` is the description that was kept with the crosscoder; one that does not say enough is let pass.
    """
    stored, live = _models(trained), _models(given)
    if len(stored) < 2 or len(live) < 2:
        return
    prints = [[model.get("fingerprint") for model in pair] for pair in (stored, live)]
    if prints[0] == prints[1][::-1] and prints[0][0] != prints[0][1] and all(prints[0]):
        raise PairMismatch(
            "base and tuned stand the other way round: this pair's base is the model that the crosscoder calls tuned.  "
            "Make it ModelPair(tuned, base)"
        )
    for side, was, is_ in _others(trained, given):
        raise PairMismatch(
            f"the crosscoder was trained on another {side} model: {was.get('name')} at {_short(was.get('revision'))}, weights "
            f"{_short(was['fingerprint'])}; this pair has {is_.get('name')} at {_short(is_.get('revision'))}, "
            f"weights {_short(is_.get('fingerprint'))}.  Load the model it was trained on, or leave out check="
        )


def refuse_another_pair(a: Any, b: Any) -> None:
    """Raise PairMismatch where the descriptions of two crosscoders' pairs name other hooks, or models with other weights."""
    if not (isinstance(a, dict) and isinstance(b, dict)):
        return
    only = "only crosscoders of one pair of models at one hook have latents to compare"
    hooks = a.get("hook"), b.get("hook")
    if all(hooks) and hooks[0] != hooks[1]:
        raise PairMismatch(f"one crosscoder was trained at {hooks[0]}, the other at {hooks[1]}; {only}")
    for side, one, other in _others(a, b):
        raise PairMismatch(
            f"one crosscoder was trained on the {side} model {one.get('name')}, weights {_short(one['fingerprint'])}, the other on "
            f"{other.get('name')}, weights {_short(other.get('fingerprint'))}; {only}"
        )


def _others(a: dict[str, Any], b: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """The sides on which two descriptions are seen to be of other models, with both."""
    if a.get("transformers") != b.get("transformers"):
        return
    for side, one, other in zip(("base", "tuned"), _models(a), _models(b), strict=False):
        alike = all(one.get(key) == other.get(key) for key in READ_ALIKE)
        if alike and one.get("fingerprint") and one["fingerprint"] != other.get("fingerprint"):
            yield side, one, other


def _models(described: Any) -> list[dict[str, Any]]:
    found = [described.get(side) for side in ("base", "tuned")] if isinstance(described, dict) else []
    return [model for model in found if isinstance(model, dict)]


def _short(value: Any) -> str:
    return f"{value!s:.12}" if value else "an unknown commit"
