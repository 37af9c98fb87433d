"""A crosscoder as an SAE of SAE-Lens, on the concatenated activations."""

from typing import Any

from jaxtyping import Float
from sae_lens import SAE, JumpReLUSAE, TopKSAE
from torch import Tensor

from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.errors import ShapeMismatch
from tl_crosscoder.hub.sae_lens.flat import Flat
from tl_crosscoder.hub.sae_lens.native.metadata import JointMetadata
from tl_crosscoder.hub.sae_lens.native.precision import FollowsPrecision
from tl_crosscoder.hub.sae_lens.unflat import unflatten
from tl_crosscoder.hub.sae_lens.words import origin


class JointSAE(FollowsPrecision):
    """What both kinds of :class:`CrosscoderSAE` share: activations [..., n_models · d_model], model 0 base, 1 tuned."""

    def __init__(self, cfg: Any, use_error_term: bool = False):
        super().__init__(cfg, use_error_term)
        if not isinstance(block := cfg.metadata.crosscoder, dict):
            raise ValueError(
                "this SAE's metadata have no crosscoder block, which says how many models its activations are of; "
                "it is an SAE of one model, or its metadata were lost"
            )
        self.n_models: int = block["n_models"]
        self.d_model: int = block["d_in"]
        cfg.metadata = JointMetadata(**cfg.metadata.to_dict())

    @classmethod
    def from_sae(cls, sae: SAE) -> "JointSAE":
        """The typed view of an SAE that SAE-Lens loaded; the weights are shared."""
        kind = JointSAE.get_sae_class_for_architecture(sae.cfg.architecture())
        made = kind(type(sae.cfg).from_dict({**sae.cfg.to_dict(), "device": "meta"}))
        made.cfg.device = sae.cfg.device
        made.load_state_dict(dict(sae.named_parameters()), assign=True)
        return made.to(sae.W_dec.device)

    @classmethod
    def get_sae_class_for_architecture(cls, architecture: str) -> Any:
        """Ours in place of SAE-Lens' class, so that ``load_from_disk`` and ``from_pretrained`` are typed."""
        if architecture not in (known := {"jumprelu": CrosscoderSAE, "topk": CrosscoderTopKSAE}):
            raise ValueError(f"a crosscoder is saved as 'jumprelu' or 'topk', this SAE is {architecture!r}")
        return known[architecture]

    @property
    def W_enc_by_model(self) -> Float[Tensor, "model d_in d_sae"]:
        """A view."""
        return self.W_enc.unflatten(0, (self.n_models, self.d_model))

    @property
    def W_dec_by_model(self) -> Float[Tensor, "d_sae model d_in"]:
        """A view."""
        return self.W_dec.unflatten(1, (self.n_models, self.d_model))

    @property
    def b_dec_by_model(self) -> Float[Tensor, "model d_in"]:
        """A view."""
        return self.b_dec.view(self.n_models, self.d_model)

    def process_sae_in(self, sae_in: Tensor) -> Tensor:
        if sae_in.shape[-1] != (width := self.n_models * self.d_model):
            raise ShapeMismatch(
                f"{type(self).__name__} reads {self.n_models} models side by side, [..., {width}] = "
                f"[..., {self.n_models} * {self.d_model}]; got {list(sae_in.shape)}"
            )
        return super().process_sae_in(sae_in)

    def crosscoder(self) -> Crosscoder:
        """The crosscoder of this library that computes the same; its weights are copies."""
        tensors = {name: p.detach().clone() for name, p in self.named_parameters()}
        return unflatten(
            Flat(**tensors, k=getattr(self.cfg, "k", None)), origin(self.cfg.metadata.crosscoder, self.dtype)
        )


class CrosscoderSAE(JointSAE, JumpReLUSAE):
    """A crosscoder as a JumpReLU SAE of the concatenated activations; on disk SAE-Lens' own ``jumprelu``."""


class CrosscoderTopKSAE(JointSAE, TopKSAE):
    """The same of a TopK, on disk ``topk``; its codes are weighed, f · code norm."""
