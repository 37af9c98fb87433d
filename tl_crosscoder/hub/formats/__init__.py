"""How crosscoders are kept by this library and by others.  A new format is a file and a line here.

Which one a folder is in is seen from its tensors and settings, in this order, never from names of files or repositories.
"""

from tl_crosscoder.hub.formats.antebe import Antebe
from tl_crosscoder.hub.formats.base import Conventions, Format, Given
from tl_crosscoder.hub.formats.crosscode import Crosscode
from tl_crosscoder.hub.formats.dictionary_learning import DictionaryLearning
from tl_crosscoder.hub.formats.heterogeneous import Heterogeneous
from tl_crosscoder.hub.formats.kissane import Kissane
from tl_crosscoder.hub.formats.llamascopium import Llamascopium
from tl_crosscoder.hub.formats.native import Native
from tl_crosscoder.hub.formats.papergrade import Papergrade
from tl_crosscoder.hub.formats.sae_lens import SaeLens
from tl_crosscoder.hub.formats.sae_lens_layers import SaeLensLayers
from tl_crosscoder.hub.formats.two_widths import TwoWidths

FORMATS: tuple[Format, ...] = (
    Native(), SaeLens(), DictionaryLearning(), Heterogeneous(), Llamascopium(), Crosscode(), Antebe(), SaeLensLayers(),
    Papergrade(), Kissane(), TwoWidths(),
)  # fmt: skip

__all__ = ["FORMATS", "Conventions", "Format", "Given"]
