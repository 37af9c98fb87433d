"""One sparse code for every model, a decoder for each."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any, Literal, final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from tl_crosscoder.dictionary.codes import Codes, DenseCodes
from tl_crosscoder.dictionary.init import Init
from tl_crosscoder.dictionary.normalizer import Normalizer
from tl_crosscoder.dictionary.partition import Partition
from tl_crosscoder.dictionary.scores import Crowded, ExactScores
from tl_crosscoder.dictionary.screening import ScreenedScores, screens
from tl_crosscoder.dictionary.shard import WHOLE, Shard
from tl_crosscoder.dictionary.sparse_ops import Pairs, encode_pairs, take_rows
from tl_crosscoder.dictionary.sparsity import SPARSITIES, PerModel, Sparsity
from tl_crosscoder.errors import ShapeMismatch
from tl_crosscoder.widths import alike, cut, refuse_filled, refuse_unlike

#: Share of active latents above which a dense product is faster than one over pairs.
MAX_DENSITY = 1 / 8
CODE_NORMS = ("sum", "l2", "none", "decoupled")
ENCODERS = ("sum", "mean")


@dataclass(frozen=True, eq=False)
class CrosscoderOutput:
    """One forward pass.  ``target`` (x) and ``estimate`` are in the normalised units of ``units``, ``recon`` is raw."""

    codes: Codes | DenseCodes
    target: Float[Tensor, "batch model d_in"]
    estimate: Float[Tensor, "batch model d_in"]
    units: Normalizer

    @property
    def acts(self) -> Float[Tensor, "batch d_sae"]:
        """The codes with zeros written out."""
        return self.codes.dense()

    @cached_property
    def error(self) -> Float[Tensor, "batch model d_in"]:
        """``estimate - target``."""
        return self.estimate - self.target

    @property
    def recon(self) -> Float[Tensor, "batch model d_in"]:
        return self.units.denormalise(self.estimate)


@final
class Crosscoder(nn.Module):
    """``pre_acts = Σ_m W_enc^m x^m + b_enc``; ``recon^m = Σ_j f_j d_j^m + b_dec^m``, with x and recon in normalised units.

    ``code_norm`` weighs an activation by its decoders: ``"sum"`` of the models' norms (Lindsey et al. 2024), ``"l2"`` norm of the
    concatenation (one SAE on the stacked vector), ``"none"``; ``"decoupled"``: each model chooses by its own decoder's norm, with a
    k and a threshold of its own (:class:`~tl_crosscoder.dictionary.sparsity.PerModel`; one ``sparsity`` stands for a copy each),
    and what it does not choose is not written into it.  ``encoder="mean"`` takes the mean over models in place of the sum
    (Delta-Crosscoder, Kassem et al. 2026, arXiv:2603.04426).  ``partition``: latents that are shared, or one model's, for good.
    ``init``: where the weights start.  ``sparsity`` and ``normalizer`` are copied.  With one model it is a dictionary of that
    model's activations, or of a :func:`~tl_crosscoder.dictionary.difference.difference`.  ``shard``: make only the latents of
    this process, one of many that train together; it is no part of the config.

    ``widths``: each model's own, where they differ; ``d_in`` is then the largest.  Activations come padded with zeros
    (:mod:`tl_crosscoder.widths`), the weights there are zero and stay so.  Nothing may start or stay the same in such models:
    no ``Init(same=...)``, no shared decoders.

    The encoder is stored latent-major, ``W_enc_rows [d_sae, model, d_in]``; ``W_enc`` views it as [model, d_in, d_sae].
    """

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        sparsity: Sparsity,
        *,
        n_models: int = 2,
        normalizer: Normalizer | None = None,
        code_norm: Literal["sum", "l2", "none", "decoupled"] = "sum",
        encoder: Literal["sum", "mean"] = "sum",
        partition: Partition = Partition(),  # noqa: B008 - frozen
        init: Init = Init(),  # noqa: B008 - frozen
        widths: Sequence[int] | None = None,
        shard: Shard = WHOLE,
    ):
        super().__init__()
        if min(d_in, d_sae, n_models) < 1:
            raise ValueError(f"sizes start at 1, got d_in={d_in}, d_sae={d_sae}, n_models={n_models}")
        if code_norm not in CODE_NORMS:
            raise ValueError(f"no code_norm named {code_norm!r}; known: {', '.join(CODE_NORMS)}")
        if encoder not in ENCODERS:
            raise ValueError(f"no encoder named {encoder!r}; known: {', '.join(ENCODERS)}")
        partition.check(d_sae, n_models, d_in)
        self.widths = (d_in,) * n_models if widths is None else tuple(widths)
        if len(self.widths) != n_models or not all(type(w) is int and 1 <= w <= d_in for w in self.widths):
            raise ValueError(
                f"widths wants {n_models} whole numbers in 1..d_in={d_in}, one a model, got {list(self.widths)}"
            )
        if partition.shared:
            refuse_unlike(self, "a decoder that the models share")
        sparsity = _fitting(deepcopy(sparsity), code_norm, n_models)
        sparsity.check(d_sae)
        normalizer = Normalizer.identity(n_models, d_in) if normalizer is None else normalizer
        if normalizer.mean.shape != (n_models, d_in):
            raise ShapeMismatch(
                f"Crosscoder wants a normaliser of [model={n_models}, d_in={d_in}], got {list(normalizer.mean.shape)}"
            )
        self.d_in, self.d_sae, self.n_models = d_in, d_sae, n_models
        self.code_norm, self.encoder, self.partition, self.init = code_norm, encoder, partition, init
        # copies: another crosscoder's training, or a cast of it, would change what this one does
        self.sparsity, self.normalizer = sparsity, deepcopy(normalizer)
        self.units: Normalizer | None = None  # set by folded(): the units of norms, losses and scores
        self.shard, n_held = shard, shard.n_held(d_sae)
        sparsity.divide(shard)
        self._crowded = False  # so many latents were active lately that pairs do not pay
        device = torch.get_default_device()
        if device.type == "meta":  # a shell to load weights into
            encoder_rows, decoder_rows = (torch.empty(n_held, n_models, d_in) for _ in range(2))
        else:
            if init.same:
                refuse_unlike(self, f"Init(same={init.same})", "pass init=Init(same=False)")
            refuse_filled(normalizer.mean, self.widths, "the normaliser's mean")
            tied = partition.parts(d_sae).shared.stop
            drawn = init.rows(d_sae, n_models, d_in, tied=tied, held=shard.held)
            encoder_rows, decoder_rows = (cut(rows, self.widths, init.norm) for rows in drawn)
            held = partition.of(shard, d_sae)
            held.project_encoder(encoder_rows, n_held)
            held.project_decoder(decoder_rows, n_held)
        self.W_dec = nn.Parameter(decoder_rows.to(device))
        self.W_enc_rows = nn.Parameter(encoder_rows.to(device))
        self.b_enc = nn.Parameter(torch.zeros(n_held))
        self.b_dec = nn.Parameter(torch.zeros(n_models, d_in))
        self.to(device)  # the sparsity and the normaliser may come from elsewhere

    def extra_repr(self) -> str:
        said = f"d_in={self.d_in}, d_sae={self.d_sae}, n_models={self.n_models}, code_norm={self.code_norm!r}"
        said += "" if alike(self) else f", widths={self.widths}"
        said += "" if self.encoder == "sum" else f", encoder={self.encoder!r}"
        said += "" if self.partition.free else f", partition={self.partition}"
        return said + ("" if self.units is None else ", folded")

    @property
    def W_enc(self) -> Float[Tensor, "model d_in d_sae"]:
        """The encoder, a view of ``W_enc_rows``."""
        return self.W_enc_rows.permute(1, 2, 0)

    def forward(self, x: Float[Tensor, "batch model d_in"]) -> CrosscoderOutput:
        if torch.is_grad_enabled() and not self.partition.free:
            self.partition.of(self.shard, self.d_sae).hold(self.W_enc_rows, self.W_dec, check=self.training)
        y = self.normalised(x, "forward")
        if self.training:
            refuse_filled(y, self.widths, "a row of activations")
        codes = self._codes(y)
        estimate = self._estimate(codes)
        if self.units is None:
            return CrosscoderOutput(codes, y, estimate, self.normalizer)
        return CrosscoderOutput(codes, self.units.normalise(y), self.units.normalise(estimate), self.units)

    def encode(self, x: Float[Tensor, "batch model d_in"]) -> Float[Tensor, "batch d_sae"]:
        """The codes of raw activations, with zeros written out."""
        return self._codes(self.normalised(x, "encode")).dense()

    def encode_sparse(self, x: Float[Tensor, "batch model d_in"]) -> Codes:
        """The codes of raw activations, active pairs only."""
        codes = self._codes(self.normalised(x, "encode"))
        return codes if isinstance(codes, Codes) else Codes.from_dense(codes.acts)

    def pre_acts(
        self, x: Float[Tensor, "batch model d_in"], latents: Int[Tensor, "latent"] | None = None
    ) -> Float[Tensor, "batch latent"]:
        """The pre-activations of all latents, or of some at their cost alone."""
        y = self.normalised(x, "pre_acts")
        if latents is None:
            return self._pre_acts(y)
        y = self._encoder_input(y)
        return F.linear(y.flatten(1), take_rows(self.W_enc_rows, latents).flatten(1), self.b_enc[latents])

    def decode(self, acts: Float[Tensor, "batch d_sae"] | Codes) -> Float[Tensor, "batch model d_in"]:
        """The reconstruction of every model's activations, raw units."""
        if isinstance(acts, Tensor) and isinstance(self.sparsity, PerModel):
            gates = self.sparsity.gates(acts.detach(), self.decoder_norms().detach())
            return self.normalizer.denormalise(
                torch.einsum("bs,bsm,smd->bmd", acts, gates, self.W_dec) + self.b_dec
            )
        codes = acts if isinstance(acts, Codes) else DenseCodes(acts)
        return self.normalizer.denormalise(self._estimate(codes))

    @torch.no_grad()
    def strengths(
        self, values: Float[Tensor, "nnz"], latents: Int[Tensor, "nnz"]
    ) -> Float[Tensor, "nnz model"]:
        """How strongly these activations write into each model: alike, or 0 where a model does not choose them (``eval()``)."""
        if not isinstance(self.sparsity, PerModel):
            return values[:, None].expand(-1, self.n_models)
        if (few := self.sparsity.restricted(latents)) is None:
            raise ValueError("latents that compete for a place (TopK) have no strength by themselves")
        gates = few.eval().gates(values[None].to(self.W_dec.dtype), self.decoder_norms()[latents])[0]
        return gates.to(values.dtype) * values[:, None]

    def decoder_norms(self) -> Float[Tensor, "d_sae model"]:
        """‖d_j^m‖ in normalised units; folding does not change it."""
        norms = self.W_dec.norm(dim=-1)
        return norms if self.units is None else norms * self.units.scale

    def selection_norms(self) -> Float[Tensor, "d_sae"]:
        """The weight of each latent's activation in selection and penalty, by ``code_norm`` (decoupled: all models' together)."""
        if self.code_norm == "none":
            return self.W_dec.new_ones(len(self.W_dec))
        norms = self.decoder_norms()
        return norms.norm(dim=-1) if self.code_norm == "l2" else norms.sum(-1)

    def decoder_rows(
        self, latents: Int[Tensor, "latent"] | None = None
    ) -> Float[Tensor, "latent model d_in"]:
        """``W_dec`` in normalised units, of all latents or of some; folding does not change it."""
        rows = self.W_dec if latents is None else take_rows(self.W_dec, latents)
        return rows if self.units is None else rows * self.units.scale[:, None]

    def encoder_rows(self, latents: Int[Tensor, "latent"]) -> Float[Tensor, "latent model d_in"]:
        """What each model's normalised activations weigh in these latents' pre-activations; folding does not change it."""
        rows = self._encoder_input(self.W_enc_rows[latents])
        return rows if self.units is None else rows / self.units.scale[:, None]

    def raw_rows(self) -> Float[Tensor, "d_sae model d_in"]:
        """``W_dec`` in raw units: what one unit of activation adds to each model's residual stream."""
        return self.normalizer.unscale_rows(self.W_dec)

    @torch.no_grad()
    def folded(self) -> "Crosscoder":
        """The same function with the normaliser folded into the weights, so that other tools can run it on raw activations.

        Codes, reconstructions, decoder norms, losses and classes stay what they were: the old normaliser is kept as their unit.
        """
        if self.units is not None:
            raise ValueError("this crosscoder is folded already")
        mean, scale = self.normalizer.mean, self.normalizer.scale
        config = {**self.config, "folded": True}
        folded = Crosscoder.from_config(config).to(self.W_dec.device, self.W_dec.dtype)
        folded.sparsity.load_state_dict(self.sparsity.state_dict())
        folded.units = Normalizer(mean, scale)
        rows = self.W_enc_rows * scale[:, None]
        folded.W_enc_rows.copy_(rows)
        folded.b_enc.copy_(self.b_enc - F.linear(self._encoder_input(mean).flatten(), rows.flatten(1)))
        folded.W_dec.copy_(self.W_dec / scale[:, None])
        folded.b_dec.copy_(self.normalizer.denormalise(self.b_dec[None])[0])
        return folded.train(self.training)

    @torch.no_grad()
    def restricted(self, latents: Int[Tensor, "latent"]) -> "Crosscoder":
        """The crosscoder of these latents alone, in ``eval()``: their codes and rows are what they are here, at their cost.

        Where the sparsity lets latents compete in ``eval()`` too (TopK), this crosscoder itself cannot be cut down: ValueError.
        """
        sparsity = self.sparsity.restricted(latents)
        if sparsity is None:
            raise ValueError(
                f"{type(self.sparsity).__name__} lets latents compete for a place, so the codes of some depend on all"
            )
        config = {**self.config, "d_sae": len(latents), "sparsity": SPARSITIES.describe(sparsity)}
        config |= {"partition": asdict(Partition()), "init": asdict(Init(same=alike(self)))}
        with torch.device("meta"):
            few = Crosscoder.from_config(config)
        few.sparsity, few.normalizer, few.units = sparsity, deepcopy(self.normalizer), deepcopy(self.units)
        for name in ("W_enc_rows", "W_dec", "b_enc"):
            setattr(few, name, nn.Parameter(getattr(self, name).detach()[latents]))
        few.b_dec = nn.Parameter(self.b_dec.detach().clone())
        return few.requires_grad_(False).eval()

    @property
    def config(self) -> dict[str, Any]:
        """A plain JSON description; ``from_config`` makes the same crosscoder, untrained and with an identity normaliser."""
        return {
            "d_in": self.d_in,
            "d_sae": self.d_sae,
            "n_models": self.n_models,
            "sparsity": SPARSITIES.describe(self.sparsity),
            "code_norm": self.code_norm,
            "encoder": self.encoder,
            "partition": asdict(self.partition),
            "init": asdict(self.init),
            "folded": self.units is not None,
            **({} if alike(self) else {"widths": list(self.widths)}),
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Crosscoder":
        """The crosscoder ``config`` describes.  Unknown and missing keys raise."""
        sizes = ("d_in", "d_sae", "n_models")
        known = (*sizes, "sparsity", "code_norm", "encoder", "partition", "init", "folded", "widths")
        arguments = _checked({"widths": None} | config, "crosscoder", known)
        folded = arguments.pop("folded")
        arguments["sparsity"] = SPARSITIES.build(arguments["sparsity"])
        for name, part in (("partition", Partition), ("init", Init)):
            known = tuple(field.name for field in fields(part))
            arguments[name] = part(**_checked(arguments[name], name, known))
        crosscoder = cls(**arguments)
        if folded:
            crosscoder.units = Normalizer.identity(crosscoder.n_models, crosscoder.d_in)
        return crosscoder

    def check_padding(self) -> None:
        """Raise ShapeMismatch where a weight, or a normaliser's mean, is not zero beyond its model's width."""
        for name, tensor in self.state_dict().items():
            if tensor.shape[-2:] == (self.n_models, self.d_in):
                refuse_filled(tensor, self.widths, name)

    def normalised(self, x: Tensor, where: str = "normalised") -> Float[Tensor, "batch model d_in"]:
        """Raw activations in the units that the encoder reads, once their shape and device are those of the weights."""
        if x.shape[1:] != (self.n_models, self.d_in):
            swapped = x.shape[1:] == (self.d_in, self.n_models)
            raise ShapeMismatch(
                f"Crosscoder.{where} wants [batch, model={self.n_models}, d_in={self.d_in}], got {list(x.shape)}"
                + ("; axes 1 and 2 look swapped." if swapped else ".")
            )
        if x.device != (device := self.W_dec.device):
            raise ValueError(
                f"Crosscoder.{where}: x is on {x.device} and the weights are on {device}; "
                f"pass x.to('{device}') or crosscoder.to('{x.device}')"
            )
        return self.normalizer.normalise(x.to(self.W_dec.dtype))

    def _codes(self, y: Float[Tensor, "batch model d_in"]) -> Codes | DenseCodes:
        """The same codes and gradients from active pairs only where these are few, densely where they are many."""
        if isinstance(self.sparsity, PerModel):
            return self._paired(y)
        if self.sparsity.selects and not self._crowded:
            try:
                return self._paired(y)
            except Crowded:
                pass
        codes = DenseCodes(self.sparsity(self._pre_acts(y), self.selection_norms().detach()))
        self._crowded = codes.n_active > MAX_DENSITY * len(self.W_dec) * len(codes)
        return codes

    def _paired(self, y: Float[Tensor, "batch model d_in"]) -> Codes:
        """Raises Crowded where more than ``MAX_DENSITY`` of the latents are active."""
        y = self._encoder_input(y)
        with torch.no_grad():
            kind = ScreenedScores if screens(y) else ExactScores
            # a rank that left for the dense path would keep the others waiting
            apart = isinstance(self.sparsity, PerModel)  # gates are known of pairs only
            may_leave = self.shard.every.size == 1 and not apart
            limit = int(MAX_DENSITY * len(self.W_dec) * len(y)) if may_leave else None
            rows, norms = (
                self.W_enc_rows.flatten(1),
                self.decoder_norms() if apart else self.selection_norms(),
            )
            found = self.sparsity.choose(kind(y.flatten(1), rows, self.b_enc, norms, limit))
            pairs, order = Pairs.of_latent_order(found.tokens, found.latents, len(y), len(self.W_dec))
        values = encode_pairs(y, self.W_enc_rows, self.b_enc, pairs, found.pre_acts[order])
        return Codes.at(pairs, values, None if found.gates is None else found.gates[order])

    def _encoder_input(self, y: Float[Tensor, "*batch model d_in"]) -> Float[Tensor, "*batch model d_in"]:
        """Scaled so that the encoder's sum over models is the sum or the mean."""
        return y if self.encoder == "sum" else y / self.n_models

    def _pre_acts(self, y: Float[Tensor, "batch model d_in"]) -> Float[Tensor, "batch d_sae"]:
        y = self._encoder_input(y)
        return F.linear(y.flatten(1), self.W_enc_rows.flatten(1), self.b_enc)

    def _estimate(self, codes: Codes | DenseCodes) -> Float[Tensor, "batch model d_in"]:
        return self.shard.sum(codes.decode(self.W_dec)).add_(self.b_dec)


def _fitting(sparsity: Sparsity, code_norm: str, n_models: int) -> Sparsity:
    """The sparsity, one for each model where each chooses for itself."""
    if code_norm == "decoupled" and not isinstance(sparsity, PerModel):
        return PerModel(tuple(deepcopy(sparsity) for _ in range(n_models)))
    if isinstance(sparsity, PerModel) and (code_norm != "decoupled" or len(sparsity.parts) != n_models):
        raise ValueError(
            f"PerModel with {len(sparsity.parts)} parts is for code_norm='decoupled' and as many models, got "
            f"code_norm={code_norm!r} and n_models={n_models}"
        )
    return sparsity


def _checked(settings: dict[str, Any], of: str, known: tuple[str, ...]) -> dict[str, Any]:
    """A copy; ValueError unless it has exactly these keys."""
    if unknown := sorted(set(settings) - set(known)):
        raise ValueError(f"a {of} has no setting {unknown[0]!r}; known: {', '.join(known)}")
    if missing := [name for name in known if name not in settings]:
        raise ValueError(f"the {of}'s setting {missing[0]!r} is missing")
    return dict(settings)
