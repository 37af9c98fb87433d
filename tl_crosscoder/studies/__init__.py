"""A question asked of a crosscoder and a pair, answered with controls.  A new study: its file, and its line here."""

from tl_crosscoder.studies import activation_difference, behaviour, scaling, steering, substitution
from tl_crosscoder.studies.result import StudyResult

__all__ = ["StudyResult", "activation_difference", "behaviour", "scaling", "steering", "substitution"]
