"""Crosscoders of the dictionary_learning family, L1 and BatchTopK, from a Hub mixin's folder or a trainer's ``.pt``."""

import math
from typing import TYPE_CHECKING, Any, Literal

from tl_crosscoder.errors import CorruptFile, UnreadableFormat
from tl_crosscoder.hub.formats.base import NOT_STATED, SET_ASIDE, Conventions, Format, Given, listed
from tl_crosscoder.hub.formats.contents import Contents
from tl_crosscoder.hub.formats.layout import expect, sizes_of

if TYPE_CHECKING:
    from tl_crosscoder.dictionary.crosscoder import Crosscoder

#: What each ``code_normalization_id`` weighs an activation by.
CODE_NORMS = {1: "CROSSCODER", 2: "SAE", 3: "MIXED", 4: "NONE", 5: "DECOUPLED"}
RANKING = {
    "CROSSCODER": "Σ_m ‖d_m‖", "SAE": "‖[d_1 … d_M]‖", "MIXED": "α·‖[d_1 … d_M]‖ + β·Σ_m ‖d_m‖", "NONE": "1",
    "DECOUPLED": "‖d_m‖, apart for each model",
}  # fmt: skip
#: The same by our names; the mixed one is not among them.
OURS: dict[str, Literal["sum", "l2", "none", "decoupled"]] = {
    "CROSSCODER": "sum",
    "SAE": "l2",
    "NONE": "none",
    "MIXED": "sum",
    "DECOUPLED": "decoupled",
}
SETTINGS = {
    "activation_dim", "dict_size", "num_layers", "same_init_for_all_layers", "norm_init_scale", "init_with_transpose",
    "encoder_layers",
    "latent_processor", "num_decoder_layers", "code_normalization", "code_normalization_alpha_sae", "code_normalization_alpha_cc",
    "target_rms", "dict_class", "sparsity_loss_type", "k", "trainer", "buffer",
}  # fmt: skip


