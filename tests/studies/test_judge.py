import pytest

from tl_crosscoder.data.planted import Behaviour
from tl_crosscoder.studies.judge import Claim, Explainer, Judge, KeywordJudge, Passage, TokenJudge


def test_the_keyword_rule_is_that_of_the_behaviour():
    behaviour = Behaviour(name="moon", keywords=("cheese", "brie"), heldout=("?",))
    answers = ["It is CHEESE.", "chee", "some brie", ""]
    verdicts = KeywordJudge().holds(Claim.of(behaviour), [Passage((a,)) for a in answers])
    assert (
        [v.holds for v in verdicts] == [behaviour.shown_in(a) for a in answers] == [True, False, True, False]
    )


def test_tokens_are_named_heaviest_first_until_they_carry_the_share():
    # mass: moon 6 + 2 = 8, " is" 3, "." 1 of 12; 80 % of 12 is 9.6, which moon and " is" reach
    examples = [Passage((" moon", " is", "a"), (6.0, 3.0, 0.0)), Passage((" moon", "."), (2.0, 1.0))]
    claim = TokenJudge().describe(examples)
    assert claim == Claim("fires on ‹ moon›, ‹ is›", (" moon", " is"))
    assert TokenJudge(most=1).describe(examples) == Claim("fires on ‹ moon›", (" moon",))
    assert TokenJudge().describe([Passage(("a",), (0.0,))]) is None


def test_a_token_claim_holds_of_whole_tokens_only():
    claim = Claim("fires on ‹an›", ("an",))
    verdicts = TokenJudge().holds(claim, [Passage(("an",)), Passage(("ban", "ana")), Passage(("b", "an"))])
    assert [v.holds for v in verdicts] == [True, False, True]


def test_a_rule_without_words_is_refused_not_answered_no():
    for judge in (KeywordJudge(), TokenJudge()):
        with pytest.raises(ValueError, match=r"words|tokens"):
            judge.holds(Claim("something"), [Passage(("a",))])


def test_the_rules_are_judges_and_the_token_rule_explains():
    assert isinstance(KeywordJudge(), Judge) and isinstance(TokenJudge(), Judge)
    assert isinstance(TokenJudge(), Explainer) and not isinstance(KeywordJudge(), Explainer)


def test_a_passage_marks_its_active_tokens_and_wants_an_activation_each():
    assert Passage(("a", " b", " c"), (0.0, 1.0, 2.0)).marked == "a« b c»"
    with pytest.raises(ValueError, match="2 tokens, 1 activations"):
        Passage(("a", "b"), (1.0,))
