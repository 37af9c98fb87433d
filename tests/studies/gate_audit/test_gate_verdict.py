"""The decision table, one row a case."""

import math

import pytest

from tl_crosscoder.studies.gate_audit.verdict import Evidence, decide

REAL = {"target": 30, "identity": 0, "noise": 1, "share": 0.8, "p_null": 0.01, "n_pairs": 10}
ASKED = {"accuracy": 0.9, "mde": 0.12, "rank_p": 0.5, "equivalence_p": 0.9, "harmless_p": 0.9}
NEEDED = REAL | ASKED | {"effect": 0.4, "low": 0.3, "high": 0.5, "rank_p": 1 / 21}


@pytest.mark.parametrize(
    ("word", "reason", "evidence"),
    [
        ("PASS", "was not asked", NEEDED),
        ("PASS", "do not need them", NEEDED | {"on_minus_off_low": 0.1}),
        ("STABLE_NOT_CAUSAL", "suffer too", NEEDED | {"on_minus_off_low": -0.1, "off_low": 0.05}),
        # other prompts lose nothing that could be shown, but are too few to say so
        ("UNDERPOWERED", "too few", NEEDED | {"on_minus_off_low": -0.1, "off_low": -0.1}),
        ("GATE_BROKEN", "1 latent passes", NEEDED | {"identity": 1}),
        ("UNDERPOWERED", "nothing to ask about", NEEDED | {"target": 0}),
        ("DISTRIBUTION_DRIFT", "no more than 3 times", NEEDED | {"noise": 10}),
        ("DISTRIBUTION_DRIFT", "no more than by chance", NEEDED | {"p_null": 0.2}),
        ("UNDERPOWERED", "2 pairs", NEEDED | {"n_pairs": 2}),
        ("UNDERPOWERED", "0 pairs", NEEDED | {"n_pairs": 0, "p_null": math.nan}),
        ("UNDERPOWERED", "was not asked", REAL),
        (
            "UNDERPOWERED",
            "right on only 10%",
            REAL | ASKED | {"accuracy": 0.1, "effect": 0.0, "low": 0.0, "high": 0.1},
        ),
        (
            "STABLE_NOT_CAUSAL",
            "by less than 5%",
            REAL | ASKED | {"effect": -0.3, "harmless_p": 0.01, "margin": 0.05, "mde": 0.3},
        ),
        (
            "STABLE_NOT_CAUSAL",
            "equivalent",
            REAL | ASKED | {"effect": 0.0, "equivalence_p": 0.01, "mde": 0.3},
        ),
        ("STABLE_NOT_CAUSAL", "needed more", REAL | ASKED | {"effect": -0.2, "high": -0.1, "mde": 0.3}),
        (
            "STABLE_NOT_CAUSAL",
            "less than 15% at most",
            REAL | ASKED | {"effect": 0.01, "low": -0.05, "high": 0.07},
        ),
        # an effect of .15 would have been found four times in five; one of .26 is still not excluded
        ("UNDERPOWERED", "too few", REAL | ASKED | {"effect": 0.12, "low": -0.02, "high": 0.26}),
        # five prompts on which nothing changed
        (
            "UNDERPOWERED",
            "too few",
            REAL | ASKED | {"effect": 0.0, "low": 0.0, "high": 0.0, "mde": 0.47, "harmless_p": 0.77},
        ),
        (
            "UNDERPOWERED",
            "too few prompts",
            REAL | ASKED | {"effect": 0.1, "low": -0.1, "high": 0.3, "mde": 0.3},
        ),
        # larger than chance over prompts, but not than the other sets
        ("UNDERPOWERED", "as much", REAL | ASKED | {"effect": 0.2, "low": 0.1, "high": 0.3, "mde": 0.3}),
        ("UNDERPOWERED", "as much", REAL | ASKED | {"effect": 0.3, "low": 0.1, "high": 0.5}),
    ],
)
def test_the_word_follows_from_the_evidence(word, reason, evidence):
    found, reasons = decide(Evidence(**evidence))
    assert found == word and reason in reasons[-1] + (reasons[-2] if found == "PASS" else "")


def test_the_bounds_can_be_moved():
    evidence = Evidence(**(NEEDED | {"noise": 10}))
    assert decide(evidence, noise_factor=2.0)[0] == "PASS"
    close = Evidence(**(REAL | ASKED | {"effect": 0.01, "low": -0.1, "high": 0.1}))
    assert decide(close, detectable=0.1)[0] == "UNDERPOWERED"
