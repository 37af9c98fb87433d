"""Who says whether a text shows what was claimed: a rule that works offline, or a language model behind an endpoint.

A judge never sees which model, latent or strength a text comes from.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

from tl_crosscoder.data.planted import Behaviour


@dataclass(frozen=True)
class Claim:
    """What a text is asked about: in a sentence, for a reader, and as words that give it away, for a rule."""

    text: str
    words: tuple[str, ...] = ()

    @classmethod
    def of(cls, behaviour: Behaviour) -> "Claim":
        """That a text shows the behaviour."""
        return cls(
            f"The answer shows this behaviour: {behaviour.description or behaviour.name}", behaviour.keywords
        )


@dataclass(frozen=True)
class Passage:
    """A text in its tokens, with a latent's activation on each where that is known; ``asked`` is what it answers."""

    tokens: tuple[str, ...]
    acts: tuple[float, ...] = ()
    asked: str = ""

    def __post_init__(self):
        if self.acts and len(self.acts) != len(self.tokens):
            raise ValueError(
                f"Passage wants an activation a token: {len(self.tokens)} tokens, {len(self.acts)} activations"
            )

    @property
    def text(self) -> str:
        return "".join(self.tokens)

    @property
    def marked(self) -> str:
        """The text with «» around the tokens on which the latent is active."""
        acts = self.acts or (0.0,) * len(self.tokens)
        marked = (f"«{t}»" if f > 0 else t for t, f in zip(self.tokens, acts, strict=True))
        return "".join(marked).replace("»«", "")


class Verdict(NamedTuple):
    """``holds`` is None where the judge gave no usable answer; ``said`` is then what came instead."""

    holds: bool | None
    said: str = ""


def all_usable(verdicts: Iterable[Sequence[Any]]) -> bool:
    """Whether the judge said something usable of every passage; what it did not is asked again another time."""
    return all(verdict[0] is not None for verdict in verdicts)


@runtime_checkable
class Judge(Protocol):
    """Says of each passage whether a claim holds of it.  ``name`` goes into results: no secret, no address."""

    @property
    def name(self) -> str: ...

    def holds(self, claim: Claim, passages: Sequence[Passage]) -> list[Verdict]:
        """One verdict a passage, in order.  A passage without a usable answer does not stop the others."""
        ...


@runtime_checkable
class Explainer(Protocol):
    """Says in a sentence what the marked tokens of a latent's strongest examples have in common."""

    @property
    def name(self) -> str: ...

    def describe(self, examples: Sequence[Passage]) -> Claim | None:
        """None where no usable description came."""
        ...


@dataclass(frozen=True)
class KeywordJudge:
    """The keyword rule: a claim holds of a text that contains one of its words, in any case.

    A keyword alone proves little: strong steering yields junk that contains it.
    """

    name: str = "keywords"

    def holds(self, claim: Claim, passages: Sequence[Passage]) -> list[Verdict]:
        if not claim.words:
            raise ValueError(f"the keyword rule needs words to look for; the claim has none: {claim.text!r}")
        words = [word.lower() for word in claim.words]
        return [Verdict(any(word in passage.text.lower() for word in words)) for passage in passages]


@dataclass(frozen=True)
class TokenJudge:
    """Judge and explainer by tokens alone, offline and the same every time.

    It describes a latent by the tokens that carry ``share`` of the activation in its examples, ``most`` of them at most, the
    heaviest first; a claim holds of a passage with one of these tokens.  A description by tokens cannot say *when* a token
    excites a latent, so this is the floor that a better explainer has to beat.
    """

    share: float = 0.8
    most: int = 5

    @property
    def name(self) -> str:
        """Of another ``share`` or ``most`` another: what was kept under one name is of one rule."""
        return "tokens" if self == TokenJudge() else f"tokens ({self.share:g} by at most {self.most})"

    def describe(self, examples: Sequence[Passage]) -> Claim | None:
        mass: dict[str, float] = {}
        for passage in examples:
            for token, act in zip(passage.tokens, passage.acts, strict=True):
                if act > 0:
                    mass[token] = mass.get(token, 0.0) + act
        heaviest = sorted(mass, key=lambda token: (-mass[token], token))
        words: list[str] = []
        while len(words) < min(self.most, len(heaviest)) and sum(mass[w] for w in words) < self.share * sum(
            mass.values()
        ):
            words.append(heaviest[len(words)])
        return Claim("fires on " + ", ".join(f"‹{word}›" for word in words), tuple(words)) if words else None

    def holds(self, claim: Claim, passages: Sequence[Passage]) -> list[Verdict]:
        if not claim.words:
            raise ValueError(f"the token rule needs tokens to look for; the claim has none: {claim.text!r}")
        words = set(claim.words)
        return [Verdict(not words.isdisjoint(passage.tokens)) for passage in passages]
