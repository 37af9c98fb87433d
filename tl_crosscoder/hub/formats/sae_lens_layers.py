"""SAE-Lens' crosscoders of layers: the pull request with a layer axis, and the fork that concatenates the layers."""

from typing import TYPE_CHECKING, Any

from tl_crosscoder.errors import CorruptFile, UnreadableFormat
from tl_crosscoder.hub.formats.base import Conventions, Format, Given
from tl_crosscoder.hub.formats.contents import Contents
from tl_crosscoder.hub.formats.layout import expect

if TYPE_CHECKING:
    from tl_crosscoder.dictionary.crosscoder import Crosscoder

#: Settings under which the weights mean what is read here; others are refused.
PLAIN = {
    "hook_z_reshaping_mode": (False, None),
    "finetuning_scaling_factor": (False, None),
    "reshape_activations": ("none", None),
}
ACTIVATIONS = {"relu": "relu", "topk": "topk", "top_k": "topk"}


class SaeLensLayers(Format):
    """``f = act(Σ_l (x_l - b_dec[l])? W_enc[l] + b_enc)``, ``x̂_l = f W_dec[:, l] + b_dec[l]``: layers of one model, not models.

    The model axis holds the layers, in the order of ``hook_names``.
    """

    name = "SAE-Lens layers"

    def recognises(self, contents: Contents) -> bool:
        names = ("hook_names", "hook_names_in", "n_input_layers")
        return "W_enc" in contents and any(_setting(contents, name) is not None for name in names)

    def describe(self, contents: Contents) -> Conventions:
        n, d_in, d_sae, flat = _sizes(contents)
        kind, k = activation(contents)
        shapes = {"W_enc": (n * d_in, d_sae), "W_dec": (d_sae, n * d_in), "b_dec": (n * d_in,)}
        if not flat:
            shapes = {"W_enc": (n, d_in, d_sae), "W_dec": (d_sae, n, d_in), "b_dec": (n, d_in)}
        expect(
            contents, {**shapes, "b_enc": (d_sae,), **({"threshold": (d_sae,)} if kind == "jumprelu" else {})}
        )
        for name, fine in PLAIN.items():
            if _setting(contents, name) not in fine:
                raise UnreadableFormat(
                    f"{contents.folder}: {name} is {_setting(contents, name)!r:.40}, which this reader does not undo"
                )
        hooks, how = _hooks(contents), _setting(contents, "normalize_activations")
        wants = {}
        if how not in ("none", None):
            wants["scale"] = (
                f"normalize_activations is {how!r:.60}, whose factors are not in the files. Pass scale= for each layer"
                if how == "expected_average_only_in"
                else f"normalize_activations {how!r:.60} scales each token by itself, for you to do before. Then pass scale=1"
            )
        elif how is None:
            wants["scale"] = (
                "cfg.json does not say how activations were normalised. Pass scale=1 if they were not"
            )
        b_dec = _subtracts(contents)
        return Conventions(
            self.name + (" (concatenated)" if flat else ""),
            d_in, d_sae, n,
            models=f"{n} layers of one model, not models: {', '.join(f'{hook:.60}' for hook in hooks)}",
            sparsity=kind + (f", k={k}" if k else ""),
            b_dec="subtracted before encoding; folded into b_enc on reading" if b_dec else "not subtracted before encoding",
            ranking="f alone" if kind == "topk" else "none is used at inference",
            threshold="one a latent, on the raw pre-activation" if kind == "jumprelu" else "none",
            normalisation="none" if how == "none" else f"{how!r:.60}",
            bos=f"prepend_bos {_setting(contents, 'prepend_bos')!r:.10}",
            hook=", ".join(f"{hook:.60}" for hook in hooks),
            language_models=f"{_setting(contents, 'model_name')!s:.80}",
            wants=wants,
            claims={"l0": float(k)} if k else {},
        )  # fmt: skip

    def read(self, contents: Contents, given: Given) -> "Crosscoder":
        from tl_crosscoder.dictionary.sparsity import ReLU, Threshold, TopK
        from tl_crosscoder.hub.formats.assemble import Layout, build, fold_given, read_parts
        from tl_crosscoder.hub.formats.opened import open_weights
        from tl_crosscoder.hub.tensors import read

        n, d_in, _, flat = _sizes(contents)
        weights: Any = open_weights(contents)
        if flat:
            weights = Cut(weights, n, d_in)
        parts = read_parts(
            weights,
            Layout("W_enc", "model d_in d_sae", "W_dec", "d_sae model d_in", "b_enc", "b_dec"),
            given.dtype,
        )
        if _subtracts(contents):
            parts.subtract_b_dec()
        kind, k = activation(contents)
        sparsity = (
            ReLU()
            if kind == "relu"
            else TopK(k)
            if kind == "topk" and k
            else Threshold.of(read(weights, "threshold", parts.enc.dtype))
        )
        mean, scale = fold_given(parts, given) if given.scale is not None else (None, None)
        return build(parts, sparsity, code_norm="none", mean=mean, scale=scale)


