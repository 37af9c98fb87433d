"""This library's own folder for SAE-Lens: an SAE of the concatenated activations with a ``metadata.crosscoder`` block."""

from typing import TYPE_CHECKING, Any

from tl_crosscoder.errors import CorruptFile
from tl_crosscoder.hub.formats.base import NOT_STATED, Conventions, Format, Given
from tl_crosscoder.hub.formats.contents import Contents
from tl_crosscoder.hub.formats.layout import sizes_of

if TYPE_CHECKING:
    from tl_crosscoder.dictionary.crosscoder import Crosscoder


def block(contents: Contents) -> Any:
    """``metadata.crosscoder`` of cfg.json."""
    metadata = contents.settings.get("metadata")
    return metadata.get("crosscoder") if isinstance(metadata, dict) else None


class SaeLens(Format):
    """``f = jump(x_flat W_enc + b_enc)``, ``x̂_flat = f W_dec + b_dec``, flat index = model · d_in + i, on raw activations."""

    name = "SAE-Lens (tl-crosscoder)"

    def recognises(self, contents: Contents) -> bool:
        return "W_enc" in contents and len(contents.shape("W_enc")) == 2 and isinstance(block(contents), dict)

    def describe(self, contents: Contents) -> Conventions:
        about, metadata = block(contents), contents.settings["metadata"]
        sizes, n = sizes_of(contents, "W_enc", "d_in d_sae"), about.get("n_models")
        if type(n) is not int or n < 1 or sizes["d_in"] % n:
            raise CorruptFile(
                f"{contents.folder}: n_models is {n!r:.40}, W_enc {list(contents.shape('W_enc'))}"
            )
        sparsity = about.get("sparsity")
        sparsity = sparsity if isinstance(sparsity, dict) else {}
        models = about.get("models")
        names = (
            [
                " + ".join(str(model[key]) for key in ("name", "adapter_name") if model.get(key))
                for model in models
                if isinstance(model, dict)
            ]
            if isinstance(models, list)
            else []
        )
        k = sparsity.get("k")
        return Conventions(
            self.name,
            sizes["d_in"] // n, sizes["d_sae"], n,
            models="base, tuned",
            sparsity=f"{sparsity.get('name')!s:.40}, saved as {contents.settings.get('architecture')!s:.40}",
            ranking=f"code norm {about.get('code_norm')!s:.40}, folded into the thresholds",
            threshold="one a latent, on the raw pre-activation" if "threshold" in contents else "none",
            normalisation=f"(x - mean) · scale, folded; scale = {about.get('model_scales')!s:.80}",
            folding="norms and losses are in the units of the folded normaliser",
            bos=f"prepend_bos {metadata.get('prepend_bos')!s:.10}" + " (assumed)" * ("prepend_bos" in (about.get("assumed") or [])),
            hook=f"{metadata.get('hook_name') or NOT_STATED!s:.120}",
            language_models=", ".join(f"{name:.80}" for name in names) or NOT_STATED,
            claims={"l0": float(k)} if type(k) is int else {},
        )  # fmt: skip

    def read(self, contents: Contents, given: Given) -> "Crosscoder":
        from tl_crosscoder.hub.sae_lens.artifact import read_sae_lens

        found = read_sae_lens(contents.folder)
        return found if given.dtype is None else found.to(given.dtype)
