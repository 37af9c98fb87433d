"""What tensors a format may hold, and which of their axes is which.  Nothing here needs torch."""

from collections.abc import Mapping
from itertools import permutations
from pathlib import Path

from tl_crosscoder.errors import CorruptFile, UnreadableFormat
from tl_crosscoder.hub.formats.contents import Contents

Shape = tuple[int, ...]
#: No dictionary has more latents, nor a model wider activations: what claims to is hostile.
LARGEST = 1 << 26


def expect(
    contents: Contents, wanted: Mapping[str, Shape], further: Mapping[str, Shape] | None = None
) -> None:
    """Refuse a tensor that is missing, unknown, of another shape or not of floats; ``further`` may be missing, or integers."""
    known = {**wanted, **(further or {})}
    if unknown := sorted(set(contents.tensors) - set(known)):
        raise UnreadableFormat(
            f"{contents.weights}: unknown tensor {unknown[0]!r:.80}; a reader that left it out could be silently wrong. "
            f"This format has {', '.join(known)}"
        )
    for name, shape in known.items():
        if name not in contents:
            if name in wanted:
                raise UnreadableFormat(
                    f"{contents.weights}: the tensor {name!r} is missing; there are {', '.join(contents.tensors):.200}"
                )
            continue
        if contents.shape(name) != shape:
            raise CorruptFile(
                f"{contents.weights}: {name!r} wants the shape {list(shape)}, got {list(contents.shape(name))}"
            )
        if name in wanted and "F" not in contents.tensors[name].dtype:
            raise CorruptFile(
                f"{contents.weights}: {name!r} wants a float dtype, got {contents.tensors[name].dtype}"
            )


def sizes_of(contents: Contents, name: str, axes: str) -> dict[str, int]:
    """The sizes of the axes of a tensor of that many."""
    shape = contents.shape(name) if name in contents else ()
    if len(shape) != len(axes.split()):
        raise CorruptFile(
            f"{contents.weights}: {name!r} wants the axes [{axes.replace(' ', ', ')}], got {list(shape)}"
        )
    if not all(0 < size <= LARGEST for size in shape):
        raise CorruptFile(f"{contents.weights}: {name!r} is {list(shape)}; sizes are 1..{LARGEST}")
    return dict(zip(axes.split(), shape, strict=True))


def axes_of(path: Path, name: str, shape: Shape, sizes: Mapping[str, int]) -> str:
    """Which axis is which, where only one order of these sizes fits the shape; otherwise UnreadableFormat."""
    fitting = [order for order in permutations(sizes) if tuple(sizes[axis] for axis in order) == shape]
    if len(fitting) == 1:
        return " ".join(fitting[0])
    told = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
    what = "ambiguous: several orders fit" if fitting else "no order of"
    raise UnreadableFormat(
        f"{path}: {name!r} is {list(shape)}, {what} the axes that the biases tell ({told})"
    )
