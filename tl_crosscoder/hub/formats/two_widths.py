"""A fork of the first replication for two models of different widths: ``W_enc_A W_enc_B W_dec_A W_dec_B`` and biases."""

from typing import TYPE_CHECKING

from tl_crosscoder.hub.formats.base import Conventions, Format, Given
from tl_crosscoder.hub.formats.contents import Contents
from tl_crosscoder.hub.formats.layout import expect, sizes_of

if TYPE_CHECKING:
    from tl_crosscoder.dictionary.crosscoder import Crosscoder


class TwoWidths(Format):
    """``f = relu(x_A W_enc_A + x_B W_enc_B + b_enc)``, ``x̂_m = f W_dec_m + b_dec_m``; the narrower model is padded with zeros."""

    name = "lisannbecker"

    def recognises(self, contents: Contents) -> bool:
        return "W_enc_A" in contents and "W_enc_B" in contents

    def describe(self, contents: Contents) -> Conventions:
        (d_a, d_sae), (d_b, _) = (sizes_of(contents, f"W_enc_{m}", "d_in d_sae").values() for m in "AB")
        wanted = {"b_enc": (d_sae,)}
        for m, d in (("A", d_a), ("B", d_b)):
            wanted |= {f"W_enc_{m}": (d, d_sae), f"W_dec_{m}": (d_sae, d), f"b_dec_{m}": (d,)}
        expect(contents, wanted)
        padded = f"widths {d_a} and {d_b}: the narrower model's activations are wanted padded with zeros to {max(d_a, d_b)}"
        return Conventions(
            self.name,
            max(d_a, d_b), d_sae, 2,
            models="A = base, B = tuned (by this format's convention; the files name neither order)",
            sparsity="ReLU (L1)",
            ranking="f · Σ_m ‖d_m‖ (its penalty)",
            normalisation="lost: x · scale, with a scale a model that was not saved",
            notes=(padded,) if d_a != d_b else (),
            wants={
                "scale": "the activations were multiplied by one factor a model, which is not in the files. "
                "Pass scale=(base's, tuned's), or scale=1 "
                "if you bring activations that are normalised already"
            },
        )  # fmt: skip

    def read(self, contents: Contents, given: Given) -> "Crosscoder":
        import torch

        from tl_crosscoder.dictionary.sparsity import ReLU
        from tl_crosscoder.hub.formats.assemble import Parts, build, fold_given
        from tl_crosscoder.hub.formats.opened import open_weights
        from tl_crosscoder.hub.tensors import read

        weights = open_weights(contents)
        widths = [contents.shape(f"W_enc_{m}")[0] for m in "AB"]
        dtype = given.dtype or weights.dtype("W_enc_A")
        enc, dec = (torch.zeros(contents.shape("b_enc")[0], 2, max(widths), dtype=dtype) for _ in range(2))
        b_dec = torch.zeros(2, max(widths), dtype=dtype)
        for i, (m, d) in enumerate(zip("AB", widths, strict=True)):
            weights.read_into(f"W_enc_{m}", enc[:, i, :d].T)
            weights.read_into(f"W_dec_{m}", dec[:, i, :d])
            weights.read_into(f"b_dec_{m}", b_dec[i, :d])
        parts = Parts(enc, dec, read(weights, "b_enc", dtype), b_dec)
        mean, scale = fold_given(parts, given)
        return build(parts, ReLU(), mean=mean, scale=scale, widths=widths)
