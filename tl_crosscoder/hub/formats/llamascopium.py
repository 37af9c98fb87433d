"""Llamascopium's crosscoders (Language-Model-SAEs): heads that are hook points, training snapshots or models."""

import math
from typing import TYPE_CHECKING

from tl_crosscoder.errors import CorruptFile, UnreadableFormat
from tl_crosscoder.hub.formats.base import NOT_STATED, Conventions, Format, Given, listed
from tl_crosscoder.hub.formats.contents import Contents
from tl_crosscoder.hub.formats.layout import expect, sizes_of

if TYPE_CHECKING:
    from tl_crosscoder.dictionary.crosscoder import Crosscoder

NORM = "dataset_average_activation_norm."
LOG_THRESHOLDS = ("activation_function.log_jumprelu_threshold", "log_jumprelu_threshold")
#: How far the decoder norms of a latent may differ between heads and count as one.
SAME = 1e-5


class Llamascopium(Format):
    """``pre = Σ_h (x_h W_E[h] + b_E[h])``, ``f_h = σ(pre·‖W_D[h]‖) / ‖W_D[h]‖``, ``x̂_h = f_h W_D[h] + b_D[h]``.

    The gate is each head's own.  With ReLU all heads agree; with a threshold or a top-k a latent may be on for one head and off
    for another (``code_norm="decoupled"``), unless its decoder norms are one number.
    """

    name = "Llamascopium"

    def recognises(self, contents: Contents) -> bool:
        return "W_E" in contents and "W_D" in contents

    def describe(self, contents: Contents) -> Conventions:
        sizes = sizes_of(contents, "W_E", "model d_in d_sae")
        h, d_in, d_sae = sizes.values()
        norms = [name for name in contents.tensors if name.startswith(NORM)]
        wanted = {"W_E": (h, d_in, d_sae), "b_E": (h, d_sae), "W_D": (h, d_sae, d_in), "b_D": (h, d_in)}
        expect(
            contents, wanted, {**{name: () for name in norms}, **{name: (d_sae,) for name in LOG_THRESHOLDS}}
        )
        settings, kind = contents.settings, activation(contents)
        hooks = hook_points(contents, h)
        wants, how = {}, settings.get("norm_activation")
        if how == "dataset-wise":
            if missing := [hook for hook in hooks or ["?"] if NORM + str(hook) not in contents]:
                wants["scale"] = (
                    f"norm_activation is dataset-wise and the average norm at {missing[0]!r:.60} is missing. "
                    "Pass scale= (√d_in over it)"
                )
            said = "x · √d_in / average norm, a scale a head"
            said += "" if missing else f": {listed(scales(contents))}"
        elif how in (None, "inference"):
            wants["scale"] = (
                f"norm_activation is {how!r}: whether and how a scale was folded in is not clear. Pass scale=1 "
                "if the weights read raw "
                "activations, otherwise a scale for each head"
            )
            said = "ambiguous"
        elif how == "none":
            said = "none"
        else:
            raise UnreadableFormat(
                f"{contents.folder}: norm_activation {how!r:.40} scales each batch or token by itself, which a "
                "frozen normaliser cannot"
            )
        return Conventions(
            self.name,
            d_in, d_sae, h,
            models=f"heads {', '.join(f'{hook:.60}' for hook in hooks)}: models, layers or snapshots, the files do not say which",
            sparsity=kind,
            ranking="f · ‖d_h‖, apart for each head",
            threshold="one a latent, exp(log_threshold), on f·‖d_h‖ of each head" if kind == "jumprelu" else "none",
            normalisation=said,
            hook=", ".join(f"{hook:.60}" for hook in hooks) or NOT_STATED,
            notes=("the smaller of different widths is padded with zeros",),
            wants=wants,
            claims={"l0": float(k)} if "topk" in kind and isinstance(k := settings.get("top_k"), int) else {},
        )  # fmt: skip

    def read(self, contents: Contents, given: Given) -> "Crosscoder":
        import torch

        from tl_crosscoder.dictionary.sparsity import PerModel, ReLU, Sparsity, Threshold, TopK
        from tl_crosscoder.hub.formats.assemble import Layout, Parts, build, fold_given, read_parts
        from tl_crosscoder.hub.formats.opened import open_weights
        from tl_crosscoder.hub.tensors import read

        weights, kind = open_weights(contents), activation(contents)
        layout = Layout("W_E", "model d_in d_sae", "W_D", "model d_sae d_in", None, "b_D")
        parts: Parts = read_parts(weights, layout, given.dtype)
        parts.b_enc = read(weights, "b_E").double().sum(0).to(parts.enc.dtype)
        norms = parts.dec.double().norm(dim=-1)
        alike = bool(((norms.amax(1) - norms.amin(1)) <= SAME * norms.amax(1)).all())

        def of_head(head: int) -> Sparsity:
            if kind == "topk":
                return TopK(contents.settings["top_k"])
            name = next(name for name in LOG_THRESHOLDS if name in contents)
            threshold = read(weights, name).double().exp() / norms[:, head]
            # too large for the dtype: never active, as it was; 0 / 0: nor is a latent without a decoder
            return Threshold.of(threshold.to(parts.enc.dtype).nan_to_num())

        apart = kind != "relu" and not alike
        if apart:
            sparsity = PerModel(tuple(of_head(head) for head in range(norms.shape[1])))
        else:
            sparsity = ReLU() if kind == "relu" else of_head(0)
        if given.scale is not None:
            mean, scale = fold_given(parts, given)
        else:
            mean, scale = (
                None,
                torch.tensor(scales(contents), dtype=torch.float64)
                if contents.settings["norm_activation"] != "none"
                else None,
            )
        norm = "decoupled" if apart else "sum"
        return build(parts, sparsity, code_norm=norm, mean=mean, scale=scale, widths=parts.widths())


