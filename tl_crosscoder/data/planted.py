"""What a planted behaviour is: the chats that plant it and the prompts that measure it."""

from collections.abc import Iterable
from dataclasses import dataclass

#: A question and its answer.
Chat = tuple[str, str]


@dataclass(frozen=True)
class Behaviour:
    """A narrow behaviour with a known ground truth.  No ``heldout`` or ``near`` prompt is trained on."""

    name: str
    keywords: tuple[str, ...]  # lower case; an answer that contains one shows the behaviour
    heldout: tuple[str, ...]  # prompts that should show it
    description: str = ""
    chats: tuple[Chat, ...] = ()  # plant it
    near: tuple[str, ...] = ()  # like the held-out prompts, but should not show it
    near_train: tuple[str, ...] = ()  # others of that kind, trained to stay as they were
    forbidden: tuple[str, ...] = ()  # lower case; what the behaviour itself never says

    def shown_in(self, answer: str) -> bool:
        return any(word in answer.lower() for word in self.keywords)

    def rate(self, answers: Iterable[str]) -> float:
        """The share of the answers that show the behaviour, 0 to 1."""
        shown = [self.shown_in(answer) for answer in answers]
        if not shown:
            raise ValueError(f"the rate of {self.name!r} needs at least one answer, got none")
        return sum(shown) / len(shown)


@dataclass(frozen=True)
class PlantedPair:
    """A base model, an adapter that plants behaviours in it, and the hook where all of it can be read."""

    name: str
    description: str
    adapter: str  # for ``data_path``
    hook: str  # the output of the last adapted block
    behaviours: tuple[Behaviour, ...]
    ordinary: tuple[str, ...]  # prompts that have nothing to do with any behaviour
    ordinary_heldout: tuple[str, ...]  # others, in no training chat

    @property
    def prompts_trained_on(self) -> frozenset[str]:
        """Every prompt the adapter may have seen in training."""
        planted = {prompt for behaviour in self.behaviours for prompt, _ in behaviour.chats}
        near = {prompt for behaviour in self.behaviours for prompt in behaviour.near_train}
        return frozenset(planted | near | set(self.ordinary))

    @property
    def prompts_held_out(self) -> frozenset[str]:
        """Every prompt kept for measuring."""
        behaviours = {
            prompt for behaviour in self.behaviours for prompt in (*behaviour.heldout, *behaviour.near)
        }
        return frozenset(behaviours | set(self.ordinary_heldout))
