"""Every backend against plain hooks, and the ways in which reading a model goes wrong without a word."""

import copy
import subprocess
import sys
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec

import pytest
import torch
from tiny_models import (
    BOS,
    EOS,
    FAMILIES,
    bridged,
    hooked,
    tiny_gpt2_model,
    tiny_llama_model,
    tiny_lora_model,
    traced,
    traced_transformers,
    word_tokenizer,
)
from torch import nn

from tl_crosscoder.errors import HookNotFound, PairMismatch, ShapeMismatch
from tl_crosscoder.models.backends import Backend, HookBackend, as_backend
from tl_crosscoder.models.backends.sites import Site, decoder_layers, parse_hook
from tl_crosscoder.models.tokens import TokenBatch

SEES = {"bridge": bridged, "hooked": hooked, "nnsight": traced, "nnsight_transformers": traced_transformers}
# HookedTransformer left TransformerLens in version 4.
HAS_HOOKED = int(version("transformer-lens").partition(".")[0]) < 4
NEEDS_NNSIGHT = pytest.mark.skipif(find_spec("nnsight") is None, reason="nnsight is an optional extra")
NEEDS_PEFT = pytest.mark.skipif(find_spec("peft") is None, reason="peft is an optional extra")
TRANSFORMER_LENS = ["bridge", "hooked"] if HAS_HOOKED else ["bridge"]
LIBRARIES = [
    *TRANSFORMER_LENS,
    pytest.param("nnsight", marks=NEEDS_NNSIGHT),
    pytest.param("nnsight_transformers", marks=NEEDS_NNSIGHT),
]
LAST = {"llama": 2, "gpt2": 2, "gemma2": 3}
TOLERANCE = 1e-5


@cache
def plain(family: str) -> HookBackend:
    return HookBackend(FAMILIES[family]())


@cache
def seen_through(library: str, family: str) -> Backend:
    return as_backend(SEES[library](FAMILIES[family]()))


