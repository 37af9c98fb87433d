"""A question asked of a crosscoder and a pair, answered with controls.  A new study: its file, and its line here."""

from tl_crosscoder.studies import (
    activation_difference,
    attribution,
    behaviour,
    causal_equivalence,
    explain,
    gate_audit,
    mirror_pairs,
    scaling,
    stability,
    steering,
    substitution,
    synthetic_benchmark,
    template_tokens,
)
from tl_crosscoder.studies.result import StudyResult

__all__ = [
    "StudyResult",
    "activation_difference",
    "attribution",
    "behaviour",
    "causal_equivalence",
    "explain",
    "gate_audit",
    "mirror_pairs",
    "scaling",
    "stability",
    "steering",
    "substitution",
    "synthetic_benchmark",
    "template_tokens",
]
