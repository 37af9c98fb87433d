"""SAE-Lens is an extra: this is what it says where it is missing."""

from importlib.util import find_spec


def needs_sae_lens() -> None:
    """Raise ImportError with the remedy where SAE-Lens cannot be imported."""
    if find_spec("sae_lens") is None:
        raise ImportError(
            "this needs SAE-Lens, which is not installed: pip install 'tl-crosscoder[sae-lens]'.  It wants transformer-lens below "
            "4; saving, loading and write_sae_lens work without it"
        )
