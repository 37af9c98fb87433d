"""Errors a caller may want to catch.

::

    CrosscoderError
    ├── ShapeMismatch     (ValueError)   a tensor with the wrong axes
    ├── HookNotFound      (LookupError)  a hook name this model does not have
    ├── PairMismatch      (ValueError)   two models, or models and data, that do not belong together
    ├── NonFiniteActs     (ValueError)   NaN or Inf in the activations, with the place
    ├── CorruptFile       (OSError)      a file that is truncated, altered or hostile
    ├── UnreadableFormat  (ValueError)   files of no known format, or that say too little to be read
    ├── NotSaved          (OSError)      a checkpoint that could not be written, such as on a full disk
    ├── InUse             (OSError)      a folder that another process is writing to
    ├── EmptyData         (ValueError)   no tokens where some are needed
    ├── JudgeFailed       (OSError)      a language model asked to judge refuses, or answers nothing at all
    └── HubError          (OSError)      the Hub refused, or failed however often it was asked
        ├── HubUnreachable               no answer, offline, or not in the cache
        └── HubConflict                  someone else changed the repository at the same time

Everything else is a standard exception.  Each message says what came, what was wanted and what to do.
"""


class CrosscoderError(Exception):
    """Anything this library raises on purpose."""


class ShapeMismatch(CrosscoderError, ValueError):
    """A tensor with the wrong axes."""


class HookNotFound(CrosscoderError, LookupError):
    """A hook name this model does not have."""


class PairMismatch(CrosscoderError, ValueError):
    """Two models, or models and data, that do not belong together."""


class NonFiniteActs(CrosscoderError, ValueError):
    """NaN or Inf in the activations; the message names model, sequence and position."""


class CorruptFile(CrosscoderError, OSError):
    """A file that is truncated, altered or hostile."""


class UnreadableFormat(CrosscoderError, ValueError):
    """Files of no known format, of one that says too little, or of one that no Crosscoder can express."""


class NotSaved(CrosscoderError, OSError):
    """A checkpoint that could not be written, such as on a full disk; those before it are whole."""


class InUse(CrosscoderError, OSError):
    """A folder that another process is writing to; the message says which."""


class EmptyData(CrosscoderError, ValueError):
    """No tokens where some are needed."""


class JudgeFailed(CrosscoderError, OSError):
    """A judge that refuses, or answers nothing at all; what it had judged before is kept."""


class HubError(CrosscoderError, OSError):
    """The Hub refused, or failed however often it was asked; the message says what to do."""


class HubUnreachable(HubError, ConnectionError):
    """No answer from the Hub, or offline, where the cache does not hold what was asked for."""


class HubConflict(HubError):
    """Someone else changed the repository at the same time; nothing of ours was written."""
