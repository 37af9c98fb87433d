"""Tokens per second of reading one residual stream at half depth, through every library, interleaved in one process.

The arms: this library's plain-hook backend; the loop one would write by hand; the hand-written loop without the early stop; and
TransformerLens and nnsight, used directly.  Figures are medians over the rounds; the ratios are medians of each round's ratio, so
that a slow moment of the machine falls on all arms alike.

Goals: at least 0.9 of the hand-written loop, and at least 2 times the run without an early stop.
"""

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from tl_crosscoder.models.backends import HookBackend
from tl_crosscoder.models.tokens import TokenBatch


class Halt(Exception):
    """Ends the hand-written loop's forward pass."""


def main() -> None:
    options = parsed()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = small_model(options).to(options.device)
    ids = torch.randint(3, options.vocab, (options.batch, options.context), device=options.device)
    arms = all_arms(model, TokenBatch.from_ids(ids), options.layers // 2 - 1)
    reference = arms["by hand"]()
    for name, arm in arms.items():
        worst = (arm() - reference).abs().max().item()
        assert worst < 1e-4, f"{name} reads something else: {worst}"
    times = measured(arms, options.rounds, options.device)
    report(times, ids.numel(), as_json=options.json)


def all_arms(model: nn.Module, tokens: TokenBatch, layer: int) -> dict[str, Callable[[], Tensor]]:
    backend, hook = HookBackend(model), f"blocks.{layer}.hook_resid_post"
    arms = {
        "ours": lambda: backend.capture(tokens, hook),
        "by hand": lambda: by_hand(model, tokens, layer, stop=True),
        "by hand, no early stop": lambda: by_hand(model, tokens, layer, stop=False),
        "TransformerLens": through_transformer_lens(model, tokens, layer),
    }
    if find_spec("nnsight"):
        arms["nnsight"] = through_nnsight(model, tokens, layer)
    return arms


def by_hand(model: nn.Module, tokens: TokenBatch, layer: int, stop: bool) -> Tensor:
    seen = []

    def grab(_module: nn.Module, _args: tuple, output: Tensor) -> None:
        seen.append(output)
        if stop:
            raise Halt

    handle = model.model.layers[layer].register_forward_hook(grab)
    try:
        with torch.no_grad():
            model(input_ids=tokens.ids, use_cache=False)
    except Halt:
        pass
    finally:
        handle.remove()
    return seen[0]


def through_transformer_lens(model: nn.Module, tokens: TokenBatch, layer: int) -> Callable[[], Tensor]:
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

    hook = f"blocks.{layer}.hook_resid_post"
    bridge = build_bridge_from_module(copy.deepcopy(model), "LlamaForCausalLM", hf_config=model.config)

    def arm() -> Tensor:
        with torch.no_grad():
            return bridge.run_with_cache(tokens.ids, names_filter=hook, stop_at_layer=layer + 1)[1][hook]

    return arm


def through_nnsight(model: nn.Module, tokens: TokenBatch, layer: int) -> Callable[[], Tensor]:
    from nnsight import NNsight

    traced = NNsight(copy.deepcopy(model))

    def arm() -> Tensor:
        with torch.no_grad(), traced.trace(input_ids=tokens.ids, use_cache=False) as tracer:
            acts = traced.model.layers[layer].output.save()
            tracer.stop()
        return acts

    return arm


def measured(arms: dict[str, Callable[[], Tensor]], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of each arm in each round, after one round that is not counted."""
    times = {name: [] for name in arms}
    for count in range(rounds + 1):
        for name, arm in arms.items():
            begin = time.perf_counter()
            arm()
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            if count:
                times[name].append(time.perf_counter() - begin)
    return times


def report(times: dict[str, list[float]], n_tokens: int, as_json: bool) -> None:
    speed = {name: statistics.median(n_tokens / t for t in taken) for name, taken in times.items()}
    ratios = {
        name: statistics.median(other / ours for other, ours in zip(taken, times["ours"], strict=True))
        for name, taken in times.items()
    }
    if as_json:
        print(json.dumps({"tokens_per_second": speed, "ours_is_faster_by": ratios}))
        return
    for name in times:
        print(f"{name:24}{speed[name]:>12,.0f} tokens/s    ours is {ratios[name]:.2f} times as fast")


def small_model(options: argparse.Namespace) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=options.vocab,
        hidden_size=options.width,
        intermediate_size=4 * options.width,
        num_hidden_layers=options.layers,
        num_attention_heads=options.width // 64,
        num_key_value_heads=options.width // 64,
    )
    config._attn_implementation = "eager"  # the only implementation that all three libraries share
    return LlamaForCausalLM(config).eval()


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    for name, default in (("rounds", 15), ("layers", 10), ("width", 384), ("vocab", 8192), ("batch", 4)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


if __name__ == "__main__":
    main()
