"""One passage in which a latent is active, and what the latent writes into each model there."""

from dataclasses import dataclass, fields

PER_TOKEN = ("acts", "written_base", "written_tuned", "drive_base", "drive_tuned")


@dataclass(frozen=True)
class Example:
    """A window of one sequence, token by token; every list is as long as ``tokens``.

    ``acts`` is the latent's activation, 0 where it is inactive.  ``written_base`` and ``written_tuned`` are the norms of what it
    adds to each model's residual stream, in raw units.  ``drive_base`` and ``drive_tuned`` are each model's part of the
    pre-activation.
    """

    source: str
    sequence: int
    tokens: list[str]
    acts: list[float]
    written_base: list[float]
    written_tuned: list[float]
    drive_base: list[float] | None = None
    drive_tuned: list[float] | None = None

    def __post_init__(self):
        for field in fields(self):
            values = getattr(self, field.name)
            if field.name in PER_TOKEN and values is not None and len(values) != len(self.tokens):
                raise ValueError(
                    f"Example wants one value a token: {len(self.tokens)} tokens, {len(values)} {field.name}"
                )

    @property
    def peak(self) -> int:
        """The position of the largest activation."""
        return max(range(len(self.acts)), key=lambda position: _finite(self.acts[position]), default=0)


def _finite(value: float) -> float:
    return value if value == value else float("-inf")