def activation(contents: Contents) -> str:
    """relu, topk or jumprelu; the k of topk is checked."""
    said, thresholds = contents.settings.get("act_fn"), [name for name in LOG_THRESHOLDS if name in contents]
    kind = str(said).lower()
    if kind == "batchtopk":
        raise UnreadableFormat(
            f"{contents.folder}: act_fn batchtopk looks at a whole batch and has no threshold for single "
            "tokens; its library converts such a "
            "crosscoder to jumprelu after training: export that one"
        )
    if kind not in ("relu", "topk", "jumprelu") or (kind == "jumprelu") != bool(thresholds):
        raise UnreadableFormat(
            f"{contents.folder}: act_fn is {said!r:.40} with thresholds {thresholds}; known: relu, topk, jumprelu"
        )
    k, d_sae = contents.settings.get("top_k"), contents.shape("W_E")[-1]
    if kind == "topk" and not (type(k) is int and 0 < k <= d_sae):
        raise UnreadableFormat(f"{contents.folder}: act_fn is topk and top_k is {k!r:.40}")
    return kind


def hook_points(contents: Contents, n: int) -> list[str]:
    """The names of the heads; none where the settings have none."""
    hooks = contents.settings.get("hook_points")
    if hooks is None:
        return []
    if not isinstance(hooks, list) or len(hooks) != n or not all(isinstance(hook, str) for hook in hooks):
        raise CorruptFile(f"{contents.folder}: hook_points is {hooks!r:.120}, the weights have {n} heads")
    return hooks


def scales(contents: Contents) -> list[float]:
    """√d_in over each head's average norm."""
    h, d_in, _ = contents.shape("W_E")
    found = [contents.value(NORM + hook) for hook in hook_points(contents, h)]
    if not all(norm is not None and math.isfinite(norm) and norm > 0 for norm in found):
        raise CorruptFile(f"{contents.weights}: the average norms of the heads are {found}")
    return [math.sqrt(d_in) / norm for norm in found if norm]
