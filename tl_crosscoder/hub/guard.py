"""What a crosscoder's weights must be, before and after they are read."""

from pathlib import Path

from torch import Tensor

from tl_crosscoder.errors import CorruptFile
from tl_crosscoder.files import StoredTensor, read_header


def check_header(path: Path, expected: dict[str, tuple[int, ...]]) -> dict[str, StoredTensor]:
    """What a safetensors file holds, unless it is not exactly the expected names and shapes, in one float dtype: CorruptFile."""
    stored = read_header(path, expected)
    for name, shape in expected.items():
        if stored[name].shape != shape:
            raise CorruptFile(
                f"{path}: {name!r} wants the shape {list(shape)} of config.json, got {str(list(stored[name].shape))[:60]}"
            )
        if "F" not in stored[name].dtype:
            raise CorruptFile(f"{path}: {name!r} wants a float dtype, got {stored[name].dtype}")
    if len(dtypes := {tensor.dtype for tensor in stored.values()}) > 1:
        raise CorruptFile(f"{path}: the tensors differ in dtype: {', '.join(sorted(dtypes))}")
    return stored


def check_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Refuse NaN and Inf."""
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise CorruptFile(f"{path}: {name!r} holds NaN or Inf")
