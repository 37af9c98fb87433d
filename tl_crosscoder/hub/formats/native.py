"""What :func:`tl_crosscoder.save` writes."""

from typing import TYPE_CHECKING, Any

from tl_crosscoder.errors import CorruptFile
from tl_crosscoder.hub.first_token import first_token
from tl_crosscoder.hub.formats.base import NOT_STATED, Conventions, Format, Given, listed
from tl_crosscoder.hub.formats.contents import Contents
from tl_crosscoder.hub.formats.layout import sizes_of

if TYPE_CHECKING:
    from tl_crosscoder.dictionary.crosscoder import Crosscoder

CODE_NORMS = {
    "sum": "f · Σ_m ‖d_m‖",
    "l2": "f · ‖[d_1 … d_M]‖",
    "none": "f alone",
    "decoupled": "f · ‖d_m‖, apart for each model",
}


class Native(Format):
    """``f = sparsity(Σ_m y_m W_enc[m] + b_enc)``, ``ŷ_m = f W_dec[:, m] + b_dec[m]`` on ``y = (x - mean) · scale``."""

    name = "tl-crosscoder"

    def recognises(self, contents: Contents) -> bool:
        return "W_enc" in contents and "format_version" in contents.settings and "axes" in contents.settings

    def describe(self, contents: Contents) -> Conventions:
        config, extra = contents.settings.get("crosscoder"), contents.settings.get("extra")
        axes = contents.settings.get("axes")
        turned = isinstance(axes, dict) and axes.get("W_enc") == "model d_in d_sae"  # versions 1 and 2
        sizes = sizes_of(contents, "W_enc", "model d_in d_sae" if turned else "d_sae model d_in")
        if not isinstance(config, dict) or not isinstance(extra, dict):
            raise CorruptFile(f"{contents.folder}: config.json has no 'crosscoder' or no 'extra'")
        sparsity = config.get("sparsity")
        sparsity = sparsity if isinstance(sparsity, dict) else {}
        scale, units = contents.values("scale"), contents.values("units.scale")
        moved = scale is not None and (set(scale) != {1.0} or any(contents.values("mean") or []))
        pair = extra.get("pair", extra)
        pair = pair if isinstance(pair, dict) else {}
        k, models, widths = sparsity.get("k"), contents.settings.get("models"), config.get("widths")
        return Conventions(
            self.name,
            sizes["d_in"], sizes["d_sae"], sizes["model"],
            models=", ".join(f"{name!s:.40}" for name in models) if isinstance(models, list) else NOT_STATED,
            sparsity=_told(sparsity),
            ranking=CODE_NORMS.get(str(config.get("code_norm")), str(config.get("code_norm"))[:40]),
            threshold="; ".join(_threshold(contents, part) for part in _parts("sparsity", sparsity)),
            normalisation=f"(x - mean) · scale, scale = {listed(scale or [])}" if moved else "none",
            folding="the normaliser; norms and losses are in its units" if units else "nothing is folded into the weights",
            bos=_left_out(extra),
            hook=f"{pair.get('hook') or NOT_STATED!s:.120}",
            language_models=", ".join(_name(pair.get(side)) for side in ("base", "tuned")) if "base" in pair else NOT_STATED,
            notes=(f"widths {widths!s:.80}: the narrower models' activations are wanted padded with zeros",) if widths else (),
            claims=_claims(extra, k),
        )  # fmt: skip

    def read(self, contents: Contents, given: Given) -> "Crosscoder":
        from tl_crosscoder.hub.save import load

        return load(contents.folder, given.dtype)


def _told(sparsity: dict[str, Any]) -> str:
    """``name(setting=value, ...)``, parts of parts in the same way."""

    def value(said: Any) -> str:
        if isinstance(said, list):
            return " and ".join(map(value, said))
        return _told(said) if isinstance(said, dict) else f"{said!s:.40}"

    given = [
        f"{name}={value(said)}" for name, said in sparsity.items() if name != "name" and said is not None
    ]
    return f"{sparsity.get('name')!s:.40}" + (f"({', '.join(given)})" if given else "")


def _parts(path: str, sparsity: dict[str, Any]) -> list[str]:
    """Where the tensors of a sparsity lie, or those of its parts."""
    several = sparsity.get("parts")
    inside = {str(m): part for m, part in enumerate(several)} if isinstance(several, list) else sparsity
    parts = [_parts(f"{path}.{name}", part) for name, part in inside.items() if isinstance(part, dict)]
    return [place for part in parts for place in part] or [path]


def _threshold(contents: Contents, sparsity: str) -> str:
    if f"{sparsity}.log_threshold" in contents:
        return "one a latent, exp(log_threshold), on the pre-activation"
    if (threshold := contents.values(f"{sparsity}.threshold")) is None:
        return "none"
    if len(threshold) > 1:
        return f"one a latent, on the pre-activation: {min(threshold):.4g} … {max(threshold):.4g}"
    return (
        f"one: score > {threshold[0]:.6g}"
        if threshold[0] >= 0
        else "not estimated yet: it cannot be evaluated"
    )


def _left_out(extra: dict[str, Any]) -> str:
    if "prepend_bos" in extra:
        return f"prepend_bos {extra['prepend_bos']!s:.10}"
    capture = extra.get("capture")
    return (first_token(capture) if isinstance(capture, dict) else "") or NOT_STATED


def _name(model: Any) -> str:
    said = model.get("name") if isinstance(model, dict) else model
    adapter = model.get("adapter_name") if isinstance(model, dict) else None
    return f"{said!s:.80}" + (f" + {adapter!s:.80}" if adapter else "")


def _claims(extra: dict[str, Any], k: Any) -> dict[str, float]:
    metrics = extra.get("metrics")
    metrics = metrics if isinstance(metrics, dict) else {}
    found = {
        name: float(value)
        for name in ("l0", "fve", "fve_base", "fve_tuned")
        if isinstance(value := metrics.get(name), int | float)
    }
    return found or ({"l0": float(k)} if type(k) in (int, float) else {})
