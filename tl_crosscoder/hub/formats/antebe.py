"""Antebe's Dedicated Feature Crosscoders and their top-k baselines: four tensors and two masks."""

from typing import TYPE_CHECKING

from tl_crosscoder.errors import CorruptFile, UnreadableFormat
from tl_crosscoder.hub.formats.base import Conventions, Format, Given
from tl_crosscoder.hub.formats.contents import Contents
from tl_crosscoder.hub.formats.layout import expect, sizes_of

if TYPE_CHECKING:
    from tl_crosscoder.dictionary.crosscoder import Crosscoder


class Antebe(Format):
    """``f = top_k(relu(Σ_m x_m W_enc[m] + b_enc))`` on each token, ``x̂_m = f W_dec[:, m] + b_dec[m]``; model A is the TUNED one.

    The latents are [A's own | B's own | shared]; their numbers are kept.  The activations were z-scored with statistics that were
    not saved.  The repository's ``dfc.py`` is never run.
    """

    name = "Antebe DFC"

    def recognises(self, contents: Contents) -> bool:
        return "W_enc" in contents and len(contents.shape("W_enc")) == 3 and "enc_mask" in contents

    def describe(self, contents: Contents) -> Conventions:
        sizes = sizes_of(contents, "W_enc", "model d_in d_sae")
        n_models, d_in, d_sae = sizes.values()
        expect(
            contents,
            {"W_enc": (2, d_in, d_sae), "W_dec": (d_sae, 2, d_in), "b_enc": (d_sae,), "b_dec": (2, d_in)},
            {"enc_mask": (2, d_sae), "dec_mask": (d_sae, 2)},
        )
        settings = contents.settings
        k, n_a, n_b = (settings.get(name) for name in ("k", "n_a", "n_b"))
        if type(k) is not int or not 0 < k <= d_sae:
            raise UnreadableFormat(
                f"{contents.folder}: config.json's k is {k!r:.40}; a top-k without its k would be a dense code"
            )
        for name, size in (("activation_dim", d_in), ("dict_size", d_sae)):
            if settings.get(name) not in (None, size):
                raise CorruptFile(
                    f"{contents.folder}: {name} is {settings[name]!r:.40}, the weights have {size}"
                )
        return Conventions(
            self.name,
            d_in, d_sae, n_models,
            models="stored as tuned, base; swapped on reading, so that 0 is base and 1 tuned",
            sparsity=f"top-k on each token, k={k}",
            ranking="f alone, without decoder norms",
            normalisation="lost: (x - mean) / std for each dimension, statistics not saved",
            bos="trained on the last token of each text",
            hook="the published: hidden_states[14] = the output of layer 13: blocks.13.hook_resid_post",
            notes=(f"latents [tuned's own: {n_a!r:.20} | base's own: {n_b!r:.20} | shared: the rest]; masks are in the weights",),
            wants={
                "scale": "the activations were z-scored for each model and dimension, and the statistics were "
                "not saved. Pass mean= and "
                "scale= (1/std) as [model d_in] with base first, or scale=1 if you bring z-scored activations"
            },
            claims={"l0": float(k)},
        )  # fmt: skip

    def read(self, contents: Contents, given: Given) -> "Crosscoder":
        from tl_crosscoder.dictionary.sparsity import TopK
        from tl_crosscoder.hub.formats.assemble import Layout, build, fold_given, read_parts
        from tl_crosscoder.hub.formats.opened import open_weights
        from tl_crosscoder.hub.tensors import read

        weights = open_weights(contents)
        parts = read_parts(
            weights,
            Layout("W_enc", "model d_in d_sae", "W_dec", "d_sae model d_in", "b_enc", "b_dec"),
            given.dtype,
        )
        for name, rows in (("enc_mask", parts.enc), ("dec_mask", parts.dec)):
            if name in contents:
                mask = read(weights, name, rows.dtype)
                mask = mask.T if name == "enc_mask" else mask
                if (rows.abs().amax(-1) * (mask == 0)).any() or not ((mask == 0) | (mask == 1)).all():
                    raise UnreadableFormat(
                        f"{contents.weights}: weights that {name!r} masks are not 0: it is not clear whether "
                        "the mask was applied"
                    )
        parts.swap_models()
        mean, scale = fold_given(parts, given)
        return build(parts, TopK(contents.settings["k"]), code_norm="none", mean=mean, scale=scale)
