"""The tensors of a file that was looked at, through torch."""

import torch

from tl_crosscoder.errors import CorruptFile
from tl_crosscoder.files import StoredTensor
from tl_crosscoder.hub.formats.contents import Contents
from tl_crosscoder.hub.formats.pickles import Outlined
from tl_crosscoder.hub.tensors import DTYPES, GivenWeights, SafetensorsWeights, Weights


def open_weights(contents: Contents) -> Weights:
    """A safetensors file's tensors are read as they are asked for; a ``.pt`` file's are mapped."""
    if contents.pickled:
        return GivenWeights(contents.weights, _unpickled(contents))
    stored = {name: tensor for name, tensor in contents.tensors.items() if isinstance(tensor, StoredTensor)}
    return SafetensorsWeights(contents.weights, stored)


def _unpickled(contents: Contents) -> dict[str, torch.Tensor]:
    """Its program was walked before and found to make tensors only; torch is told again to run nothing else."""
    loaded = torch.load(contents.weights, map_location="cpu", weights_only=True, mmap=True)  # noqa: TID251 - the one place
    state = loaded[contents.nested] if contents.nested else loaded
    found = {}
    for name, outlined in contents.tensors.items():
        tensor = state[contents.prefix + name].detach()
        if (
            not isinstance(outlined, Outlined)
            or tensor.shape != outlined.shape
            or tensor.dtype != DTYPES[outlined.dtype]
        ):
            raise CorruptFile(f"{contents.weights}: {name!r} is not the tensor that its program describes")
        found[name] = tensor
    return found
