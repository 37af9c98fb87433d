"""Which file of a folder holds the crosscoder, and in which format."""

from pathlib import Path

from tl_crosscoder.errors import CorruptFile, CrosscoderError, UnreadableFormat
from tl_crosscoder.hub.folder import in_run
from tl_crosscoder.hub.formats import FORMATS, Conventions, Format
from tl_crosscoder.hub.formats.contents import Contents, look

KNOWN = ", ".join(form.name for form in FORMATS)


def detect(path: Path) -> tuple[Format, Contents]:
    """The format and what is in the file; UnreadableFormat where there is none or more than one.

    A run folder stands for its crosscoder.
    """
    path = in_run(path)
    found = [(form, contents) for contents in look(path) if (form := format_of(contents))]
    if len(found) > 1:
        found = [
            (form, contents)
            for form, contents in found
            if contents.weights.stem.endswith(("final", "latest"))
        ] or found
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(contents.weights.name for _, contents in found)
        raise UnreadableFormat(
            f"{path}: several files hold a crosscoder ({names:.200}); name the one you mean: "
            f"{path}/{found[-1][1].weights.name}"
        )
    folders = (
        [
            p.name
            for p in sorted(path.iterdir())
            if p.is_dir() and any(f.suffix in (".safetensors", ".pt") for f in p.iterdir())
        ]
        if path.is_dir()
        else []
    )
    if folders:
        raise UnreadableFormat(
            f"{path}: no crosscoder here, but there are weights in {', '.join(folders[:10]):.200}; name one: "
            f"{path}/{folders[0]}"
        )
    if _is_sae(path):
        raise UnreadableFormat(
            f"{path}: {_seen(path)}, one SAE, and nothing says of how many models.  If it reads base and tuned side by side: "
            "tlc.from_sae_lens(sae_lens.SAE.load_from_disk(folder), n_models=2)"
        )
    raise UnreadableFormat(f"{path}: {_seen(path)}; wanted a crosscoder of a format known here: {KNOWN}")


def format_of(contents: Contents) -> Format | None:
    """The first format that recognises the tensors and settings."""
    return next((form for form in FORMATS if form.recognises(contents)), None)


def _seen(path: Path) -> str:
    seen = [f"{c.weights.name} holds {', '.join(list(c.tensors)[:6])}" for c in look(path)]
    return f"{'; '.join(seen):.300}" if seen else "no .safetensors or .pt file with tensors is there"


def _is_sae(path: Path) -> bool:
    """An SAE of SAE-Lens, or of another tool with its names and shapes."""
    return any(
        "W_enc" in c
        and "W_dec" in c
        and c.shape("W_enc") == c.shape("W_dec")[::-1]
        and len(c.shape("W_enc")) == 2
        for c in look(path)
    )


def described(form: Format, contents: Contents) -> Conventions:
    """What the format says about the files; settings of a kind that it does not foresee are CorruptFile."""
    try:
        return form.describe(contents)
    except CrosscoderError:
        raise
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
        raise CorruptFile(
            f"{contents.folder}: settings that no {form.name} has ({type(error).__name__}: {error!s:.200})"
        ) from error
