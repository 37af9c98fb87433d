"""Words that every floor shares: the model axis, the edit, and the names of the axes.

========== =====================================================================
axis       meaning
========== =====================================================================
batch      tokens, flattened; one row is one token seen by every model
model      ``BASE`` = 0, ``TUNED`` = 1 (further models follow)
d_in       width of the residual stream
d_sae      number of latents in the dictionary
seq pos    sequences and positions in a padded batch of text
d_vocab    size of the vocabulary
latent     a chosen subset of the latents
nnz        active (token, latent) pairs of a sparse code
========== =====================================================================
"""

from collections.abc import Callable

from torch import Tensor

BASE, TUNED = 0, 1

#: ``edit(acts, hook=None) -> acts``: pure, never in place.  The same object is a TransformerLens hook function, the right-hand
#: side of an nnsight assignment and, through :func:`tl_crosscoder.interventions.as_forward_hook`, a torch forward hook.
Edit = Callable[..., Tensor]
