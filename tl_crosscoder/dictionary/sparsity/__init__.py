"""How pre-activations become codes.  A new way is one file and one line here."""

from tl_crosscoder.dictionary.sparsity.base import SPARSITIES, Sparsity
from tl_crosscoder.dictionary.sparsity.batch_topk import BatchTopK
from tl_crosscoder.dictionary.sparsity.group_max import GroupMax
from tl_crosscoder.dictionary.sparsity.jumprelu import JumpReLU
from tl_crosscoder.dictionary.sparsity.per_model import PerModel
from tl_crosscoder.dictionary.sparsity.relu import ReLU
from tl_crosscoder.dictionary.sparsity.split import Split
from tl_crosscoder.dictionary.sparsity.threshold import Threshold
from tl_crosscoder.dictionary.sparsity.topk import TopK

__all__ = [
    "SPARSITIES",
    "BatchTopK",
    "GroupMax",
    "JumpReLU",
    "PerModel",
    "ReLU",
    "Sparsity",
    "Split",
    "Threshold",
    "TopK",
]
