"""The layout of the first open replication (ckkissane) and its many forks: ``W_enc W_dec b_enc b_dec`` and an L1 penalty."""

from typing import TYPE_CHECKING

from tl_crosscoder.errors import UnreadableFormat
from tl_crosscoder.hub.formats.base import NOT_STATED, Conventions, Format, Given
from tl_crosscoder.hub.formats.contents import Contents
from tl_crosscoder.hub.formats.layout import axes_of, expect

if TYPE_CHECKING:
    from tl_crosscoder.dictionary.crosscoder import Crosscoder

NAMES = ("W_enc", "W_dec", "b_enc", "b_dec")
#: What the published Gemma-2-2B crosscoder's activations were multiplied by, base and chat; two later works quote the same numbers.
PUBLISHED = (0.2758961493232058, 0.24422852496546169)
PUBLISHED_CLAIMS = {"l0": 81.0, "fve": 0.77}


def axes(contents: Contents) -> tuple[dict[str, int], str, str]:
    """The sizes that the biases tell, and the axes of W_enc and W_dec where only one order fits."""
    shapes: list[tuple[int, ...]] = [
        contents.shape(name) if name in contents else () for name in ("b_enc", "b_dec")
    ]
    if [len(shape) for shape in shapes] != [1, 2]:
        raise UnreadableFormat(
            f"{contents.weights}: b_enc wants [d_sae] and b_dec [model, d_in], got {[list(s) for s in shapes]}"
        )
    sizes = {"model": shapes[1][0], "d_in": shapes[1][1], "d_sae": shapes[0][0]}
    enc, dec = (axes_of(contents.weights, name, contents.shape(name), sizes) for name in ("W_enc", "W_dec"))
    expect_shapes(contents, sizes, enc, dec)
    return sizes, enc, dec


def expect_shapes(contents: Contents, sizes: dict[str, int], enc: str, dec: str) -> None:
    """Refuse other shapes of the four tensors; what else there may be is the caller's to say."""
    wanted = {
        name: tuple(sizes[axis] for axis in order.split())
        for name, order in (("W_enc", enc), ("W_dec", dec), ("b_enc", "d_sae"), ("b_dec", "model d_in"))
    }
    others = {name: contents.shape(name) for name in contents.tensors if name not in wanted}
    expect(contents, wanted, others)


class Kissane(Format):
    """``f = relu(Σ_m x_m W_enc[m] + b_enc)``, ``x̂_m = f W_dec[:, m] + b_dec[m]``, on activations of mean norm √d_in.

    The factors that brought them there are not in the files.
    """

    name = "ckkissane"

    def recognises(self, contents: Contents) -> bool:
        return all(name in contents for name in NAMES) and len(contents.shape("W_enc")) == 3

    def describe(self, contents: Contents) -> Conventions:
        if further := sorted(set(contents.tensors) - set(NAMES)):
            raise UnreadableFormat(
                f"{contents.weights}: unknown tensor {further[0]!r:.80}; this format has {', '.join(NAMES)}, "
                "and a threshold or mask left "
                "out would be silently wrong"
            )
        sizes, *_ = axes(contents)
        settings = contents.settings
        if settings.get("n_models") not in (None, sizes["model"]):
            raise UnreadableFormat(
                f"{contents.folder}: n_models is {settings['n_models']!r:.20}, the weights have {sizes['model']}"
            )
        published = (sizes["d_in"], sizes["d_sae"], settings.get("hook_point")) == (
            2304,
            16384,
            "blocks.14.hook_resid_pre",
        )
        why = (
            "the activations were multiplied by one factor a model (√d_in over their mean norm), and the "
            "factors are not in the files. "
            "Pass scale=(base's, tuned's), or scale=1 if you bring activations that are normalised already"
        )
        if published:
            why += f"; for the published Gemma-2-2B crosscoder they are {PUBLISHED}"
        hook = settings.get("hook_point")
        return Conventions(
            self.name,
            sizes["d_in"], sizes["d_sae"], sizes["model"],
            models="model A = base, model B = tuned (by this format's convention; the files name neither order)",
            sparsity="ReLU (L1)",
            ranking="f · Σ_m ‖d_m‖ (its penalty)",
            normalisation="lost: x · scale, with a scale a model that was not saved",
            bos="dropped in training (this format's code; the files do not say)",
            hook=f"{hook:.80}" + _same_as(hook) if isinstance(hook, str) else NOT_STATED,
            language_models=f"{settings['model_name']:.80}" if isinstance(settings.get("model_name"), str) else NOT_STATED,
            wants={"scale": why},
            claims=PUBLISHED_CLAIMS if published else {},
        )  # fmt: skip

    def read(self, contents: Contents, given: Given) -> "Crosscoder":
        from tl_crosscoder.dictionary.sparsity import ReLU
        from tl_crosscoder.hub.formats.assemble import Layout, build, fold_given, read_parts
        from tl_crosscoder.hub.formats.opened import open_weights

        _, enc, dec = axes(contents)
        parts = read_parts(
            open_weights(contents), Layout("W_enc", enc, "W_dec", dec, "b_enc", "b_dec"), given.dtype
        )
        mean, scale = fold_given(parts, given)
        return build(parts, ReLU(), mean=mean, scale=scale)


def _same_as(hook: str) -> str:
    """The output of the layer before, which is the same tensor."""
    words = hook.split(".")
    if len(words) == 3 and words[1].isdigit() and words[2] == "hook_resid_pre" and int(words[1]):
        return f" (= blocks.{int(words[1]) - 1}.hook_resid_post)"
    return ""
