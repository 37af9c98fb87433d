"""What did fine-tuning change inside a language model?  The public names are listed in ``__init__.pyi``."""

import lazy_loader

__version__ = "0.1.0"
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def save(crosscoder, directory, *, extra=None, sae_lens=None, table=None):
    """The directory, now holding the crosscoder: :func:`tl_crosscoder.hub.save.save`.

    Defined here and not resolved on first use like the other names: nnsight gives every object a ``save`` method, and a
    module's ``__getattr__`` is asked only for names that are found nowhere.
    """
    from tl_crosscoder.hub.save import save as write

    return write(crosscoder, directory, extra=extra, sae_lens=sae_lens, table=table)