def batch(padding: str = "none") -> TokenBatch:
    ids = torch.randint(3, 61, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(3, 9, dtype=torch.bool)
    if padding != "none":
        mask[1, 5:] = False
        mask[2, 3:] = False
    tokens = TokenBatch.from_ids(ids, mask)
    return tokens.padded("left") if padding == "left" else tokens


def direction(seed: int) -> torch.Tensor:
    return torch.randn(16, generator=torch.Generator().manual_seed(seed))


def steer(seed: int):
    return lambda acts, **_: acts + direction(seed).to(acts)


def edits_at_three_sites() -> dict:
    # Not in the order in which a forward pass meets them.
    return {
        "blocks.1.hook_resid_post": lambda acts, **_: 0.5 * acts + direction(1),
        "blocks.2.hook_resid_pre": steer(2),
        "blocks.0.hook_resid_pre": steer(3),
    }


def gap(left: torch.Tensor, right: torch.Tensor, tokens: TokenBatch) -> float:
    return (left - right)[tokens.attention_mask].abs().max().item()


# Parity -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("library", LIBRARIES)
def test_every_library_captures_what_plain_hooks_capture(library, family, padding):
    tokens = batch(padding)
    for hook in (
        "blocks.0.hook_resid_pre",
        "blocks.1.hook_resid_pre",
        "blocks.1.hook_resid_post",
        f"blocks.{LAST[family]}.hook_resid_post",
    ):
        ours, theirs = (b.capture(tokens, hook) for b in (plain(family), seen_through(library, family)))
        assert gap(ours, theirs, tokens) <= TOLERANCE, hook


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("library", LIBRARIES)
def test_every_library_gives_the_logits_that_plain_hooks_give(library, family, padding):
    tokens, other = batch(padding), seen_through(library, family)
    assert gap(plain(family).run(tokens), other.run(tokens), tokens) <= TOLERANCE
    edits = edits_at_three_sites()
    edited = plain(family).run(tokens, edits)
    assert gap(edited, other.run(tokens, edits), tokens) <= TOLERANCE
    assert gap(edited, plain(family).run(tokens), tokens) > 0.5


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("library", LIBRARIES)
def test_every_library_generates_the_ids_that_plain_hooks_generate(library, family):
    tokens, other = batch("right"), seen_through(library, family)
    edits = edits_at_three_sites()
    ids = plain(family).generate(tokens, 6, edits, stop_ids=())
    assert ids.tolist() == other.generate(tokens, 6, edits, stop_ids=()).tolist()
    assert ids.tolist() != plain(family).generate(tokens, 6, stop_ids=()).tolist()


@pytest.mark.parametrize("library", LIBRARIES)
def test_sampled_ids_depend_on_the_seed_and_not_on_the_library(library):
    tokens = batch("left")
    drawn = [
        b.generate(tokens, 6, temperature=1.0, seed=seed, stop_ids=()).tolist()
        for b in (plain("llama"), seen_through(library, "llama"))
        for seed in (0, 1)
    ]
    assert drawn[0] == drawn[2] != drawn[1] == drawn[3]


# Capture ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_capture_equals_hidden_states_up_to_the_last_block_and_its_output_there(family):
    backend, tokens, last = plain(family), batch(), LAST[family]
    outputs = []
    handle = backend.layers[last].register_forward_hook(lambda _m, _a, out: outputs.append(out))
    with torch.no_grad():
        states = backend.model(tokens.ids, output_hidden_states=True).hidden_states
    handle.remove()
    for layer in range(last):
        acts = backend.capture(tokens, f"blocks.{layer}.hook_resid_post")
        assert gap(acts, states[layer + 1], tokens) <= TOLERANCE
    acts = backend.capture(tokens, f"blocks.{last}.hook_resid_post")
    assert gap(acts, outputs[0], tokens) <= TOLERANCE
    # transformers' last hidden state is after the final norm.
    assert (acts - states[-1]).abs().max() > 0.5


@pytest.mark.parametrize("library", ["plain", *LIBRARIES])
def test_no_block_after_the_hook_runs(library):
    model = tiny_llama_model()
    backend = HookBackend(model) if library == "plain" else as_backend(SEES[library](model))
    module = getattr(backend, "module")  # noqa: B009
    blocks = module.blocks if library == "hooked" else decoder_layers(module)[1]
    head = module.unembed if library == "hooked" else module.lm_head
    calls = {"after": 0, "head": 0, "hooked": 0}

    def counts(part: nn.Module, name: str):
        inner = next((m for m in part.modules() if type(m).__name__.endswith("MLP")), part)
        inner.register_forward_pre_hook(lambda *_: calls.__setitem__(name, calls[name] + 1))

    counts(blocks[1], "hooked")
    counts(blocks[2], "after")
    counts(head, "head")
    backend.capture(batch(), "blocks.1.hook_resid_post")
    assert calls == {"after": 0, "head": 0, "hooked": 1}
    backend.capture(batch(), "blocks.2.hook_resid_post")
    assert calls == {"after": 1, "head": 0, "hooked": 2}
    backend.run(batch())
    assert calls == {"after": 2, "head": 1, "hooked": 3}


@pytest.mark.parametrize("library", ["plain", *LIBRARIES])
def test_captured_activations_enter_autograd(library):
    backend = plain("llama") if library == "plain" else seen_through(library, "llama")
    acts = backend.capture(batch(), "blocks.1.hook_resid_post")
    weight = torch.ones(16, requires_grad=True)
    (acts * weight).sum().backward()
    assert not acts.requires_grad
    assert torch.allclose(weight.grad, acts.sum(dim=(0, 1)), atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_does_not_move_real_positions(family):
    """Left-padded GPT-2 without position ids is off by several tenths."""
    right, left = batch("right"), batch("left")
    for hook in ("blocks.0.hook_resid_pre", f"blocks.{LAST[family]}.hook_resid_post"):
        a = plain(family).capture(right, hook)[right.attention_mask]
        b = plain(family).capture(left, hook)[left.attention_mask]
        assert (a - b).abs().max() <= TOLERANCE


def test_a_batch_row_is_what_the_text_alone_would_be():
    tokens = batch("left")
    alone = TokenBatch.from_ids(tokens.ids[2:, tokens.attention_mask[2]])
    together = plain("gpt2").capture(tokens, "blocks.2.hook_resid_post")[2, tokens.attention_mask[2]]
    assert torch.allclose(
        together, plain("gpt2").capture(alone, "blocks.2.hook_resid_post")[0], atol=TOLERANCE
    )


@pytest.mark.parametrize("library", ["plain", *LIBRARIES])
def test_bfloat16_stays_bfloat16(library):
    model = tiny_llama_model().to(torch.bfloat16)
    backend = HookBackend(model) if library == "plain" else as_backend(SEES[library](model))
    edits = {"blocks.1.hook_resid_post": lambda acts, **_: acts.float() + direction(0)}
    assert backend.dtype == torch.bfloat16
    assert backend.capture(batch(), "blocks.1.hook_resid_post").dtype == torch.bfloat16
    assert backend.run(batch(), edits).dtype == torch.bfloat16


def test_dropout_is_off_and_the_mode_of_every_module_comes_back():
    model = tiny_gpt2_model()
    quiet = as_backend(model).run(batch())
    model.train()
    model.transformer.h[1].eval()
    modes = [module.training for module in model.modules()]
    assert torch.equal(as_backend(model).run(batch()), quiet)
    assert [module.training for module in model.modules()] == modes
    assert not torch.equal(model(batch().ids).logits, quiet)


# Edits --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("library", ["plain", *LIBRARIES])
def test_an_edit_that_returns_its_input_changes_nothing(library):
    backend = plain("gemma2") if library == "plain" else seen_through(library, "gemma2")
    same = {f"blocks.{layer}.hook_resid_post": lambda acts, **_: acts for layer in range(4)}
    assert torch.equal(backend.run(batch(), same), backend.run(batch()))


@pytest.mark.parametrize("library", ["plain", *LIBRARIES])
def test_an_edit_of_all_texts_is_not_an_edit_of_the_first(library):
    """A block returns a tensor now and a tuple once: ``output[0]`` of a tensor is its first text."""
    backend = plain("llama") if library == "plain" else seen_through(library, "llama")
    shapes = []

    def zero(acts, **_):
        shapes.append(tuple(acts.shape))
        return torch.zeros_like(acts)

    logits = backend.run(batch(), {"blocks.2.hook_resid_post": zero})
    assert shapes == [(3, 9, 16)]
    # The norm of nothing is nothing, so every text's logits are 0.
    assert logits.abs().max() == 0


@pytest.mark.parametrize("library", ["plain", *LIBRARIES])
def test_an_edit_is_undone_when_it_raises(library):
    backend = plain("gpt2") if library == "plain" else seen_through(library, "gpt2")
    before = backend.run(batch())

    def fails(_acts, **_kwargs):
        raise ZeroDivisionError("the user's own mistake")

    for edits in ({"blocks.0.hook_resid_post": steer(0), "blocks.1.hook_resid_post": fails},):
        with pytest.raises(ZeroDivisionError, match="the user's own mistake"):
            backend.run(batch(), edits)
        with pytest.raises(ZeroDivisionError, match="the user's own mistake"):
            backend.generate(batch(), 3, edits)
    with pytest.raises(ShapeMismatch, match=r"\[3, 9, 16\] and returned \[1, 9, 16\]"):
        backend.run(batch(), {"blocks.1.hook_resid_post": lambda acts, **_: acts[:1]})
    assert torch.equal(backend.run(batch()), before)


def test_plain_hooks_are_gone_after_every_call():
    backend = HookBackend(tiny_llama_model())

    def n_hooks() -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in backend.model.modules())

    before = n_hooks()
    backend.capture(batch(), "blocks.1.hook_resid_post")
    backend.run(batch(), edits_at_three_sites())
    backend.generate(batch(), 2, edits_at_three_sites())
    assert n_hooks() == before


@pytest.mark.parametrize("library", TRANSFORMER_LENS)
def test_transformer_lens_hooks_of_the_user_survive_ours(library):
    backend = as_backend(SEES[library](tiny_llama_model()))
    before = backend.run(batch())
    backend.model.add_hook("blocks.1.hook_resid_post", steer(0))
    theirs = backend.run(batch())
    backend.capture(batch(), "blocks.0.hook_resid_post")
    backend.run(batch(), {"blocks.1.hook_resid_post": steer(1)})
    assert torch.equal(backend.run(batch()), theirs)
    backend.model.reset_hooks()
    assert torch.equal(backend.run(batch()), before)


@pytest.mark.parametrize("library", TRANSFORMER_LENS)
def test_the_same_edit_is_a_transformer_lens_hook(library):
    backend, tokens = seen_through(library, "llama"), batch()
    hook = "blocks.1.hook_resid_post"
    with backend.model.hooks(fwd_hooks=[(hook, steer(0))]), torch.no_grad():
        logits = backend.model(tokens.ids)
    assert (logits - backend.run(tokens, {hook: steer(0)})).abs().max() <= TOLERANCE


# Generation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_ids_are_those_of_transformers(family):
    backend, tokens = plain(family), batch("left")
    theirs = backend.model.generate(
        tokens.ids,
        attention_mask=tokens.attention_mask.long(),
        do_sample=False,
        max_new_tokens=8,
        min_new_tokens=8,
    )[:, 9:]
    assert backend.generate(tokens, 8, stop_ids=()).tolist() == theirs.tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_edited_greedy_ids_are_those_of_reading_the_whole_text_again_each_time(family):
    backend, edits = plain(family), edits_at_three_sites()
    tokens = batch("right")
    ids = backend.generate(tokens, 6, edits, stop_ids=())
    grown, expected = tokens.padded("left"), []
    for _ in range(6):
        expected.append(backend.run(grown, edits)[:, -1].argmax(dim=-1))
        grown = TokenBatch.from_ids(
            torch.cat([grown.ids, expected[-1][:, None]], dim=1),
            torch.cat([grown.attention_mask, torch.ones(3, 1, dtype=torch.bool)], dim=1),
        )
    assert ids.tolist() == torch.stack(expected, dim=1).tolist()


@pytest.mark.parametrize("library", ["plain", *LIBRARIES])
def test_before_forward_sees_each_block_before_the_model_does(library):
    backend = plain("llama") if library == "plain" else seen_through(library, "llama")
    tokens, log = batch("right"), []

    def look(acts, **_):
        log.append(("edit", acts.shape[1]))
        return acts

    ids = backend.generate(
        tokens,
        3,
        {"blocks.1.hook_resid_post": look},
        before_forward=lambda block, step: log.append((step, block.tolist())),
        stop_ids=(),
    )
    prompt = tokens.padded("left").ids.tolist()
    assert log == [
        (0, prompt), ("edit", 9), (1, ids[:, :1].tolist()), ("edit", 1), (2, ids[:, 1:2].tolist()), ("edit", 1)
    ]  # fmt: skip


def test_a_row_that_has_ended_is_padded_and_all_ended_rows_end_the_loop():
    backend, tokens = plain("llama"), batch()
    free = backend.generate(tokens, 8, stop_ids=())
    stops = {int(free[0, 1]), int(free[1, 2]), int(free[2, 3])}
    stopped = backend.generate(tokens, 8, stop_ids=stops)
    for row, unstopped in zip(stopped.tolist(), free.tolist(), strict=True):
        end = next(i for i, token in enumerate(unstopped) if token in stops)
        assert row[: end + 1] == unstopped[: end + 1]
        assert set(row[end + 1 :]) <= {EOS}
    assert stopped.shape[1] == max(row.index(next(t for t in row if t in stops)) + 1 for row in free.tolist())


def test_the_end_of_text_comes_from_the_tokenizer_and_from_the_model():
    model = tiny_llama_model()
    first = int(HookBackend(model).generate(batch(), 1, stop_ids=())[0, 0])
    model.generation_config.eos_token_id = [first, EOS]
    assert HookBackend(model).generate(batch().rows(slice(0, 1)), 5).tolist() == [[first]]
    model.generation_config.eos_token_id = None
    model.config.eos_token_id = None
    assert HookBackend(model).generate(batch().rows(slice(0, 1)), 5).shape == (1, 5)
    tokenizer = word_tokenizer()
    tokenizer.eos_token = f"w{first}"
    assert HookBackend(model, tokenizer).generate(batch().rows(slice(0, 1)), 5).tolist() == [[first]]


@pytest.mark.parametrize(
    ("bad", "message"), [({"max_new_tokens": 0}, "at least 1"), ({"temperature": -1.0}, "0 .greedy.")]
)
def test_generation_refuses_what_it_cannot_do(bad, message):
    with pytest.raises(ValueError, match=message):
        plain("llama").generate(batch(), **{"max_new_tokens": 1, **bad})


# Sites --------------------------------------------------------------------------------------------------------


def test_both_spellings_name_the_same_site():
    assert parse_hook("blocks.3.hook_resid_post", 4) == parse_hook("blocks.3.hook_out", 4) == Site(3, "post")
    assert parse_hook("blocks.0.hook_resid_pre", 4) == parse_hook("blocks.0.hook_in", 4) == Site(0, "pre")
    assert Site(3, "post").name == "blocks.3.hook_resid_post"


@pytest.mark.parametrize("library", ["plain", *LIBRARIES])
@pytest.mark.parametrize(
    ("hook", "message"),
    [
        ("blocks.14.hook_resid_post", r"'blocks.14.hook_resid_post'; it has 3 blocks, so 0\.\.2"),
        ("blocks.1.hook_resid_pots", "'blocks.L.hook_resid_post'"),
        ("blocks.1.hook_mlp_out", "'blocks.L.hook_resid_post'"),
        ("blocks.-1.hook_resid_post", "'blocks.L.hook_resid_post'"),
        ("model.layers.1", "'blocks.L.hook_resid_post'"),
    ],
)
def test_a_misspelt_hook_is_refused_by_every_verb(library, hook, message):
    backend = plain("llama") if library == "plain" else seen_through(library, "llama")
    for verb in (
        lambda: backend.capture(batch(), hook),
        lambda: backend.run(batch(), {hook: steer(0)}),
        lambda: backend.generate(batch(), 1, {hook: steer(0)}),
    ):
        with pytest.raises(HookNotFound, match=message):
            verb()


def test_two_names_of_one_site_are_refused():
    edits = {"blocks.1.hook_resid_post": steer(0), "blocks.1.hook_out": steer(1)}
    with pytest.raises(ValueError, match="one place; compose"):
        plain("llama").run(batch(), edits)


def test_blocks_are_found_by_their_number_or_by_a_path():
    model = tiny_llama_model()
    inner = model.model
    wrapped = nn.Module()
    wrapped.config, wrapped.body, wrapped.other = model.config, nn.Module(), nn.ModuleList([nn.Linear(1, 1)])
    wrapped.body.stack = inner.layers
    assert decoder_layers(wrapped) == ("body.stack", inner.layers)
    wrapped.twin = nn.ModuleList([nn.Linear(1, 1) for _ in range(3)])
    with pytest.raises(ValueError, match=r"body.stack .3., other .1., twin .3.; pass layers='the.path'"):
        decoder_layers(wrapped)
    assert decoder_layers(wrapped, "twin")[1] is wrapped.twin
    with pytest.raises(ValueError, match="Linear, wanted the ModuleList"):
        decoder_layers(model, "lm_head")


# Choosing a backend -------------------------------------------------------------------------------------------


def test_plain_hooks_import_no_other_library():
    others = "{'transformers', 'transformer_lens', 'nnsight', 'peft'}"
    script = (
        f"import sys, tl_crosscoder.models.pair as pair; assert not {others} & set(sys.modules), 'imported'"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_a_backend_is_chosen_by_the_type_of_the_model():
    backend = as_backend(tiny_llama_model())
    assert isinstance(backend, HookBackend) and isinstance(backend, Backend)
    assert (backend.d_in, backend.n_layers, backend.dtype) == (16, 3, torch.float32)
    assert as_backend(backend) is backend
    with pytest.raises(TypeError, match="no backend for Linear; wanted a transformers"):
        as_backend(nn.Linear(1, 1))


@pytest.mark.parametrize("library", LIBRARIES)
def test_every_backend_says_what_the_model_is(library):
    for family in FAMILIES:
        backend = seen_through(library, family)
        assert isinstance(backend, Backend)
        assert (backend.d_in, backend.n_layers, backend.dtype) == (16, LAST[family] + 1, torch.float32)
        assert backend.device == torch.device("cpu")


def test_a_tokenizer_is_for_models_that_bring_none():
    tokenizer = word_tokenizer()
    assert as_backend(tiny_llama_model(), tokenizer).tokenizer is tokenizer
    assert as_backend(bridged(tiny_llama_model()), tokenizer).tokenizer is tokenizer


@NEEDS_NNSIGHT
def test_an_nnsight_model_keeps_its_own_tokenizer():
    model = traced_transformers(tiny_llama_model())
    assert as_backend(model, word_tokenizer()).tokenizer is model.tokenizer


# Refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not HAS_HOOKED, reason="HookedTransformer left TransformerLens in version 4")
def test_centred_weights_are_refused_and_rms_models_are_not():
    with pytest.raises(PairMismatch, match="from_pretrained_no_processing"):
        as_backend(hooked(tiny_gpt2_model(), center_writing_weights=True))
    half = hooked(tiny_gpt2_model(), center_writing_weights=True).to(torch.bfloat16)
    with pytest.raises(PairMismatch, match="from_pretrained_no_processing"):
        as_backend(half)
    as_backend(hooked(tiny_gpt2_model()).to(torch.bfloat16))
    folded = as_backend(hooked(tiny_llama_model(), fold_ln=True))
    hook = "blocks.2.hook_resid_post"
    assert gap(folded.capture(batch(), hook), plain("llama").capture(batch(), hook), batch()) <= TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_a_bridge_with_processed_weights_is_refused_where_it_would_differ(family):
    model = bridged(FAMILIES[family]())
    model.enable_compatibility_mode(disable_warnings=True)
    if family == "gpt2":
        with pytest.raises(PairMismatch, match="centred on loading"):
            as_backend(model)
    else:
        hook = "blocks.1.hook_resid_post"
        assert (
            gap(as_backend(model).capture(batch(), hook), plain(family).capture(batch(), hook), batch())
            <= TOLERANCE
        )


@NEEDS_PEFT
def test_a_bridge_that_bypasses_the_adapter_is_refused():
    tuned = tiny_lora_model(tiny_gpt2_model(), ["c_attn"])
    with pytest.raises(PairMismatch, match=r"does not pass through .* adapter layers.*merge_and_unload"):
        as_backend(bridged(tuned.base_model.model))
    merged = copy.deepcopy(tuned).merge_and_unload()
    hook = "blocks.2.hook_resid_post"
    ours, theirs = (
        HookBackend(tuned).capture(batch(), hook),
        as_backend(bridged(merged)).capture(batch(), hook),
    )
    assert gap(ours, theirs, batch()) <= TOLERANCE
    assert gap(ours, plain("gpt2").capture(batch(), hook), batch()) > 0.1


@NEEDS_PEFT
def test_a_bridge_that_passes_through_the_adapter_is_accepted():
    tuned = tiny_lora_model(tiny_llama_model(), ["q_proj", "v_proj", "o_proj", "down_proj"])
    hook = "blocks.2.hook_resid_post"
    ours = HookBackend(tuned).capture(batch(), hook)
    theirs = as_backend(bridged(tuned.base_model.model)).capture(batch(), hook)
    assert gap(ours, theirs, batch()) <= TOLERANCE
    assert gap(ours, plain("llama").capture(batch(), hook), batch()) > 0.1


@NEEDS_PEFT
@NEEDS_NNSIGHT
def test_nnsight_sees_a_peft_model_with_its_adapter():
    tuned = tiny_lora_model(tiny_gpt2_model(), ["c_attn"])
    hook = "blocks.1.hook_resid_post"
    ours, theirs = HookBackend(tuned).capture(batch(), hook), as_backend(traced(tuned)).capture(batch(), hook)
    assert gap(ours, theirs, batch()) <= TOLERANCE
    assert gap(ours, plain("gpt2").capture(batch(), hook), batch()) > 0.1


def test_only_a_peft_model_can_have_its_adapter_off():
    with pytest.raises(ValueError, match="LlamaForCausalLM, which has no adapter"):
        HookBackend(tiny_llama_model(), adapter="off")


def test_the_bos_id_is_not_added_again():
    """TransformerLens puts a BOS before text it tokenises; ids pass through every backend as they are."""
    ids = torch.tensor([[BOS, 5, 6]])
    assert seen_through("bridge", "llama").run(TokenBatch.from_ids(ids)).shape[1] == 3