class Cut:
    """Weights whose concatenated layers are an axis of their own."""

    def __init__(self, weights: Any, n: int, d_in: int):
        self.weights, self.n, self.d_in = weights, n, d_in

    def shape(self, name: str) -> tuple[int, ...]:
        shape, at = self.weights.shape(name), self._at(name)
        return shape if at is None else (*shape[:at], self.n, self.d_in, *shape[at + 1 :])

    def dtype(self, name: str) -> Any:
        return self.weights.dtype(name)

    def read_into(self, name: str, into: Any, *, finite: bool = True) -> None:
        at = self._at(name)
        if at is None or into.is_contiguous():
            self.weights.read_into(name, into if at is None else into.flatten(at, at + 1), finite=finite)
            return
        import torch

        made = torch.empty(self.weights.shape(name), dtype=into.dtype)
        self.weights.read_into(name, made, finite=finite)
        into.copy_(made.view(into.shape))

    def _at(self, name: str) -> int | None:
        return {"W_enc": 0, "W_dec": 1, "b_dec": 0}.get(name)


def _setting(contents: Contents, name: str) -> Any:
    """From the settings, or the metadata among them."""
    metadata = contents.settings.get("metadata")
    inner = metadata.get(name) if isinstance(metadata, dict) else None
    return contents.settings.get(name, inner)


def _sizes(contents: Contents) -> tuple[int, int, int, bool]:
    """Layers, width, latents, and whether the layers are concatenated."""
    shape, n = contents.shape("W_enc"), len(_hooks(contents))
    if len(shape) == 3:
        if shape[0] != n:
            raise CorruptFile(f"{contents.weights}: {n} hook names for {shape[0]} layers")
        return *shape, False
    if len(shape) != 2 or not n or shape[0] % n:
        raise CorruptFile(
            f"{contents.weights}: W_enc is {list(shape)}, want [{n} layers · d_in, d_sae] or [{n}, d_in, d_sae]"
        )
    return n, shape[0] // n, shape[1], True


def _hooks(contents: Contents) -> list[str]:
    read, written = (
        _setting(contents, f"hook_names{end}") or _setting(contents, "hook_names") for end in ("_in", "_out")
    )
    if not isinstance(read, list) or not read or not all(isinstance(hook, str) for hook in read):
        raise UnreadableFormat(
            f"{contents.folder}: the names of the layers are {read!r:.120}, want a list of words"
        )
    if written != read:
        raise UnreadableFormat(
            f"{contents.folder}: it reads {len(read)} layers and writes others; a Crosscoder writes what it reads"
        )
    return read


def _subtracts(contents: Contents) -> bool:
    said = _setting(contents, "apply_b_dec_to_input")
    if not isinstance(said, bool):
        raise UnreadableFormat(
            f"{contents.folder}: apply_b_dec_to_input is {said!r:.40}: whether b_dec is subtracted before "
            "encoding is not clear"
        )
    return said


def activation(contents: Contents) -> tuple[str, int | None]:
    """relu, topk with its k, or jumprelu."""
    architecture = str(_setting(contents, "architecture") or "standard")
    if "skip" in architecture:
        raise UnreadableFormat(
            f"{contents.folder}: a skip connection from input to output, which a Crosscoder has not"
        )
    if architecture in ("jumprelu", "jumprelu_crosscoder"):
        return "jumprelu", None
    arguments = _setting(contents, "activation_fn_kwargs") or {}
    said = (
        "topk"
        if architecture == "topk"
        else _setting(contents, "activation_fn_str") or _setting(contents, "activation_fn") or "relu"
    )
    kind = ACTIVATIONS.get(str(said).lower())
    if kind is None or architecture not in ("standard", "topk", "crosscoder"):
        raise UnreadableFormat(
            f"{contents.folder}: architecture {architecture!r:.40} with activation {said!r:.40}; known: "
            "standard, jumprelu, topk"
        )
    k = arguments.get("k", _setting(contents, "k")) if isinstance(arguments, dict) else None
    if kind == "topk" and (type(k) is not int or not 0 < k <= contents.shape("W_enc")[-1]):
        raise UnreadableFormat(
            f"{contents.folder}: a topk whose k is {k!r:.40}; without it the code would be dense"
        )
    return kind, k if kind == "topk" else None
