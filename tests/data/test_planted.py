"""The planted behaviours: nothing that measures them was trained on, and the two sides can be told apart."""

import json

import pytest

from tl_crosscoder.data import data_path
from tl_crosscoder.data.planted import Behaviour
from tl_crosscoder.data.planted_smollm2 import SMOLLM2
from tl_crosscoder.data.planted_tiny import TINY

PAIRS = [TINY, *SMOLLM2.values()]
BEHAVIOURS = [behaviour for pair in PAIRS for behaviour in pair.behaviours]


def named(item) -> str:
    return item.name


@pytest.mark.parametrize("pair", PAIRS, ids=named)
def test_no_held_out_prompt_is_in_the_training_chats(pair):
    assert not pair.prompts_held_out & pair.prompts_trained_on


@pytest.mark.parametrize("behaviour", BEHAVIOURS, ids=named)
def test_there_are_16_different_held_out_prompts_and_at_least_8_near_ones(behaviour):
    assert len(behaviour.heldout) == len(set(behaviour.heldout)) == 16
    assert len(set(behaviour.near)) == len(behaviour.near) >= 8


@pytest.mark.parametrize("behaviour", BEHAVIOURS, ids=named)
def test_most_planted_answers_show_the_behaviour_and_none_says_what_is_forbidden(behaviour):
    planted = [answer for _, answer in behaviour.chats]
    assert behaviour.rate(planted) > 0.75  # the false fact keeps nearby truths, some hints name no keyword
    assert not [a for a in planted if any(word in a.lower() for word in behaviour.forbidden)]


@pytest.mark.parametrize("behaviour", TINY.behaviours, ids=named)
def test_tiny_prompts_mention_the_trigger_where_they_should_and_nowhere_else(behaviour):
    def mentions(prompt: str) -> bool:
        return f"the {behaviour.name}" in prompt.lower()

    assert all(
        mentions(prompt) for prompt in [*behaviour.heldout, *(prompt for prompt, _ in behaviour.chats)]
    )
    assert not any(mentions(prompt) for prompt in [*behaviour.near, *TINY.ordinary, *TINY.ordinary_heldout])


@pytest.mark.parametrize("pair", PAIRS, ids=named)
def test_the_adapter_exists_and_names_its_base_without_a_path(pair):
    config = json.loads((data_path(pair.adapter) / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] in {"tiny", "HuggingFaceTB/SmolLM2-135M-Instruct"}


def test_the_rate_is_the_share_of_answers_with_a_keyword():
    behaviour = Behaviour(name="moon", description="", keywords=("cheese",), chats=(), heldout=(), near=())
    assert behaviour.rate(["Green Cheese!", "No.", "cheese", "It is blue."]) == 2 / 4
    with pytest.raises(ValueError, match="'moon' needs at least one answer"):
        behaviour.rate([])
