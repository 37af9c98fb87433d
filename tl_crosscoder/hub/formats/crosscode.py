"""crosscode's folders: ``model.pt`` and ``model_cfg.yaml``, saved with the activations' scaling folded in."""

from typing import TYPE_CHECKING, Any

from tl_crosscoder.errors import CorruptFile, UnreadableFormat
from tl_crosscoder.hub.formats.base import Conventions, Format, Given, listed
from tl_crosscoder.hub.formats.contents import Contents
from tl_crosscoder.hub.formats.layout import expect, sizes_of

if TYPE_CHECKING:
    from tl_crosscoder.dictionary.crosscoder import Crosscoder

W_ENC, W_DEC, B_ENC, B_DEC = "_W_enc_XiDiL", "_W_dec_LXoDo", "b_enc_L", "_b_dec_XoDo"
LOG_THRESHOLD = "activation_fn.log_threshold_L"
NEGATIVE = "its top-k may keep negative pre-activations where fewer than k are positive; here they are 0"
SCALES = ("folded_scaling_factors_in_Xi", "folded_scaling_factors_out_Xo")


class Crosscode(Format):
    """``f = act(Σ_mp x_mp W_enc[m, p] + b_enc)``, ``x̂_mp = f W_dec[:, m, p] + b_dec[m, p]`` for M models at P hook points.

    Models at one hook point, or one model at several, take the model axis here.  Choices ignore decoder norms.
    """

    name = "crosscode"

    def recognises(self, contents: Contents) -> bool:
        return W_ENC in contents

    def describe(self, contents: Contents) -> Conventions:
        sizes = sizes_of(contents, W_ENC, "model point d_in d_sae")
        m, p, d_in, d_sae = sizes.values()
        if min(m, p) != 1:
            raise UnreadableFormat(
                f"{contents.weights}: {m} models at {p} hook points; a Crosscoder has one axis for both, and is "
                "of several models at one "
                "hook point or of one model at several"
            )
        expect(
            contents,
            {W_ENC: (m, p, d_in, d_sae), W_DEC: (d_sae, m, p, d_in)},
            {
                B_ENC: (d_sae,),
                B_DEC: (m, p, d_in),
                LOG_THRESHOLD: (d_sae,),
                "is_folded": (),
                **{name: (m, p) for name in SCALES},
            },
        )
        settings = contents.settings
        for key, size in (("n_models", m), ("n_hookpoints", p), ("d_model", d_in), ("n_latents", d_sae)):
            if settings.get(key) not in (None, size):
                raise CorruptFile(
                    f"{contents.folder}: {key} is {settings[key]!r:.40}, the weights have {size}"
                )
        for key, name in (("use_encoder_bias", B_ENC), ("use_decoder_bias", B_DEC)):
            if isinstance(settings.get(key), bool) and settings[key] != (name in contents):
                raise CorruptFile(
                    f"{contents.folder}: {key} is {settings[key]}, but {name} is "
                    f"{'there' if name in contents else 'missing'}"
                )
        kind, arguments = activation(contents)
        wants = {}
        if kind == "batchtopk":
            wants["threshold"] = (
                "this BatchTopK has no threshold for single tokens: its library looks at a whole batch at "
                "inference too. Pass threshold=, on "
                "the pre-activation, such as the mean over some batches of the smallest one that is kept"
            )
        folded = contents.value("is_folded")
        if not folded:
            wants["scale"] = (
                "is_folded is false or missing: the scaling of the activations is not in the weights. Pass "
                "scale= for each model, or scale=1 if "
                "there was none"
            )
        scales = contents.values(SCALES[0]) if folded else None
        return Conventions(
            self.name,
            d_in, d_sae, m * p,
            models="in the order of the training's list; the files do not name them" if p == 1 else f"{p} hook points of one model",
            sparsity=f"{kind} {arguments}" if arguments else kind,
            ranking="f alone, without decoder norms",
            threshold="one a latent, exp(log_threshold), on the raw pre-activation" if kind == "jumprelu" else "none",
            normalisation="x · scale, folded into the weights: they read raw activations" if folded else "missing",
            folding=f"scales {listed(scales)} are in the weights" if scales else "scales are not in the weights",
            notes=(NEGATIVE,) if "topk" in kind else (),
            wants=wants,
            claims={"l0": float(k)} if (k := arguments.get("k")) and "topk" in kind else {},
        )  # fmt: skip

    def read(self, contents: Contents, given: Given) -> "Crosscoder":
        import torch

        from tl_crosscoder.dictionary.sparsity import BatchTopK, GroupMax, ReLU, Threshold, TopK
        from tl_crosscoder.hub.formats.assemble import Layout, build, fold_given, read_parts
        from tl_crosscoder.hub.formats.opened import open_weights
        from tl_crosscoder.hub.tensors import read

        weights = Squeezed(open_weights(contents), contents)
        layout = Layout(
            W_ENC,
            "model d_in d_sae",
            W_DEC,
            "d_sae model d_in",
            B_ENC if B_ENC in contents else None,
            B_DEC if B_DEC in contents else None,
        )
        parts = read_parts(weights, layout, given.dtype)
        kind, arguments = activation(contents)
        if kind == "jumprelu":
            # too large for the dtype: never active, as it was
            sparsity = Threshold.of(
                read(weights, LOG_THRESHOLD).double().exp().to(parts.enc.dtype).nan_to_num()
            )
        elif kind == "batchtopk":
            sparsity = BatchTopK(arguments["k"])
            sparsity.threshold = torch.tensor(given.threshold, dtype=parts.enc.dtype)
        else:
            sparsity = {"relu": ReLU, "topk": TopK, "groupmax": GroupMax}[kind](*arguments.values())
        mean, scale = fold_given(parts, given) if given.scale is not None else (None, None)
        return build(parts, sparsity, code_norm="none", mean=mean, scale=scale)


