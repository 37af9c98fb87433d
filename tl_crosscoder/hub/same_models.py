"""Whether a live pair is the one that a crosscoder was trained on, as far as what was kept with it can tell."""

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
    if trained.get("transformers") != given.get("transformers"):
        return
    for side, was, is_ in zip(("base", "tuned"), stored, live, strict=True):
        alike = all(was.get(key) == is_.get(key) for key in READ_ALIKE)
        if alike and was.get("fingerprint") and was["fingerprint"] != is_.get("fingerprint"):
            raise PairMismatch(
                f"the crosscoder was trained on another {side} model: {was.get('name')} at {_short(was.get('revision'))}, weights "
                f"{_short(was['fingerprint'])}; this pair has {is_.get('name')} at {_short(is_.get('revision'))}, "
                f"weights {_short(is_.get('fingerprint'))}.  Load the model it was trained on, or leave out check="
            )


def _models(described: Any) -> list[dict[str, Any]]:
    found = [described.get(side) for side in ("base", "tuned")] if isinstance(described, dict) else []
    return [model for model in found if isinstance(model, dict)]


def _short(value: Any) -> str:
    return f"{value!s:.12}" if value else "an unknown commit"
