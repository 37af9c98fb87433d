"""What makes two models a pair; each refusal says both values and what to do."""

from typing import Any

from tl_crosscoder.errors import PairMismatch
from tl_crosscoder.models.backends import Backend
from tl_crosscoder.models.loading import Outline, with_template
from tl_crosscoder.models.provenance import adapter_state, weight_ids


def refuse_one_model_twice(base: Backend, tuned: Backend) -> None:
    """Raises PairMismatch where nothing can differ, or where base is the one with the adapter."""
    states = adapter_state(base), adapter_state(tuned)
    if states == ("on", None):
        raise PairMismatch(
            "base carries the adapter; the roles look swapped: pass the plain model as base, or use "
            "ModelPair.from_adapter(peft_model)"
        )
    if states[0] == states[1] and weight_ids(base) == weight_ids(tuned):
        what = f"the same {type(base.model).__name__} object"
        if states[0] == "on":
            what = "one set of weights with the adapter on in both (get_peft_model changes the model it is given)"
        raise PairMismatch(
            f"base and tuned are {what}, so nothing can differ; for an adapter use ModelPair.from_adapter(peft_model), "
            "for a control in which nothing changed pass check=False"
        )


def refuse_unlike_models(
    base: Backend | Outline, tuned: Backend | Outline, tokenizer: Any = None, *, unlike: bool = False
) -> Any:
    """The pair's tokenizer: the one handed in, else tuned's, else base's.

    Raises PairMismatch for another width or depth (unless ``unlike``) or precision, for tokenizers that give other ids, and for
    tokens without an embedding.  End-of-text and padding ids may differ: many chat models have their own.
    """
    sizes = () if unlike else (("d_in", "width"), ("n_layers", "number of blocks"))
    for name, what in (*sizes, ("dtype", "precision")):
        if (left := getattr(base, name)) != (right := getattr(tuned, name)):
            raise PairMismatch(
                f"base has {what} {left} and tuned {right}; a pair is one architecture in one precision, "
                "before and after fine-tuning; two models of other sizes are one with unlike=True"
            )
    known = [t for t in (tokenizer, tuned.tokenizer, base.tokenizer) if t is not None]
    if not known:
        return None
    for other in known[1:]:
        _refuse_unlike_tokenizers(other, known[0])
    for side, backend in (("base", base), ("tuned", tuned)):
        rows = getattr(backend, "d_vocab", None)
        if rows is not None and len(known[0]) > rows:
            raise PairMismatch(
                f"the tokenizer has {len(known[0])} tokens, but {side} has only {rows} embedding rows; "
                "tokens added for the fine-tune have no meaning there"
            )
    for other in known[1:]:
        with_template(known[0], other)
    return known[0]


def _refuse_unlike_tokenizers(base: Any, tuned: Any) -> None:
    if base is tuned:
        return
    left, right = base.get_vocab(), tuned.get_vocab()
    if left != right:
        token = min(token for token in left.keys() | right.keys() if left.get(token) != right.get(token))
        raise PairMismatch(
            f"the tokenizers differ: {len(left)} tokens in base, {len(right)} in tuned; {token!r} is id "
            f"{left.get(token)} in base and {right.get(token)} in tuned; both models must read the same ids"
        )
    if base.bos_token_id != tuned.bos_token_id:
        raise PairMismatch(
            f"the tokenizers differ: a text begins with id {base.bos_token_id} in base, {tuned.bos_token_id} in tuned"
        )
