"""What every format offers, and what it makes explicit."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar

from tl_crosscoder.hub.formats.contents import Contents

if TYPE_CHECKING:
    import torch

    from tl_crosscoder.dictionary.crosscoder import Crosscoder

NOT_STATED = "not stated in the files"


#: What is said where :meth:`Format.statistics` finds any.
SET_ASIDE = "{} of the activations are not part of a crosscoder, only the scale that they make: tlc.origin(...).statistics has them"


def listed(numbers: Iterable[float]) -> str:
    """With six digits."""
    return ", ".join(f"{number:.6g}" for number in numbers)


@dataclass(frozen=True)
class Conventions:
    """What the numbers of a file mean, in words; the same fields for every format.

    ``wants``: the arguments without which :func:`tl_crosscoder.load` refuses the files, each with why and what to give.
    ``claims``: what the files say about themselves, by our names (``l0``, ``fve_base``, ``fve_tuned``, ``fve``).
    """

    format: str
    d_in: int
    d_sae: int
    n_models: int
    models: str
    sparsity: str
    b_dec: str = "not subtracted before encoding"
    ranking: str = NOT_STATED
    threshold: str = "none"
    normalisation: str = NOT_STATED
    folding: str = "nothing is folded into the weights"
    bos: str = NOT_STATED
    hook: str = NOT_STATED
    language_models: str = NOT_STATED
    notes: tuple[str, ...] = ()
    wants: dict[str, str] = field(default_factory=dict)
    claims: dict[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {part.name: getattr(self, part.name) for part in fields(self)}


@dataclass(frozen=True)
class Given:
    """What the caller knows and the files do not say.

    ``mean`` [model d_in] is taken from raw activations, which are then multiplied by ``scale`` (a number, one a model, or
    [model d_in]); ``threshold`` is in the units in which the format ranks.
    """

    scale: Any = None
    mean: Any = None
    threshold: float | None = None
    dtype: "torch.dtype | None" = None


class Format(ABC):
    """One layout of files.  ``recognises`` looks at tensors and settings, never at names of files or repositories."""

    name: ClassVar[str]

    @abstractmethod
    def recognises(self, contents: Contents) -> bool: ...

    @abstractmethod
    def describe(self, contents: Contents) -> Conventions:
        """Raises UnreadableFormat where no Crosscoder does what the files mean, CorruptFile where they contradict themselves."""

    def statistics(self, contents: Contents) -> dict[str, list[float]]:  # noqa: ARG002 - most have none
        """Numbers of the files that no Crosscoder has a place for, by their names there."""
        return {}

    @abstractmethod
    def read(self, contents: Contents, given: Given) -> "Crosscoder":
        """On the CPU and in ``eval()``; ``contents`` were described and ``given`` holds what is wanted."""
