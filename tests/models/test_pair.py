"""A pair reads the same tokens with both models, refuses what is no pair, and generates in lockstep."""

import copy
import json
import sys
from importlib.util import find_spec

import pytest
import torch
from tiny_models import (
    FAMILIES,
    bridged,
    tiny_gemma2_model,
    tiny_gpt2_model,
    tiny_llama_model,
    tiny_lora_model,
    traced,
    word_tokenizer,
)

from tl_crosscoder.errors import HookNotFound, PairMismatch
from tl_crosscoder.models.backends import HookBackend
from tl_crosscoder.models.backends.sites import Site
from tl_crosscoder.models.follower import Follower
from tl_crosscoder.models.pair import ModelPair
from tl_crosscoder.models.provenance import describe_model, fingerprint
from tl_crosscoder.models.tokens import TokenBatch

HOOK = "blocks.1.hook_resid_post"
NEEDS_NNSIGHT = pytest.mark.skipif(find_spec("nnsight") is None, reason="nnsight is an optional extra")
NEEDS_PEFT = pytest.mark.skipif(find_spec("peft") is None, reason="peft is an optional extra")


def batch() -> TokenBatch:
    ids = torch.randint(3, 61, (3, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(3, 7, dtype=torch.bool)
    mask[1, 4:] = False
    return TokenBatch.from_ids(ids, mask)


def left() -> TokenBatch:
    return batch().padded("left")


def pair_of(family: str = "llama", hook: str = HOOK) -> ModelPair:
    return ModelPair(FAMILIES[family](0), FAMILIES[family](1), hook=hook)


def peft_model(family: str = "llama"):
    return tiny_lora_model(FAMILIES[family](0), ["c_attn"] if family == "gpt2" else ["q_proj", "down_proj"])


def toward_other(strength: float):
    """An edit that mixes in what the other model has at the same positions."""

    def make_edit(other_acts):
        return lambda acts, **_: acts + strength * (other_acts() - acts)

    return make_edit


def generated_by_reading_everything_again(pair, tokens, n_new, strength, side):
    """The slow way: no cache anywhere, both models read the whole text for every token."""
    edited, other = pair.sides(side)
    grown, ids = tokens.padded("left"), []
    for _ in range(n_new):
        theirs = other.capture(grown, pair.hook)
        logits = edited.run(grown, {pair.hook: toward_other(strength)(lambda acts=theirs: acts)})
        ids.append(logits[:, -1].argmax(dim=-1))
        grown = TokenBatch.from_ids(
            torch.cat([grown.ids, ids[-1][:, None]], dim=1),
            torch.cat([grown.attention_mask, torch.ones(3, 1, dtype=torch.bool)], dim=1),
        )
    return torch.stack(ids, dim=1).tolist()


# Capture ------------------------------------------------------------------------------------------------------


def test_capture_stacks_base_before_tuned():
    base, tuned = tiny_llama_model(0), tiny_llama_model(1)
    acts = ModelPair(base, tuned, hook=HOOK).capture(batch())
    assert acts.shape == (3, 7, 2, 16)
    assert torch.equal(acts[:, :, 0], HookBackend(base).capture(batch(), HOOK))
    assert torch.equal(acts[:, :, 1], HookBackend(tuned).capture(batch(), HOOK))


def test_swapping_the_models_swaps_the_axis():
    pair = pair_of()
    assert torch.equal(
        ModelPair(pair.tuned, pair.base, hook=HOOK).capture(batch()), pair.capture(batch()).flip(2)
    )


def test_run_edits_the_chosen_side():
    pair = pair_of()
    zero = lambda acts, **_: torch.zeros_like(acts)
    for side, backend in (("base", pair.base), ("tuned", pair.tuned)):
        assert torch.equal(pair.run(batch(), side=side), backend.run(batch()))
        assert torch.equal(pair.run(batch(), zero, side=side), backend.run(batch(), {HOOK: zero}))
        assert not torch.equal(pair.run(batch(), zero, side=side), backend.run(batch()))
    with pytest.raises(ValueError, match="side must be 'base' or 'tuned', got 'chat'"):
        pair.sides("chat")


def test_replacing_tuned_by_base_at_the_last_block_leaves_only_the_head_to_differ():
    """With one head for both models the edited tuned model is the base model."""
    pair = pair_of(hook="blocks.2.hook_resid_post")
    pair.tuned.model.lm_head.load_state_dict(pair.base.model.lm_head.state_dict())
    pair.tuned.model.model.norm.load_state_dict(pair.base.model.model.norm.state_dict())
    base_acts = pair.base.capture(batch(), pair.hook)
    replaced = pair.run(batch(), lambda _acts, **_: base_acts)
    assert torch.allclose(replaced, pair.run(batch(), side="base"), atol=1e-5)
    assert (
        pair.generate(left(), 5, toward_other(1.0)).tolist() == pair.generate(left(), 5, side="base").tolist()
    )


@pytest.mark.parametrize("spelling", ["blocks.1.hook_out", Site(1, "post"), HOOK])
def test_the_hook_has_one_name_whatever_its_spelling(spelling):
    assert pair_of(hook=spelling).hook == HOOK


def test_ids_are_a_batch_in_which_every_token_is_real_and_texts_are_refused():
    pair, ids = pair_of(), batch().ids
    whole = TokenBatch.from_ids(ids)
    assert torch.equal(pair.capture(ids), pair.capture(whole))
    assert torch.equal(pair.run(ids.int()), pair.run(whole))
    assert torch.equal(pair.generate(ids, 2), pair.generate(whole, 2))
    for verb in (pair.capture, pair.run, lambda tokens: pair.generate(tokens, 2)):
        with pytest.raises(TypeError, match=r"got texts, as \['Hello'\]; corpus = Corpus\.from_texts"):
            verb(["Hello"])


@pytest.mark.parametrize("hook", [2, None])
def test_what_is_no_hook_name_is_told_what_one_looks_like(hook):
    with pytest.raises(
        HookNotFound, match=rf"no hook named {hook}: .*'blocks\.L\.hook_resid_post'.*L from 0 to 2"
    ):
        pair_of(hook=hook)


# Lockstep generation ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "hook", ["blocks.0.hook_resid_pre", "blocks.1.hook_resid_pre", "blocks.2.hook_resid_post"]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_lockstep_generation_equals_reading_everything_again(family, hook):
    pair = pair_of(family, hook)
    ids = pair.generate(left(), 6, toward_other(1.5), stop_ids=())
    assert ids.tolist() == generated_by_reading_everything_again(pair, batch(), 6, 1.5, "tuned")
    assert ids.tolist() != pair.generate(left(), 6, stop_ids=()).tolist()


@pytest.mark.parametrize("wrap", ["bridge", pytest.param("nnsight", marks=NEEDS_NNSIGHT)])
def test_lockstep_generation_is_the_same_through_every_library(wrap):
    wrapped = {"bridge": bridged, "nnsight": traced}[wrap]
    pair = pair_of()
    other = ModelPair(wrapped(pair.base.model), wrapped(pair.tuned.model), hook=HOOK)
    for side in ("base", "tuned"):
        expected = pair.generate(left(), 5, toward_other(1.5), side=side, stop_ids=())
        assert (
            other.generate(left(), 5, toward_other(1.5), side=side, stop_ids=()).tolist() == expected.tolist()
        )


@NEEDS_PEFT
@pytest.mark.parametrize("family", FAMILIES)
def test_one_set_of_weights_follows_itself_unedited(family):
    """The follower runs the very modules that the edit hangs on."""
    plain, tuned = FAMILIES[family](0), peft_model(family)
    shared, two = ModelPair.from_adapter(tuned, hook=HOOK), ModelPair(plain, copy.deepcopy(tuned), hook=HOOK)
    for side in ("base", "tuned"):
        expected = two.generate(left(), 6, toward_other(2.0), side=side, stop_ids=())
        assert (
            shared.generate(left(), 6, toward_other(2.0), side=side, stop_ids=()).tolist()
            == expected.tolist()
        )


def test_the_other_models_activations_have_the_shape_of_the_edited_ones():
    shapes = []

    def make_edit(other_acts):
        def edit(acts, **_):
            shapes.append((tuple(acts.shape), tuple(other_acts().shape)))
            return acts

        return edit

    pair_of().generate(left(), 3, make_edit, stop_ids=())
    assert shapes == [((3, 7, 16), (3, 7, 16)), ((3, 1, 16), (3, 1, 16)), ((3, 1, 16), (3, 1, 16))]


def test_an_edit_of_a_batch_padded_on_the_right_is_refused():
    """Its mask would fall on other tokens once generation has padded on the left."""
    pair = pair_of()
    with pytest.raises(ValueError, match=r'row 1 of this batch ends in padding.*batch\.padded\("left"\)'):
        pair.generate(batch(), 2, toward_other(1.0))
    assert pair.generate(batch(), 2).tolist() == pair.generate(left(), 2).tolist()


def test_a_follower_reads_only_the_new_tokens():
    backend, rows = HookBackend(tiny_llama_model()), []
    backend.layers[1].register_forward_pre_hook(lambda _m, args: rows.append(args[0].shape[1]))
    tokens = batch().padded("left")
    follower = Follower(backend, tokens, HOOK)
    follower.extend(tokens.ids)
    follower.extend(torch.full((3, 1), 5))
    assert rows == [7, 1]
    with pytest.raises(ValueError, match="not the left-padded prompt"):
        Follower(backend, batch(), HOOK).extend(batch().ids)


def test_sampling_with_a_seed_repeats_itself():
    pair = pair_of()
    one, two, other = (
        pair.generate(left(), 6, temperature=1.0, seed=seed, stop_ids=()).tolist() for seed in (4, 4, 5)
    )
    assert one == two != other


# Adapters -----------------------------------------------------------------------------------------------------


@NEEDS_PEFT
@pytest.mark.parametrize("family", FAMILIES)
def test_the_adapter_off_is_the_base_bit_for_bit(family):
    acts = ModelPair.from_adapter(peft_model(family), hook=HOOK).capture(batch())
    assert torch.equal(acts[:, :, 0], HookBackend(FAMILIES[family](0)).capture(batch(), HOOK))
    assert (acts[:, :, 0] - acts[:, :, 1]).abs().max() > 0.1


@NEEDS_PEFT
def test_a_merged_adapter_gives_the_activations_of_an_unmerged_one():
    tuned = peft_model()
    apart, merged = (ModelPair.from_adapter(tuned, hook=HOOK, merged=merged) for merged in (False, True))
    assert torch.allclose(apart.capture(batch()), merged.capture(batch()), atol=1e-5)
    assert not any(weight.requires_grad for weight in merged.tuned.model.parameters())
    states = [[p.description()[side]["adapter"] for side in ("base", "tuned")] for p in (apart, merged)]
    assert states == [["off", "on"], ["off", "merged"]]


@NEEDS_PEFT
def test_a_peft_model_with_its_adapter_off_has_its_bases_fingerprint():
    pair = ModelPair.from_adapter(peft_model(), hook=HOOK)
    assert fingerprint(pair.base) == fingerprint(HookBackend(tiny_llama_model(0)))
    assert fingerprint(pair.tuned) != fingerprint(pair.base)


@pytest.mark.parametrize("merged", [False, True])
def test_a_model_without_an_adapter_is_no_pair(merged):
    with pytest.raises(ValueError, match="wants a PEFT model, got LlamaForCausalLM"):
        ModelPair.from_adapter(tiny_llama_model(), hook=HOOK, merged=merged)


# Refusals -----------------------------------------------------------------------------------------------------


@NEEDS_PEFT
def test_swapped_roles_and_shared_weights_are_refused():
    inner = tiny_llama_model(0)
    tuned = tiny_lora_model(inner, ["q_proj"])
    with pytest.raises(PairMismatch, match="base carries the adapter; the roles look swapped"):
        ModelPair(tuned, tiny_llama_model(0), hook=HOOK)
    # get_peft_model put the adapter into ``inner`` itself: both would read the same and differ in nothing.
    with pytest.raises(PairMismatch, match="adapter on in both"):
        ModelPair(inner, tuned, hook=HOOK)


def test_one_model_twice_is_refused_unless_asked_for():
    model = tiny_llama_model()
    with pytest.raises(PairMismatch, match="the same LlamaForCausalLM object, so nothing can differ"):
        ModelPair(model, model, hook=HOOK)
    acts = ModelPair(model, model, hook=HOOK, check=False).capture(batch())
    assert torch.equal(acts[:, :, 0], acts[:, :, 1])


def test_models_of_another_shape_or_precision_are_refused():
    with pytest.raises(PairMismatch, match="base has number of blocks 3 and tuned 4"):
        ModelPair(tiny_llama_model(), tiny_gemma2_model(), hook=HOOK)
    with pytest.raises(PairMismatch, match=r"base has precision torch\.float32 and tuned torch\.bfloat16"):
        ModelPair(tiny_llama_model(0), tiny_llama_model(1).to(torch.bfloat16), hook=HOOK)


def test_a_hook_that_the_models_do_not_have_is_refused_before_anything_runs():
    base, tuned = tiny_llama_model(0), tiny_llama_model(1)
    for model in (base, tuned):
        model.register_forward_pre_hook(lambda *_: pytest.fail("a model ran"))
    with pytest.raises(HookNotFound, match=r"no hook 'blocks.3.hook_resid_post'; it has 3 blocks, so 0\.\.2"):
        ModelPair(base, tuned, hook="blocks.3.hook_resid_post")


def test_tokenizers_that_give_other_ids_are_refused():
    def with_tokenizers(base, tuned):
        return ModelPair(
            HookBackend(tiny_llama_model(0), base), HookBackend(tiny_llama_model(1), tuned), hook=HOOK
        )

    with pytest.raises(PairMismatch, match="'<bos>' is id None in base and 1 in tuned"):
        with_tokenizers(word_tokenizer(), word_tokenizer(bos="<bos>"))
    other_bos = word_tokenizer()
    other_bos.bos_token = "w5"
    with pytest.raises(PairMismatch, match="begins with id 1 in base, 5 in tuned"):
        with_tokenizers(word_tokenizer(), other_bos)
    longer = word_tokenizer(62)
    with pytest.raises(PairMismatch, match="62 tokens, but base has only 61 embedding rows"):
        with_tokenizers(longer, longer)
    own_end = word_tokenizer()
    own_end.eos_token = "w9"
    assert with_tokenizers(word_tokenizer(), own_end).tokenizer is own_end


def test_a_tokenizer_handed_in_is_held_against_the_models_own():
    backends = [HookBackend(tiny_llama_model(seed), word_tokenizer()) for seed in (0, 1)]
    with pytest.raises(PairMismatch, match="the tokenizers differ"):
        ModelPair(*backends, hook=HOOK, tokenizer=word_tokenizer(bos="<bos>"))
    pair = ModelPair(tiny_llama_model(0), tiny_llama_model(1), hook=HOOK, tokenizer=word_tokenizer())
    assert pair.base.tokenizer is pair.tuned.tokenizer is pair.tokenizer


def test_a_chat_template_that_only_base_has_is_the_pairs():
    base = word_tokenizer()
    base.chat_template = "{{ messages[0]['content'] }}"
    pair = ModelPair(
        HookBackend(tiny_llama_model(0), base), HookBackend(tiny_llama_model(1), word_tokenizer()), hook=HOOK
    )
    assert pair.tokenizer is pair.tuned.tokenizer
    assert pair.tokenizer.chat_template == base.chat_template


# Loading and description --------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    for name, seed in (("base", 0), ("tuned", 1)):
        tiny_llama_model(seed).save_pretrained(tmp_path / name)
        word_tokenizer().save_pretrained(tmp_path / name)
    return tmp_path


def test_a_loaded_pair_is_the_saved_one(saved):
    pair = ModelPair.load(saved / "base", saved / "tuned", hook=HOOK, attention="eager")
    assert torch.equal(pair.capture(batch()), pair_of().capture(batch()))
    assert pair.tokenizer.get_vocab() == word_tokenizer().get_vocab()
    half = ModelPair.load(str(saved / "base"), saved / "tuned", hook=HOOK, dtype="bfloat16")
    assert half.capture(batch()).dtype == torch.bfloat16


@NEEDS_PEFT
def test_a_loaded_adapter_is_the_saved_one(saved):
    tuned = peft_model()
    tuned.save_pretrained(saved / "adapter")
    expected = ModelPair.from_adapter(tuned, hook=HOOK).capture(batch())
    for merged in (False, True):
        pair = ModelPair.load(
            saved / "base", adapter=saved / "adapter", hook=HOOK, attention="eager", merged=merged
        )
        assert torch.allclose(pair.capture(batch()), expected, atol=1e-5)
        told = pair.description()
        assert (told["base"].get("adapter_name"), told["tuned"]["adapter_name"]) == (None, "adapter")
    (saved / "adapter" / "adapter_model.safetensors").rename(saved / "adapter" / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match=r"no adapter_model\.safetensors"):
        ModelPair.load(saved / "base", adapter=saved / "adapter", hook=HOOK)


def test_a_missing_library_is_named_with_the_extra_that_brings_it(saved, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r'pip install "tl-crosscoder\[peft\]"'):
        ModelPair.load(saved / "base", adapter=saved / "adapter", hook=HOOK)


def test_weights_that_are_not_safetensors_are_refused(saved):
    (saved / "base" / "model.safetensors").rename(saved / "base" / "pytorch_model.bin")
    with pytest.raises(OSError, match=r"model\.safetensors"):
        ModelPair.load(saved / "base", saved / "tuned", hook=HOOK)


def test_a_pair_that_cannot_be_is_refused_before_any_weight_is_read(saved):
    for weights in saved.rglob("model*.safetensors"):
        weights.unlink()
    with pytest.raises(HookNotFound, match="3 blocks"):
        ModelPair.load(saved / "base", saved / "tuned", hook="blocks.7.hook_resid_post")
    config = json.loads((saved / "tuned" / "config.json").read_text())
    (saved / "tuned" / "config.json").write_text(json.dumps(config | {"hidden_size": 32}))
    with pytest.raises(PairMismatch, match="width 16 and tuned 32"):
        ModelPair.load(saved / "base", saved / "tuned", hook=HOOK)


def test_load_wants_either_a_model_or_an_adapter(saved):
    with pytest.raises(
        ValueError, match="either a tuned model or an adapter, got tuned=None and adapter=None"
    ):
        ModelPair.load(saved / "base", hook=HOOK)
    with pytest.raises(ValueError, match="dtype must be one of torch's"):
        ModelPair.load(saved / "base", saved / "tuned", hook=HOOK, dtype="half16")


def test_the_description_is_json_and_names_no_local_path(saved):
    pair = ModelPair.load(saved / "base", saved / "tuned", hook=HOOK)
    text = json.dumps(pair.description())
    assert str(saved) not in text
    told = json.loads(text)
    assert (told["base"]["name"], told["tuned"]["name"]) == ("base", "tuned")
    assert told["hook"] == HOOK
    assert told["base"]["class"] == "LlamaForCausalLM"
    assert told["base"]["backend"] == "HookBackend"
    assert told["base"]["dtype"] == "float32"
    assert told["base"]["attention"] == "sdpa"
    assert told["base"]["adapter"] is None


def test_a_hub_name_is_kept_whole():
    model = tiny_llama_model()
    model.config._name_or_path = "someone/some-model"
    model.config._commit_hash = "abc"
    told = describe_model(HookBackend(model))
    assert (told["name"], told["revision"]) == ("someone/some-model", "abc")


def test_the_fingerprint_follows_weights_config_hook_and_roles():
    pair = pair_of()
    assert pair.fingerprint == pair_of().fingerprint
    assert pair.fingerprint == ModelPair(copy.deepcopy(pair.base.model), pair.tuned, hook=HOOK).fingerprint
    others = [
        ModelPair(pair.tuned, pair.base, hook=HOOK),
        pair_of(hook="blocks.2.hook_resid_post"),
        ModelPair(tiny_llama_model(0), tiny_llama_model(2), hook=HOOK),
        pair_of("gpt2"),
    ]
    changed = tiny_llama_model(1)
    changed.config.rms_norm_eps *= 2
    others.append(ModelPair(pair.base, changed, hook=HOOK))
    nudged = tiny_llama_model(1)
    nudged.model.layers[0].mlp.up_proj.weight.data.mul_(1.001)
    others.append(ModelPair(pair.base, nudged, hook=HOOK))
    assert len({pair.fingerprint, *(other.fingerprint for other in others)}) == 7


def test_gpt2_pairs_work_through_two_different_libraries():
    plain = ModelPair(tiny_gpt2_model(0), tiny_gpt2_model(1), hook=HOOK)
    mixed = ModelPair(bridged(tiny_gpt2_model(0)), tiny_gpt2_model(1), hook=HOOK)
    mask = batch().attention_mask
    assert torch.allclose(plain.capture(batch())[mask], mixed.capture(batch())[mask], atol=1e-5)
