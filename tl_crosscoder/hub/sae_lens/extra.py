"""SAE-Lens is an extra: this is what it says where it is missing."""


def needs_sae_lens() -> None:
    """Raise ImportError with the reason and the remedy where SAE-Lens cannot be imported."""
    try:
        import sae_lens  # noqa: F401
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == "sae_lens"
        found = "which is not installed" if missing else f"which cannot be imported ({error})"
        raise ImportError(
            f"this needs SAE-Lens, {found}: pip install 'tl-crosscoder[sae-lens]'.  It wants transformer-lens below 4; saving, "
            "loading and write_sae_lens work without it"
        ) from error
