"""What training minimises: the sum of a list of losses.  A new one is one file and one line here."""

from tl_crosscoder.dictionary.losses.auxk import AuxK
from tl_crosscoder.dictionary.losses.base import LOSSES, Loss, Progress
from tl_crosscoder.dictionary.losses.delta import Delta
from tl_crosscoder.dictionary.losses.l1 import L1
from tl_crosscoder.dictionary.losses.l2_norm import L2Norm
from tl_crosscoder.dictionary.losses.matryoshka import Matryoshka
from tl_crosscoder.dictionary.losses.mse import MSE
from tl_crosscoder.dictionary.losses.pre_act import PreAct
from tl_crosscoder.dictionary.losses.tanh_penalty import TanhPenalty

__all__ = [
    "L1",
    "LOSSES",
    "MSE",
    "AuxK",
    "Delta",
    "L2Norm",
    "Loss",
    "Matryoshka",
    "PreAct",
    "Progress",
    "TanhPenalty",
]
