"""Which predictions are counted, and how far they are from the tuned model's."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_crosscoder.models.tokens import TokenBatch

FIRST = 9  # predictions of each assistant turn counted as its beginning
#: what is summed over the counted predictions
SCORES = ("kl", "kl_base", "nll", "nll_argmax", "agreement")


def counted_predictions(
    batch: TokenBatch, where: Bool[Tensor, "seq pos"], published: bool = False
) -> dict[str, Bool[Tensor, "seq pos"]]:
    """``all``, ``first 9`` of each turn, and the ``rest``: positions in ``where`` whose *next* token is predicted and counted.

    That is the assistant's token if there is an assistant in the sequence, else any.  The prediction made at the template's last
    token, of a turn's first word, is among the first nine; ``published``, as the paper counts: the first ten of a turn less those
    made at template tokens, so that this one is in ``all`` alone.
    """
    nothing = torch.zeros_like(where[:, :1])
    next_is_assistant = torch.cat([batch.assistant[:, 1:], nothing], 1)
    next_exists = torch.cat([batch.attention_mask[:, 1:], nothing], 1)
    chat = batch.assistant.any(-1, keepdim=True)
    turns = torch.where(chat, next_is_assistant, next_exists)
    every = where & turns
    begin = first_of_each_run(every, turns, FIRST + published)
    first = begin & ~batch.template if published else begin
    return {"all": every, f"first {FIRST}": first, "rest": every & ~begin}


def first_of_each_run(
    where: Bool[Tensor, "seq pos"], runs: Bool[Tensor, "seq pos"], n: int
) -> Bool[Tensor, "seq pos"]:
    """The first ``n`` positions in ``where`` of each contiguous run of ``runs``: what is missing inside a run begins no other."""
    out, count = torch.zeros_like(where), torch.zeros(len(where), dtype=torch.long, device=where.device)
    for p in range(where.shape[1]):
        count = torch.where(runs[:, p], count + where[:, p], 0)
        out[:, p] = where[:, p] & runs[:, p] & (count <= n)
    return out


def log_probs(
    logits: Float[Tensor, "seq pos d_vocab"], where: Bool[Tensor, "seq pos"]
) -> Float[Tensor, "token d_vocab"]:
    """Of the positions in ``where``, in float32."""
    return logits[where].float().log_softmax(-1)


def kl(of: Float[Tensor, "token d_vocab"], to: Float[Tensor, "token d_vocab"]) -> Float[Tensor, " token"]:
    """KL(of ‖ to) of each prediction, in nats."""
    return (of.exp() * (of - to)).sum(-1).double()


def scores(
    tuned: Float[Tensor, "token d_vocab"],
    base: Float[Tensor, "token d_vocab"],
    patched: Float[Tensor, "token d_vocab"],
    true: Int[Tensor, " token"],
) -> dict[str, Float[Tensor, " token"]]:
    """One number of :data:`SCORES` for each prediction.

    ``kl``: from the tuned model; ``kl_base``: from the base model; ``nll`` of the true next token, ``nll_argmax`` of the token that
    the tuned model holds most likely; ``agreement``: 1 where that is the patched model's own first choice.
    """
    best = tuned.argmax(-1)
    return {
        "kl": kl(tuned, patched),
        "kl_base": kl(base, patched),
        "nll": -patched.gather(1, true[:, None])[:, 0].double(),
        "nll_argmax": -patched.gather(1, best[:, None])[:, 0].double(),
        "agreement": (patched.argmax(-1) == best).double(),
    }
