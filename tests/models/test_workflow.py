"""Hooks, caches and generation by a user's own means: the same through every library."""

import copy
import inspect
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec

import pytest
import torch
from tiny_models import (
    BOS,
    bridged,
    hooked,
    tiny_gpt2_model,
    tiny_llama_model,
    tiny_lora_model,
    traced,
    traced_transformers,
    word_tokenizer,
)

from tl_crosscoder import BASE, TUNED, BatchTopK, Crosscoder, Init, ModelPair, ablate, steer, substitute
from tl_crosscoder.models.tokens import TokenBatch

HOOK, D_SAE = "blocks.1.hook_resid_post", 24
HAS_HOOKED = int(version("transformer-lens").partition(".")[0]) < 4
NEEDS_NNSIGHT = pytest.mark.skipif(find_spec("nnsight") is None, reason="nnsight is an optional extra")
NEEDS_PEFT = pytest.mark.skipif(find_spec("peft") is None, reason="peft is an optional extra")
MAKE = {
    "plain": copy.deepcopy,
    "bridge": bridged,
    "hooked": hooked,
    "nnsight": traced,
    "nnsight_transformers": traced_transformers,
}
LIBRARIES = ["plain", "bridge", *(["hooked"] if HAS_HOOKED else [])]
LIBRARIES += [pytest.param(name, marks=NEEDS_NNSIGHT) for name in ("nnsight", "nnsight_transformers")]
FAMILIES = {"llama": tiny_llama_model, "gpt2": tiny_gpt2_model}


@cache
def pair_of(library: str, family: str = "llama") -> ModelPair:
    models = [MAKE[library](FAMILIES[family](seed)) for seed in (0, 1)]
    for model in models:
        if library in ("bridge", "hooked"):
            model.tokenizer = word_tokenizer()
    return ModelPair(*models, hook=HOOK, tokenizer=word_tokenizer())


def dictionary(d_in: int = 16) -> Crosscoder:
    """Random weights, of which about a fifth of the latents are active on a token."""
    torch.manual_seed(3)
    crosscoder = Crosscoder(d_in, D_SAE, BatchTopK(4), init=Init(norm=1.0, same=False)).eval()
    torch.nn.init.normal_(crosscoder.b_dec)
    crosscoder.sparsity.threshold.fill_(3.0)
    return crosscoder


def batch(padding: str = "left") -> TokenBatch:
    ids = torch.randint(3, 61, (3, 7), generator=torch.Generator().manual_seed(0))
    ids[:, 0] = BOS
    mask = torch.ones(3, 7, dtype=torch.bool)
    if padding != "none":
        mask[1, 5:], mask[2, 4:] = False, False
    tokens = TokenBatch.from_ids(ids, mask)
    return tokens.padded("left") if padding == "left" else tokens


def run_by_hand(pair: ModelPair, library: str, tokens: TokenBatch, side: str = "tuned") -> torch.Tensor:
    """The logits, as a user of the library gets them."""
    model = pair.sides(side)[0].model
    ids, mask = tokens.ids, tokens.attention_mask.long()
    with torch.no_grad():
        if library == "hooked":
            return model(ids, attention_mask=mask)
        if library.startswith("nnsight"):
            with model.trace(input_ids=ids, attention_mask=mask, position_ids=tokens.position_ids):
                logits = model.output.logits.save()
            return logits  # noqa: RET504  (a trace cannot be returned from)
        out = model(ids, attention_mask=mask, position_ids=tokens.position_ids)
        return out if library == "bridge" else out.logits


def gap(left: torch.Tensor, right: torch.Tensor, tokens: TokenBatch) -> float:
    return (left - right)[tokens.attention_mask].abs().max().item()


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("library", LIBRARIES)
def test_inside_hooks_a_model_run_by_hand_has_the_edit_and_afterwards_it_has_not(library, family, padding):
    pair, crosscoder, tokens = pair_of(library, family), dictionary(), batch(padding)
    acts = pair.capture(tokens)
    latents = range(12)
    clean = run_by_hand(pair, library, tokens)
    for edit, want in (
        (steer(crosscoder, [2], 3.0), steer(crosscoder, [2], 3.0)),
        (ablate(crosscoder, latents, pair.other), ablate(crosscoder, latents, acts[:, :, BASE])),
        (substitute(crosscoder, latents, pair.other), substitute(crosscoder, latents, acts[:, :, BASE])),
    ):
        with pair.hooks(edit):
            edited = run_by_hand(pair, library, tokens)
        assert gap(edited, pair.run(tokens, want), tokens) <= 1e-5
        assert gap(edited, clean, tokens) > 1e-3
    assert gap(run_by_hand(pair, library, tokens), clean, tokens) == 0


