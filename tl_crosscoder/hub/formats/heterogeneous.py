"""Crosscoders of models of different widths (the OPD study's): a linear layer for each model."""

import math
from typing import TYPE_CHECKING

from tl_crosscoder.errors import CorruptFile, UnreadableFormat
from tl_crosscoder.hub.formats.base import SET_ASIDE, Conventions, Format, Given, listed
from tl_crosscoder.hub.formats.contents import Contents
from tl_crosscoder.hub.formats.dictionary_learning import CODE_NORMS, OURS, RANKING, known_k
from tl_crosscoder.hub.formats.layout import LARGEST, expect

if TYPE_CHECKING:
    from tl_crosscoder.dictionary.crosscoder import Crosscoder


class Heterogeneous(Format):
    """``f = relu(Σ_m P_m x_m + b)`` kept where ``f·w > threshold``, ``x̂_m = Q_m f + c_m``, each model with a width of its own.

    A narrower model's activations, encoder and decoder are padded with zeros, which changes nothing; ``widths`` says so.
    """

    name = "heterogeneous BatchTopK (OPD)"

    def recognises(self, contents: Contents) -> bool:
        return "encoder.projections.0.weight" in contents

    def describe(self, contents: Contents) -> Conventions:
        found, d_sae = widths(contents), contents.shape("encoder.projections.0.weight")[0]
        wanted, further = (
            {"encoder.bias": (d_sae,)},
            {"activation_dims_tensor": (len(found),), "code_normalization_id": (), "k": (), "threshold": ()},
        )
        for i, d in enumerate(found):
            wanted |= {
                f"encoder.projections.{i}.weight": (d_sae, d),
                f"decoder.projections.{i}.weight": (d, d_sae),
            }
            wanted[f"decoder.projections.{i}.bias"] = (d,)
            further |= {
                f"normalizer.mean_{i}": (d,),
                f"normalizer.std_{i}": (d,),
                f"normalizer.scale_{i}": (),
            }
        expect(contents, wanted, {**further, "normalizer.target_rms": ()})
        if (stated := contents.values("activation_dims_tensor")) is not None and list(
            map(int, stated)
        ) != found:
            raise CorruptFile(
                f"{contents.weights}: activation_dims_tensor says {stated}, the weights {found}"
            )
        norm, threshold, k = code_norm(contents), contents.value("threshold"), contents.value("k")
        wants = {}
        if threshold is None or not threshold > 0:
            wants["threshold"] = (
                f"the BatchTopK's threshold is {threshold}; without "
                "one every positive activation would "
                f"stay. Pass threshold=, on f·w with w = {RANKING[norm]}"
            )
        known_k(contents, d_sae)
        scales = [scale(contents, i) for i in range(len(found))]
        padded = [i for i, d in enumerate(found) if d < max(found)]
        note = f"widths {found}: activations of model {', '.join(map(str, padded))} are wanted padded with zeros to {max(found)}"
        notes = [note] if padded else []
        if set_aside := self.statistics(contents):
            notes.append(SET_ASIDE.format(", ".join(set_aside)))
        return Conventions(
            self.name,
            max(found), d_sae, len(found),
            models="in the order of the training's list of models; the file does not name them",
            sparsity="BatchTopK" + (f", k={k:g} (the tensor)" if k else ""),
            ranking=f"f · {RANKING[norm]}",
            threshold="missing" if wants else f"one: f·w > {threshold}",
            normalisation="none" if scales[0] is None else f"(x - mean) · scale, scale = {listed(s for s in scales if s)}",
            notes=tuple(notes),
            wants=wants,
            claims={"l0": k} if k else {},
        )  # fmt: skip

    def statistics(self, contents: Contents) -> dict[str, list[float]]:
        if scale(contents, 0) is None:
            return {}
        names = ["normalizer.target_rms", *(f"normalizer.std_{i}" for i in range(len(widths(contents))))]
        return {name: values for name in names if (values := contents.values(name)) is not None}

    def read(self, contents: Contents, given: Given) -> "Crosscoder":
        import torch

        from tl_crosscoder.dictionary.sparsity import BatchTopK
        from tl_crosscoder.hub.formats.assemble import Parts, build
        from tl_crosscoder.hub.formats.opened import open_weights
        from tl_crosscoder.hub.tensors import read

        weights, found = open_weights(contents), widths(contents)
        d_sae, n, d_in = contents.shape("encoder.bias")[0], len(found), max(found)
        dtype = given.dtype or weights.dtype("encoder.bias")
        enc, dec, b_dec, mean = (
            torch.zeros(*shape, dtype=dtype)
            for shape in ((d_sae, n, d_in), (d_sae, n, d_in), (n, d_in), (n, d_in))
        )
        scales = [scale(contents, i) for i in range(n)]
        for i, d in enumerate(found):
            weights.read_into(f"encoder.projections.{i}.weight", enc[:, i, :d])
            weights.read_into(f"decoder.projections.{i}.weight", dec[:, i, :d].T)
            weights.read_into(f"decoder.projections.{i}.bias", b_dec[i, :d])
            if scales[i] is not None:
                weights.read_into(f"normalizer.mean_{i}", mean[i, :d])
        threshold = contents.value("threshold") if given.threshold is None else given.threshold
        sparsity = BatchTopK(known_k(contents, d_sae))
        sparsity.threshold = torch.tensor(threshold, dtype=dtype)
        norm = OURS[code_norm(contents)]
        parts = Parts(enc, dec, read(weights, "encoder.bias", dtype), b_dec)
        if scales[0] is None:
            return build(parts, sparsity, code_norm=norm, widths=found)
        scale_of = torch.tensor(scales, dtype=torch.float64)
        return build(parts, sparsity, code_norm=norm, mean=mean, scale=scale_of, widths=found)


def widths(contents: Contents) -> list[int]:
    """Each model's width."""
    found = []
    while (name := f"encoder.projections.{len(found)}.weight") in contents:
        shape = contents.shape(name)
        if len(shape) != 2 or not all(0 < size <= LARGEST for size in shape):
            raise CorruptFile(f"{contents.weights}: {name!r} wants [d_sae, d_in], got {list(shape)}")
        found.append(shape[1])
    return found


def scale(contents: Contents, i: int) -> float | None:
    """What model i's centred activations are multiplied by; None where there is no normaliser."""
    mean, stated = contents.values(f"normalizer.mean_{i}"), contents.value(f"normalizer.scale_{i}")
    if mean is None or all(map(math.isnan, mean)):
        first = contents.values("normalizer.mean_0")
        if first is not None and not any(map(math.isnan, first)):
            raise UnreadableFormat(f"{contents.weights}: model {i} has no normaliser and model 0 has one")
        return None
    if stated is None or not all(map(math.isfinite, (*mean, stated))) or stated <= 0:
        raise CorruptFile(
            f"{contents.weights}: normalizer.mean_{i} and scale_{i} want finite numbers and a scale above 0"
        )
    return stated


def code_norm(contents: Contents) -> str:
    """By the buffer; the family's default where there is none."""
    number = contents.value("code_normalization_id")
    name = "CROSSCODER" if number is None else CODE_NORMS.get(int(number), str(number))
    if name not in ("CROSSCODER", "SAE", "NONE"):
        raise UnreadableFormat(
            f"{contents.weights}: code normalisation {name}, which a Crosscoder cannot express here"
        )
    return name
