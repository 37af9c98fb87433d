"""Name <-> class.  ``build`` and ``describe`` are inverses, so that a part can be written to JSON and read back.

A part stores each constructor argument unchanged under its own name; its description is those arguments and its name.  Where an
argument is itself a part of the same kind, or a tuple of such parts, so is its description.
"""

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

Part = TypeVar("Part", bound=type)


class Registry:
    """The named classes of one kind of part (``kind`` appears in the errors)."""

    def __init__(self, kind: str):
        self.kind = kind
        self.classes: dict[str, type] = {}

    def register(self, name: str) -> Callable[[Part], Part]:
        """Class decorator: make the class known as ``name``."""

        def add(cls: Part) -> Part:
            if name in self.classes:
                raise ValueError(
                    f"two {self.kind} classes named {name!r}: {self.classes[name].__name__} and {cls.__name__}"
                )
            self.classes[name] = cls
            return cls

        return add

    def name_of(self, part: object) -> str:
        for name, cls in self.classes.items():
            if type(part) is cls:
                return name
        raise KeyError(
            f"{type(part).__name__} is not a registered {self.kind}; known: {', '.join(sorted(self.classes))}"
        )

    def describe(self, part: object) -> dict[str, Any]:
        """``{"name": ..., **constructor arguments}``, as JSON gives it back."""
        arguments = inspect.signature(type(part)).parameters
        return {"name": self.name_of(part), **{name: self._plain(getattr(part, name)) for name in arguments}}

    def build(self, description: dict[str, Any]) -> Any:
        """The part that ``describe`` described.  Unknown names and unknown arguments raise."""
        arguments = dict(description)
        name = arguments.pop("name", None)
        if name not in self.classes:
            raise KeyError(f"no {self.kind} named {name!r}; known: {', '.join(sorted(self.classes))}")
        known = inspect.signature(self.classes[name]).parameters
        if unknown := sorted(set(arguments) - set(known)):
            raise ValueError(
                f"{self.kind} {name!r} has no argument {unknown[0]!r}; known: {', '.join(known)}"
            )
        return self.classes[name](**{key: self._built(value) for key, value in arguments.items()})

    def _plain(self, value: object) -> object:
        if type(value) in self.classes.values():
            return self.describe(value)
        return [self._plain(part) for part in value] if isinstance(value, tuple) else value

    def _built(self, value: object) -> object:
        """A part of a part, or several; other values as they are."""
        if isinstance(value, dict):
            return self.build(value)
        if isinstance(value, list) and value and all(isinstance(part, dict) for part in value):
            return tuple(self.build(part) for part in value)
        return value
