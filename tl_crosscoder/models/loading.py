"""Models and tokenizers from a local folder or the Hub: safetensors only, never a model's own code."""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Outline:
    """What a model's config says of it, known before its weights are read."""

    d_in: int
    n_layers: int
    d_vocab: int
    dtype: torch.dtype
    tokenizer: Any


def outline(name: str | Path, dtype: torch.dtype | str, revision: str | None = None) -> Outline:
    """The outline of a model in a folder or on the Hub, to be loaded in ``dtype``, with its tokenizer."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(str(name), revision=revision or "main", trust_remote_code=False)
    text = config.get_text_config()
    tokenizer = load_tokenizer(name, revision)
    return Outline(text.hidden_size, text.num_hidden_layers, text.vocab_size, as_dtype(dtype), tokenizer)


def load_model(
    name: str | Path,
    *,
    dtype: torch.dtype | str = "float32",
    device: str | torch.device = "cpu",
    revision: str | None = None,
    attention: str | None = None,
) -> Any:
    """A causal language model in eval mode, its weights in ``dtype`` on ``device``."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(
        str(name),
        dtype=as_dtype(dtype),
        revision=revision or "main",
        attn_implementation=attention,
        use_safetensors=True,
        trust_remote_code=False,
    )
    return model.to(device).eval()


def load_tokenizer(name: str | Path, revision: str | None = None) -> Any:
    """The tokenizer that lies beside the model."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(name), revision=revision or "main", trust_remote_code=False)


def load_adapter(model: Any, adapter: str | Path) -> Any:
    """``model`` with the PEFT adapter of a folder or Hub repository attached.

    An adapter that is not in safetensors is refused: PEFT would unpickle it.
    """
    from huggingface_hub import snapshot_download

    try:
        from peft import PeftModel
    except ImportError as error:
        raise ImportError(f'the adapter {adapter} needs: pip install "tl-crosscoder[peft]"') from error
    folder = Path(adapter)
    if not folder.is_dir():
        folder = Path(
            snapshot_download(
                str(adapter), allow_patterns=["adapter_config.json", "adapter_model.safetensors"]
            )
        )
    if not (folder / "adapter_model.safetensors").is_file():
        raise FileNotFoundError(
            f"{adapter} has no adapter_model.safetensors; save the adapter with safetensors"
        )
    with warnings.catch_warnings():
        # PEFT asks transformers by a name that transformers has since changed.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        return PeftModel.from_pretrained(model, str(folder)).eval()


def with_template(tokenizer: Any, other: Any) -> Any:
    """``tokenizer``, given ``other``'s chat template if it has none of its own."""
    if (
        getattr(tokenizer, "chat_template", None) is None
        and getattr(other, "chat_template", None) is not None
    ):
        tokenizer.chat_template = other.chat_template
    return tokenizer


def as_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """``"bfloat16"`` as ``torch.bfloat16``."""
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype):
        raise ValueError(f"dtype must be one of torch's, such as 'float32' or 'bfloat16', got {dtype!r}")
    return found
