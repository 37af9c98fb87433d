"""Where in the chat template a token stands: its slot, counted anew in every exchange."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from jaxtyping import Int, Integer

from tl_crosscoder.models.chats import ASSISTANT, TEMPLATE, tokenise_chats

ELSEWHERE = 0  # the template's, in no slot: what stands before the first exchange, or an unusual turn


@dataclass(frozen=True)
class TemplateSlots:
    """The template's tokens of one exchange, slots 1 to ``len(names)``: the user's header, what lies between the user's words
    and the assistant's, and the end of the answer.  ``names`` are the tokens as text, in this order.
    """

    names: tuple[str, ...]
    header: int
    between: int

    @classmethod
    def of(cls, tokenizer: Any) -> "TemplateSlots":
        """Read off two exchanges in the tokenizer's template.  Raises ValueError where it has none."""
        chat = [{"role": role, "content": "a"} for role in ("user", "assistant") * 2]
        [(ids, flags)] = tokenise_chats([chat], tokenizer)
        runs = [(start, stop) for start, stop, _, _ in _runs(flags)]
        if len(runs) < 4:
            return cls((), 0, 0)
        (b0, b1), (a0, a1) = runs[1], runs[2]
        end = len(ids) - runs[4][0] if len(runs) > 4 else 0
        end = min(end, a1 - a0)
        order = [*range(a0 + end, a1), *range(b0, b1), *range(a0, a0 + end)]
        names = tuple(tokenizer.decode([int(ids[i])]) for i in order)
        return cls(names, a1 - a0 - end, b1 - b0)

    @property
    def end(self) -> int:
        """Slots after the assistant's words."""
        return len(self.names) - self.header - self.between

    def slots(self, flags: Integer[np.ndarray, " pos"]) -> Int[np.ndarray, " pos"]:
        """The slot of each token of a sequence with these flag bits; -1 for what is not the template's."""
        slots = np.full(len(flags), -1)
        for start, stop, before, after in _runs(flags):
            place = np.arange(stop - start)
            from_right = place[::-1]
            slots[start:stop] = ELSEWHERE
            here = slots[start:stop]
            if after == "assistant":
                fits = from_right < self.between
                here[fits] = (self.header + self.between - from_right)[fits]
            elif after == "user":
                fits = from_right < self.header
                here[fits] = (self.header - from_right)[fits]
                if before == "assistant":
                    ending = ~fits & (from_right < self.header + self.end)
                    here[ending] = (len(self.names) + self.header - from_right)[ending]
            elif before == "assistant":
                fits = place < self.end
                here[fits] = (self.header + self.between + 1 + place)[fits]
            elif before == "user":
                fits = place < self.between
                here[fits] = (self.header + 1 + place)[fits]
        return slots


def _runs(flags: np.ndarray) -> list[tuple[int, int, str, str]]:
    """(start, stop, whose words stand before, whose after) of each run of the template's tokens; "" at the ends."""
    template, assistant = (flags & TEMPLATE) > 0, (flags & ASSISTANT) > 0
    whose = np.where(template, "template", np.where(assistant, "assistant", "user"))
    cuts = np.flatnonzero(np.diff(template.astype(int))) + 1
    edges = [0, *cuts.tolist(), len(flags)]
    return [
        (a, b, str(whose[a - 1]) if a else "", str(whose[b]) if b < len(flags) else "")
        for a, b in pairwise(edges)
        if b > a and template[a]
    ]
