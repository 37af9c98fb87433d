"""Base and tuned run as one model, on which SAE-Lens evaluates and trains crosscoders."""

from typing import TYPE_CHECKING

from tl_crosscoder.hub.sae_lens.extra import needs_sae_lens
from tl_crosscoder.models.pair import ModelPair
from tl_crosscoder.types import TUNED
from tl_crosscoder.widths import refuse_unlike

if TYPE_CHECKING:
    from tl_crosscoder.hub.sae_lens.native.joint_model import JointModel


def joint(pair: ModelPair, model: int = TUNED) -> "JointModel":
    """Base and tuned as one model of SAE-Lens and TransformerLens: at the pair's hook both residual streams lie side by side.

    Logits and losses are those of ``model``: run twice, with 0 and 1, for what a crosscoder costs either.
    """
    refuse_unlike(pair, "joint")
    needs_sae_lens()
    from tl_crosscoder.hub.sae_lens.native.joint_model import JointModel

    return JointModel(pair, model)