def activation(contents: Contents) -> tuple[str, dict[str, Any]]:
    """The kind of the activation function, and k where it has one."""
    said = contents.settings.get("activation_fn")
    name, cfg = (said.get("classname"), said.get("cfg")) if isinstance(said, dict) else (None, None)
    kind = str(name).lower().removesuffix("activation")
    kind = "jumprelu" if "jumprelu" in kind else kind
    keys = {
        "relu": (),
        "jumprelu": (),
        "topk": ("k",),
        "batchtopk": ("k_per_example", "k"),
        "groupmax": ("k_groups", "k"),
    }
    if kind not in keys or (kind == "jumprelu") != (LOG_THRESHOLD in contents):
        raise UnreadableFormat(
            f"{contents.folder}: model_cfg.yaml's activation_fn is {said!r:.120}; known: {', '.join(keys)}"
        )
    if not keys[kind]:
        return kind, {}
    found = [cfg[key] for key in keys[kind] if isinstance(cfg, dict) and type(cfg.get(key)) is int]
    if not found or not 0 < found[0] <= contents.shape(W_ENC)[-1]:
        raise UnreadableFormat(f"{contents.folder}: model_cfg.yaml gives {kind} no k: {cfg!r:.120}")
    return kind, {"k": found[0]}


class Squeezed:
    """The weights without the axis of which there is one."""

    def __init__(self, weights: Any, contents: Contents):
        self.weights, self.axes = weights, {W_ENC: (0, 2), W_DEC: (1, 3), B_DEC: (0, 2)}
        self.contents = contents

    def shape(self, name: str) -> tuple[int, ...]:
        shape = self.weights.shape(name)
        if name not in self.axes:
            return shape
        start, stop = self.axes[name]
        return (*shape[:start], shape[start] * shape[start + 1], *shape[stop:])

    def dtype(self, name: str) -> Any:
        return self.weights.dtype(name)

    def read_into(self, name: str, into: Any, *, finite: bool = True) -> None:
        start = self.axes.get(name, (0,))[0]
        whole = (
            into.unflatten(start, self.weights.shape(name)[start : start + 2]) if name in self.axes else into
        )
        self.weights.read_into(name, whole, finite=finite)