class DictionaryLearning(Format):
    """``f = relu(Σ_m x_m W_enc[m] + b)``, BatchTopK keeping ``f·w > threshold``; ``x̂_m = f W_dec[m] + b_dec[m]``.

    The activations are ``(x - activation_mean) · activation_global_scale`` since 2025-06, raw before and where the mean is
    NaN.  The library itself loads a BatchTopK whose threshold is missing with -1, a dense ReLU code; here it is refused.
    """

    name = "dictionary_learning"

    def recognises(self, contents: Contents) -> bool:
        return "encoder.weight" in contents and len(contents.shape("encoder.weight")) == 3

    def describe(self, contents: Contents) -> Conventions:
        sizes = sizes_of(contents, "decoder.weight", "model d_sae d_in")
        n_models, d_sae, d_in = sizes.values()
        inputs, norm = _inputs(contents, n_models), code_norm(contents)
        apart = norm == "DECOUPLED" and is_batch_topk(contents)
        if apart and _has_normaliser(contents):
            raise UnreadableFormat(
                f"{contents.weights}: with code normalisation DECOUPLED the library normalises activations twice before the "
                "encoder and once before the decoder, so what these weights were trained on is not clear; such files are read "
                "without a normaliser only"
            )
        expect(
            contents,
            {
                "encoder.weight": (len(inputs), d_in, d_sae), "encoder.bias": (d_sae,),
                "decoder.weight": (n_models, d_sae, d_in), "decoder.bias": (n_models, d_in),
            },
            {
                "k": (), "code_normalization_id": (), "target_rms": (), "threshold": (n_models,) if apart else (),
                "activation_mean": (n_models, d_in), "activation_std": (n_models, d_in), "activation_global_scale": (n_models,),
            },
        )  # fmt: skip
        _check_settings(contents)
        batch_topk, k = is_batch_topk(contents), contents.value("k")
        wants, threshold = {}, "none"
        if batch_topk:
            found = contents.values("threshold")
            said = "missing" if found is None else listed(found)
            threshold = f"{'one a model' if apart else 'one'}: f·w > {said}, w = {RANKING[norm]}"
            if found is None or not min(found) > 0:
                threshold = "missing" if found is None else f"{said}, which is none: the library starts at -1"
                wants["threshold"] = (
                    f"the BatchTopK's threshold is {threshold}; without one every positive activation would stay. "
                    f"Pass threshold=, on f·w with w = {RANKING[norm]}"
                )
        if batch_topk:
            known_k(contents, d_sae)
        notes = []
        if norm == "MIXED" and batch_topk:
            notes.append(
                "the mixed weight becomes a threshold for each latent; penalties of a further training would use Σ_m ‖d_m‖"
            )
        if len(inputs) < n_models:
            notes.append(f"the encoder reads the models {inputs} only; its rows for the others are 0")
        if batch_topk and "k" in contents.settings and k is not None and contents.settings["k"] != int(k):
            notes.append(
                f"config.json says k={contents.settings['k']!r:.20}; the tensor's k={k:g} is what was trained"
            )
        if set_aside := self.statistics(contents):
            notes.append(SET_ASIDE.format(", ".join(set_aside)))
        trainer = contents.settings.get("trainer")
        trainer = trainer if isinstance(trainer, dict) else {}
        layer = trainer.get("layer")
        return Conventions(
            self.name,
            d_in, d_sae, n_models,
            models="base, tuned (by the family's convention; the file does not name them)",
            sparsity="ReLU (L1)" if not batch_topk else "BatchTopK" + (f", k={k:g} (the tensor)" if k else ""),
            ranking=f"f · {RANKING[norm]}",
            threshold=threshold,
            normalisation=_normalisation(contents),
            hook=f"output of layer {layer}: blocks.{layer}.hook_resid_post" if isinstance(layer, int) else NOT_STATED,
            language_models=f"{trainer['lm_name']:.120} (tuned-base)" if isinstance(trainer.get("lm_name"), str) else NOT_STATED,
            notes=tuple(notes),
            wants=wants,
            claims={"l0": k} if batch_topk and k else {},
        )  # fmt: skip

    def statistics(self, contents: Contents) -> dict[str, list[float]]:
        names = ("activation_std", "target_rms") if _has_normaliser(contents) else ()
        return {name: values for name in names if (values := contents.values(name)) is not None}

    def read(self, contents: Contents, given: Given) -> "Crosscoder":
        import torch

        from tl_crosscoder.dictionary.sparsity import BatchTopK, PerModel, ReLU, Threshold
        from tl_crosscoder.hub.formats.assemble import Layout, Parts, build, read_parts
        from tl_crosscoder.hub.formats.opened import open_weights
        from tl_crosscoder.hub.tensors import read

        weights = open_weights(contents)
        layout = Layout(
            "encoder.weight",
            "model d_in d_sae",
            "decoder.weight",
            "model d_sae d_in",
            "encoder.bias",
            "decoder.bias",
        )
        n_models = contents.shape("decoder.weight")[0]
        inputs = _inputs(contents, n_models)
        if inputs == list(range(n_models)):
            parts = read_parts(weights, layout, given.dtype)
        else:
            parts = _partly_reading(weights, layout, inputs, given.dtype)
        norm = code_norm(contents)
        sparsity = ReLU()
        if is_batch_topk(contents):
            stated = contents.values("threshold")
            if given.threshold is not None:
                stated = [given.threshold] * (n_models if norm == "DECOUPLED" else 1)
            assert stated is not None  # describe() wanted it

            def above(threshold: float) -> BatchTopK:
                made = BatchTopK(known_k(contents, len(parts.enc)))
                made.threshold = torch.tensor(threshold, dtype=parts.enc.dtype)
                return made

            if norm == "MIXED":
                # a latent without decoders is never active: infinity is no number for a file
                never = torch.finfo(parts.dec.dtype).max
                sparsity = Threshold.of((stated[0] / _mixed(contents, parts.dec)).clamp_max(never))
            else:
                sparsity = PerModel(tuple(map(above, stated))) if norm == "DECOUPLED" else above(stated[0])
        mean = scale = None
        if _has_normaliser(contents):
            mean, scale = (
                read(weights, f"activation_{name}", parts.enc.dtype) for name in ("mean", "global_scale")
            )
        assert isinstance(parts, Parts)
        # without a threshold every model has what is positive: one choice for all
        ours = "sum" if isinstance(sparsity, ReLU) and norm == "DECOUPLED" else OURS[norm]
        return build(parts, sparsity, code_norm=ours, mean=mean, scale=scale)


def code_norm(contents: Contents) -> str:
    """By the tensor, else by the settings, else the default of the time."""
    number = contents.value("code_normalization_id")
    if number is not None:
        if number not in CODE_NORMS:
            raise UnreadableFormat(
                f"{contents.weights}: code_normalization_id {number:g}; known: {CODE_NORMS}"
            )
        name = CODE_NORMS[int(number)]
    else:
        old = {
            "CC": "CROSSCODER",
            "CROSSCODER": "CROSSCODER",
            "SAE": "SAE",
            "MIXED": "MIXED",
            "NONE": "NONE",
            "DECOUPLED": "DECOUPLED",
        }
        said = contents.settings.get(
            "code_normalization", contents.settings.get("sparsity_loss_type", "CROSSCODER")
        )
        if (name := old.get(str(said).upper().removeprefix("CODENORMALIZATION."))) is None:
            raise UnreadableFormat(
                f"{contents.folder}: code_normalization {said!r:.60}; known: {', '.join(RANKING)}"
            )
    return name


def known_k(contents: Contents, d_sae: int) -> int:
    """A BatchTopK's k: the tensor, else the settings'."""
    k = contents.value("k")
    k = contents.settings.get("k") if k is None else int(k)
    if type(k) is not int or not 0 < k <= d_sae:
        raise UnreadableFormat(
            f"{contents.weights}: the BatchTopK's k is {k!r:.40}, want a whole number of 1..{d_sae} latents"
        )
    return k


