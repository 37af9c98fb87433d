"""A task: prompts, and whether an answer to one is right."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from tl_crosscoder.data.planted import Behaviour


@runtime_checkable
class Task(Protocol):
    """``prompts`` are user messages.  ``gold``: an answer to each, whose likelihood is watched; None: the model's own, unedited."""

    @property
    def name(self) -> str: ...
    @property
    def prompts(self) -> Sequence[str]: ...
    @property
    def gold(self) -> Sequence[str] | None: ...
    def correct(self, number: int, answer: str, before: str) -> bool:
        """Whether ``answer`` to prompt ``number`` is right; ``before`` is what the unedited model said."""
        ...


@dataclass(frozen=True)
class BehaviourTask:
    """An answer to a behaviour's held-out prompt is right where it shows the behaviour."""

    behaviours: tuple[Behaviour, ...]
    gold: None = None

    @property
    def name(self) -> str:
        return ", ".join(b.name for b in self.behaviours)

    @property
    def prompts(self) -> tuple[str, ...]:
        return tuple(prompt for b in self.behaviours for prompt in b.heldout)

    def correct(self, number: int, answer: str, before: str) -> bool:  # noqa: ARG002
        """Whether the behaviour that the prompt is of is shown."""
        owner = [b for b in self.behaviours for _ in b.heldout][number]
        return owner.shown_in(answer)


@dataclass(frozen=True)
class ExactMatch:
    """An answer is right where it is the gold one, but for blanks around it and capitals."""

    name: str
    prompts: tuple[str, ...]
    gold: tuple[str, ...]

    @classmethod
    def from_file(cls, path: str | Path) -> "ExactMatch":
        """JSON lines of ``{"prompt", "answer"}``.  Raises ValueError for anything else, with the line."""
        rows = []
        for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                rows.append((str(row["prompt"]), str(row["answer"])))
            except (ValueError, KeyError, TypeError) as error:
                wanted = 'wanted {"prompt": ..., "answer": ...}'
                raise ValueError(f"{path}, line {number}: {wanted}, got {line!r:.80}.") from error
        if not rows:
            raise ValueError(f"{path} holds no prompt.")
        prompts, gold = zip(*rows, strict=True)
        return cls(Path(path).stem, prompts, gold)

    def correct(self, number: int, answer: str, before: str) -> bool:  # noqa: ARG002
        return answer.strip().casefold() == self.gold[number].strip().casefold()


@dataclass(frozen=True)
class Unchanged:
    """An answer is right where it is what the unedited model said: for prompts that the task has nothing to do with."""

    name: str
    prompts: tuple[str, ...]
    gold: None = None

    def correct(self, number: int, answer: str, before: str) -> bool:  # noqa: ARG002
        return answer == before