@pytest.mark.parametrize("library", LIBRARIES)
def test_the_base_model_can_be_the_edited_one(library):
    pair, crosscoder, tokens = pair_of(library), dictionary(), batch()
    acts = pair.capture(tokens)
    with pair.hooks(substitute(crosscoder, range(12), pair.other, model=BASE), side="base"):
        edited = run_by_hand(pair, library, tokens, "base")
    want = substitute(crosscoder, range(12), acts[:, :, TUNED], model=BASE)
    assert gap(edited, pair.run(tokens, want, side="base"), tokens) <= 1e-5


def generated(pair: ModelPair, library: str, tokens: TokenBatch, n: int) -> torch.Tensor:
    """New ids, by the library's own ``generate`` with its own key-value cache."""
    model = pair.tuned.model
    ids, mask = tokens.ids, tokens.attention_mask
    sampling = {"max_new_tokens": n, "do_sample": False}
    if hasattr(pair.tuned.module, "generation_config"):
        pair.tuned.module.generation_config.eos_token_id = None  # as stop_ids=[]
    if library == "hooked":
        out = model.generate(ids, **sampling, stop_at_eos=False, verbose=False, prepend_bos=False)
    elif library == "bridge":
        out = model.generate(ids, **sampling, stop_at_eos=False, verbose=False)
    elif library == "nnsight_transformers":
        with model.generate(input_ids=ids, attention_mask=mask.long(), **sampling) as tracer:
            out = tracer.result.save()
    else:
        out = model.generate(input_ids=ids, attention_mask=mask.long(), **sampling)
    return out[:, ids.shape[1] :]


@pytest.mark.filterwarnings("ignore:.*generation flags.*", "ignore::UserWarning")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "library", [name for name in LIBRARIES if getattr(name, "values", [name])[0] != "nnsight"]
)
def test_a_librarys_own_generate_gives_what_generating_in_lockstep_gives(library, family):
    pair, crosscoder = pair_of(library, family), dictionary()
    tokens = batch("none" if library in ("hooked", "bridge") else "left")
    make = lambda other: ablate(crosscoder, range(16), other)
    want = pair.generate(tokens, 5, make, stop_ids=[])
    with pair.hooks(make(pair.other)):
        assert torch.equal(generated(pair, library, tokens, 5), want)
    plain = pair.generate(tokens, 5, stop_ids=[])
    assert not torch.equal(want, plain)
    assert torch.equal(generated(pair, library, tokens, 5), plain)


@pytest.mark.parametrize("family", FAMILIES)
def test_beam_search_is_followed_through_every_exchange_of_texts(family):
    """Without a cache the whole text is read again at each step, so that nothing has to be followed: the answer to be met."""
    pair, crosscoder, tokens = pair_of("plain", family), dictionary(), batch()
    pair.tuned.module.generation_config.eos_token_id = None

    def beams(cached: bool) -> torch.Tensor:
        asked = {"input_ids": tokens.ids, "attention_mask": tokens.attention_mask.long(), "max_new_tokens": 6}
        return pair.tuned.model.generate(**asked, num_beams=4, do_sample=False, use_cache=cached)

    with pair.hooks(ablate(crosscoder, range(16), pair.other)):
        want = beams(cached=False)
        assert torch.equal(beams(cached=True), want)
    assert not torch.equal(beams(cached=True), want)


def test_a_cache_that_was_watched_is_left_as_it_was():
    pair, tokens = pair_of("plain"), batch("none")
    with pair.hooks(steer(dictionary(), [0], 1.0)):
        cache = pair.tuned.model(tokens.ids, use_cache=True).past_key_values
        for _ in range(2):
            pair.tuned.model(tokens.ids[:, :1], past_key_values=cache, use_cache=True)
        assert "reorder_cache" in vars(cache)
    assert "reorder_cache" not in vars(cache)


@NEEDS_PEFT
def test_one_model_with_its_adapter_on_and_off_reads_along_with_itself():
    model = tiny_lora_model(tiny_llama_model(), ["q_proj", "up_proj"])
    pair = ModelPair.from_adapter(model, hook=HOOK, tokenizer=word_tokenizer())
    crosscoder, tokens = dictionary(), batch()
    make = lambda other: ablate(crosscoder, range(16), other, part="difference")
    with pair.hooks(make(pair.other)):
        edited = run_by_hand(pair, "plain", tokens)
        ids = generated(pair, "plain", tokens, 5)
    assert gap(edited, pair.run(tokens, make(pair.capture(tokens)[:, :, BASE])), tokens) <= 1e-5
    assert torch.equal(ids, pair.generate(tokens, 5, make, stop_ids=[]))


