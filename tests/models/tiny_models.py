"""Tiny random language models of three families, and the same weights seen through every library."""

import copy
import warnings
from typing import Any

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

VOCAB, BOS, EOS = 61, 1, 2
_IDS = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": EOS}
_WIDE = {"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
_HEADS = {"num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64, "initializer_range": 0.2}


def tiny_llama_model(seed: int = 0, vocab: int = VOCAB) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(**{**_WIDE, "vocab_size": vocab}, **_HEADS, **_IDS, num_hidden_layers=3)
    config._attn_implementation = "eager"
    return LlamaForCausalLM(config).eval()


def tiny_gpt2_model(seed: int = 0) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCAB, n_embd=16, n_layer=3, n_head=2, n_positions=64, initializer_range=0.2, **_IDS
    )
    config._attn_implementation = "eager"
    return GPT2LMHeadModel(config).eval()


def tiny_gemma2_model(seed: int = 0) -> Gemma2ForCausalLM:
    """Alternating sliding and full attention, soft-capped scores and logits; the window is shorter than the texts."""
    torch.manual_seed(seed)
    config = Gemma2Config(
        **_WIDE, **_HEADS, **_IDS, num_hidden_layers=4, sliding_window=4, query_pre_attn_scalar=8
    )
    config._attn_implementation = "eager"
    return Gemma2ForCausalLM(config).eval()


FAMILIES = {"llama": tiny_llama_model, "gpt2": tiny_gpt2_model, "gemma2": tiny_gemma2_model}


def tiny_lora_model(model: Any, targets: list[str], seed: int = 0) -> Any:
    """The model with a LoRA on ``targets`` whose two matrices are both random, so that it changes something."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=targets, fan_in_fan_out=isinstance(model, GPT2LMHeadModel))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        peft_model = get_peft_model(model, config)
    torch.manual_seed(seed)
    for name, weight in peft_model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.3)
    return peft_model.eval()


def bridged(model: Any) -> Any:
    """A TransformerBridge over a copy of the model: a bridge rebuilds the model it is given."""
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

    model = copy.deepcopy(model)
    return build_bridge_from_module(model, type(model).__name__, hf_config=model.config)


def hooked(model: Any, **overrides: Any) -> Any:
    """A HookedTransformer with the model's weights, unprocessed (TransformerLens 3 only)."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import (
        convert_gemma_weights,
        convert_gpt2_weights,
        convert_llama_weights,
    )

    config = model.config
    common = {
        "d_vocab": VOCAB,
        "d_model": 16,
        "d_head": 8,
        "n_heads": 2,
        "n_layers": config.num_hidden_layers,
        "n_ctx": 64,
        "device": "cpu",
        "dtype": model.dtype,
        "original_architecture": type(model).__name__,
    }
    rotary = {
        "d_mlp": 32,
        "normalization_type": "RMS",
        "positional_embedding_type": "rotary",
        "rotary_adjacent_pairs": False,
        "rotary_dim": 8,
        "n_key_value_heads": 1,
        "gated_mlp": True,
        "final_rms": True,
        "eps": 1e-6,
    }
    if isinstance(model, GPT2LMHeadModel):
        own = {"d_mlp": 64, "act_fn": "gelu_new", "normalization_type": "LN", "eps": 1e-5}
        convert = convert_gpt2_weights
    elif isinstance(model, LlamaForCausalLM):
        own, convert = {**rotary, "act_fn": "silu"}, convert_llama_weights
    else:
        own, convert = {**rotary, "act_fn": "gelu_pytorch_tanh"}, convert_gemma_weights
        own |= {"window_size": 4, "use_local_attn": True, "attn_types": ["local", "global"] * 2}
        own |= {"attn_scores_soft_cap": 50.0, "output_logits_soft_cap": 30.0, "use_attn_scale": True}
        own |= {"use_normalization_before_and_after": True}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        result = HookedTransformer(HookedTransformerConfig(**common, **own))
        result.load_and_process_state_dict(
            convert(model, result.cfg),
            **{
                "fold_ln": False,
                "center_writing_weights": False,
                "center_unembed": False,
                "fold_value_biases": False,
            }
            | overrides,
        )
    return result.eval()


def traced(model: Any) -> Any:
    """nnsight's wrapper of any module, over a copy: mixed with plain hooks on one model it would misread."""
    from nnsight import NNsight

    return NNsight(copy.deepcopy(model))


def traced_transformers(model: Any) -> Any:
    """nnsight's wrapper that brings a tokenizer along."""
    from nnsight import TransformersModel

    return TransformersModel(copy.deepcopy(model), tokenizer=word_tokenizer())


def word_tokenizer(n: int = VOCAB, bos: str = "<s>", eos: str = "</s>") -> Any:
    """A tokenizer of ``n`` whole words: id i is ``w{i}``, save for the three special ones."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", bos, eos, *(f"w{i}" for i in range(3, n))]
    inner = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token=bos, eos_token=eos, unk_token="<unk>", pad_token=eos
    )
