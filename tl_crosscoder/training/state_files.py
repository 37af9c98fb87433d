"""The tensors of a checkpoint: taken out of the state's tree and put back, in one file or in one of each rank's latents."""

import math
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from tl_crosscoder.dictionary.shard import Shard, by_latent
from tl_crosscoder.errors import CorruptFile
from tl_crosscoder.files import read_header, sha256

#: The file where one process wrote all.
STATE = "state.safetensors"


def split(tree: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """The tree with each tensor's name in its place; ``tensors`` gets them, on the CPU and each in memory of its own."""
    if isinstance(tree, dict):
        return {
            name: split(value, f"{path}.{name}" if path else name, tensors) for name, value in tree.items()
        }
    if isinstance(tree, float) and not math.isfinite(tree):
        return {"$float": str(tree)}  # JSON has none
    if not isinstance(tree, Tensor):
        return tree
    plain = tree.detach().cpu().contiguous()
    taken = {tensor.data_ptr() for tensor in tensors.values()}
    tensors[path] = plain.clone() if plain.data_ptr() in taken else plain
    return {"$tensor": path}


def joined(tree: Any, tensors: dict[str, Tensor]) -> Any:
    """The inverse of ``split``."""
    if not isinstance(tree, dict):
        return tree
    if "$tensor" in tree:
        return tensors[tree["$tensor"]]
    if "$float" in tree:
        return float(tree["$float"])
    return {name: joined(value, tensors) for name, value in tree.items()}


def file_name(index: int, n: int) -> str:
    """The file of the latents that the process of this index, of n, held."""
    return STATE if n == 1 else f"state-{index:05d}-of-{n:05d}.safetensors"


def divided(name: str, tensor: Tensor) -> bool:
    """It has a row for each latent."""
    return tensor.dim() > 0 and by_latent(name)


def read_tensors(folder: Path, files: dict[str, Any], shard: Shard) -> dict[str, Tensor]:
    """The tensors of a checkpoint, of the latents of a shard; a file that has none of them is not read.

    Latent g is row g // n of file g % n, and becomes row g // m of rank g % m.
    """
    n, m, index = len(files), shard.latents.size, shard.latents.index
    common = math.gcd(n, m)
    found: dict[str, Tensor] = {}
    for part, (name, about) in enumerate(files.items()):
        here = (part - index) % common == 0
        if part and not here:
            continue
        read_header(folder / name, about["tensors"])
        if sha256(folder / name) != about["sha256"]:
            raise CorruptFile(f"{folder / name} was altered: its sha256 is not the one it was written with")
        for tensor_name, tensor in load_file(folder / name).items():
            if not divided(tensor_name, tensor):
                found[tensor_name] = tensor.clone()
            elif here:
                shape = n * len(tensor) // m, *tensor.shape[1:]
                whole = found.setdefault(tensor_name, tensor.new_empty(shape))
                first = next(row for row in range(m) if (row * n + part) % m == index)
                whole[(first * n + part) // m :: n // common] = tensor[first :: m // common]
    return found