@pytest.mark.parametrize("library", LIBRARIES)
def test_nothing_is_left_behind_even_after_an_error(library):
    pair = pair_of(library)
    module = pair.tuned.module
    run_by_hand(pair, library, batch())  # a bridge hangs up hooks of its own on its first forward

    def count() -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())

    before = count()
    with pytest.raises(ZeroDivisionError), pair.hooks(steer(dictionary(), [0], 1.0)):
        raise ZeroDivisionError
    assert count() == before
    with pair.hooks(steer(dictionary(), [0], 1.0)):
        assert count() > before
    if library in ("bridge", "hooked"):
        with pair.hooks(steer(dictionary(), [0], 1.0)):
            run_by_hand(pair, library, batch())
        assert all(not point.fwd_hooks for point in pair.tuned.model.hook_dict.values())
        pair.tuned.model.reset_hooks()
    assert count() == before


def test_the_other_model_is_at_hand_inside_hooks_only():
    pair, tokens = pair_of("plain"), batch()
    with pytest.raises(RuntimeError, match=r"inside pair.hooks"):
        pair.other()
    seen = []
    with pair.hooks(lambda acts, **_: seen.append(pair.other()) or acts):
        run_by_hand(pair, "plain", tokens)
    assert gap(seen[0], pair.capture(tokens)[:, :, BASE], tokens) <= 1e-6
    with pytest.raises(RuntimeError, match=r"inside pair.hooks"):
        pair.other()


def test_a_text_begun_outside_cannot_be_continued_inside():
    pair, tokens = pair_of("plain"), batch("none")
    model = pair.tuned.model
    cache = model(tokens.ids, use_cache=True).past_key_values
    with (
        pair.hooks(steer(dictionary(), [0], 1.0)),
        pytest.raises(RuntimeError, match="begin the text inside"),
    ):
        model(tokens.ids[:, :1], past_key_values=cache, use_cache=True)


@pytest.mark.parametrize("library", LIBRARIES)
def test_the_cache_holds_the_latents_beside_the_usual_keys(library):
    pair, crosscoder, tokens = pair_of(library), dictionary().train(), batch()
    logits, cache = pair.run_with_cache(tokens, crosscoder=crosscoder)
    where, acts = tokens.attention_mask, pair.capture(tokens)
    assert gap(logits, pair.run(tokens), tokens) <= 1e-5
    assert gap(cache[HOOK], acts[:, :, TUNED], tokens) <= 1e-5
    assert (
        gap(cache["blocks.0.hook_resid_pre"], pair.tuned.capture(tokens, "blocks.0.hook_resid_pre"), tokens)
        <= 1e-5
    )
    assert crosscoder.training
    codes = crosscoder.eval().encode(acts[where])
    latents = cache["crosscoder.hook_latents"]
    assert latents.shape == (3, 7, D_SAE) and 0 < (latents > 0).float().mean() < 0.5
    torch.testing.assert_close(latents[where], codes, rtol=1e-5, atol=1e-5)
    assert not latents[~where].any()
    recon, error = cache["crosscoder.hook_recon"], cache["crosscoder.hook_error"]
    torch.testing.assert_close((recon + error)[where], acts[where], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(recon[where], crosscoder.decode(codes), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("library", LIBRARIES)
def test_only_what_is_asked_for_is_kept(library):
    pair, tokens = pair_of(library), batch()
    for names in (
        "crosscoder.hook_latents",
        ["crosscoder.hook_latents"],
        lambda name: name.endswith("latents"),
    ):
        _, cache = pair.run_with_cache(tokens, crosscoder=dictionary(), names_filter=names)
        assert list(cache.keys()) == ["crosscoder.hook_latents"]
    _, cache = pair.run_with_cache(tokens, names_filter=HOOK, side="base")
    assert gap(cache[HOOK], pair.capture(tokens)[:, :, BASE], tokens) <= 1e-5


@NEEDS_NNSIGHT
@pytest.mark.parametrize("library", ["nnsight", "nnsight_transformers"])
def test_an_edit_is_an_assignment_in_a_trace_and_carries_the_chosen_latents_alone(library):
    pair, crosscoder, tokens = pair_of(library), dictionary(), batch()
    acts = pair.capture(tokens)
    edit = substitute(crosscoder, [1, 5, 7], acts[:, :, BASE])
    model = pair.tuned.model
    with (
        torch.no_grad(),
        model.trace(
            input_ids=tokens.ids,
            attention_mask=tokens.attention_mask.long(),
            position_ids=tokens.position_ids,
        ),
    ):
        model.model.layers[1].output = edit(model.model.layers[1].output)
        logits = model.output.logits.save()
    assert gap(logits, pair.run(tokens, edit), tokens) <= 1e-5
    held = [cell.cell_contents for cell in inspect.unwrap(edit).__closure__ or ()]
    sizes = [value.d_sae for value in held if isinstance(value, Crosscoder)]
    assert sizes == [3]  # what a remote run is sent
