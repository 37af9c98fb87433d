"""What SAE-Lens notes of an SAE's dtype and device, kept true."""

from collections.abc import Callable
from typing import Any

from sae_lens import SAE
from sae_lens.util import dtype_to_str


class FollowsPrecision(SAE):
    """``half()``, ``double()`` and ``cuda()`` too move what SAE-Lens notes of dtype and device in ``to()`` alone."""

    def _apply(self, fn: Callable, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self.dtype, self.device = self.W_dec.dtype, self.W_dec.device
        self.cfg.dtype, self.cfg.device = dtype_to_str(self.dtype), str(self.device)
        return self