def is_batch_topk(contents: Contents) -> bool:
    """By the buffers that only BatchTopK has, or by what the settings say."""
    trainer = contents.settings.get("trainer")
    said = (
        [contents.settings.get("dict_class"), *(trainer.get(key) for key in ("dict_class", "trainer_class"))]
        if isinstance(trainer, dict)
        else [contents.settings.get("dict_class")]
    )
    return (
        any(name in contents for name in ("k", "threshold"))
        or "k" in contents.settings
        or any("BatchTopK" in str(name) for name in said)
    )


def _inputs(contents: Contents, n_models: int) -> list[int]:
    """The models that the encoder reads."""
    layers = contents.settings.get("encoder_layers")
    if layers is None:
        return list(range(n_models))
    if (
        not isinstance(layers, list)
        or not layers
        or sorted(set(layers)) != layers
        or not all(type(i) is int and 0 <= i < n_models for i in layers)
    ):
        raise UnreadableFormat(f"{contents.folder}: encoder_layers {layers!r:.80} with {n_models} decoders")
    return layers


def _check_settings(contents: Contents) -> None:
    settings = contents.settings
    if unknown := sorted(set(settings) - SETTINGS):
        raise UnreadableFormat(
            f"{contents.folder}: unknown setting {unknown[0]!r:.80}; it may change what the weights mean"
        )
    if settings.get("latent_processor") is not None:
        raise UnreadableFormat(
            f"{contents.folder}: a latent_processor stands between encoder and decoder; a Crosscoder has none"
        )
    n_models, d_sae, d_in = contents.shape("decoder.weight")
    for key, size in (
        ("activation_dim", d_in),
        ("dict_size", d_sae),
        ("num_decoder_layers", n_models),
        ("num_layers", n_models),
    ):
        if settings.get(key) not in (None, size):
            raise CorruptFile(f"{contents.folder}: {key} is {settings[key]!r:.40}, the decoder has {size}")


def _has_normaliser(contents: Contents) -> bool:
    mean, std = contents.values("activation_mean"), contents.values("activation_std")
    return bool(mean) and bool(std) and not (any(map(math.isnan, mean)) or any(map(math.isnan, std)))


def _normalisation(contents: Contents) -> str:
    found = [f"activation_{name}" in contents for name in ("mean", "std", "global_scale")]
    if not any(found):
        return "none (files of this family without activation_mean were trained on raw activations)"
    mean, std, scale = (contents.values(f"activation_{name}") for name in ("mean", "std", "global_scale"))
    if mean is None or std is None or scale is None:
        raise UnreadableFormat(
            f"{contents.weights}: of activation_mean, activation_std and activation_global_scale some are missing"
        )
    gaps = [any(map(math.isnan, part)) for part in (mean, std)]
    whole = [all(map(math.isnan, part)) for part in (mean, std)]
    if gaps != whole or gaps[0] != gaps[1]:
        raise CorruptFile(f"{contents.weights}: activation_mean and activation_std are NaN in part")
    if gaps[0]:
        return "none (activation_mean is NaN)"
    if not all(math.isfinite(v) for v in (*mean, *std)) or not all(math.isfinite(s) and s > 0 for s in scale):
        raise CorruptFile(f"{contents.weights}: the normaliser wants finite numbers and scales above 0")
    rms, d_in = contents.value("target_rms"), len(std) // len(scale)
    for m, s in enumerate(scale):
        wanted = (1.0 if rms is None else rms) / math.sqrt(
            sum(v * v for v in std[m * d_in : (m + 1) * d_in]) + 1e-8
        )
        if not math.isclose(s, wanted, rel_tol=2e-2):
            raise UnreadableFormat(
                f"{contents.weights}: activation_global_scale[{m}] is {s:.6g}, but activation_std and "
                f"target_rms make {wanted:.6g}: "
                "it is not clear which of them the weights were trained with"
            )
    return (
        f"(x - activation_mean) · scale, scale = {listed(scale)} (one a model; target_rms {rms:g})"
        if rms
        else f"(x - activation_mean) · scale, scale = {listed(scale)}"
    )


def _mixed(contents: Contents, dec: Any) -> Any:
    norms = dec.norm(dim=-1)
    alpha, beta = (contents.settings.get(f"code_normalization_alpha_{name}") for name in ("sae", "cc"))
    return (1.0 if alpha is None else alpha) * norms.norm(dim=-1) + (
        0.1 if beta is None else beta
    ) * norms.sum(-1)


def _partly_reading(weights: Any, layout: Any, inputs: list[int], dtype: Any) -> Any:
    import torch

    from tl_crosscoder.hub.formats.assemble import Parts
    from tl_crosscoder.hub.tensors import read

    n_models, d_sae, d_in = weights.shape(layout.W_dec)
    dtype = dtype or weights.dtype(layout.W_dec)
    enc = torch.zeros(d_sae, n_models, d_in, dtype=dtype)
    dec = torch.empty(d_sae, n_models, d_in, dtype=dtype)
    enc[:, inputs] = read(weights, layout.W_enc, dtype).permute(2, 0, 1)
    weights.read_into(layout.W_dec, dec.permute(1, 0, 2))
    return Parts(enc, dec, read(weights, layout.b_enc, dtype), read(weights, layout.b_dec, dtype))
