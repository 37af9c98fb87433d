"""For each latent the few of its firings that are wanted, out of a stream of many."""

import numpy as np
import pandas as pd


class Pool:
    """The ``n`` rows with the largest ``key`` of each latent, of all that were added.

    A random key makes it a fair sample, the activation as key its strongest examples.  Memory is in proportion to n times
    the latents that were added, not to the stream.
    """

    def __init__(self, n: int):
        self.n, self.kept, self.new, self.held = n, pd.DataFrame(), [], 0

    def add(self, latent: np.ndarray, key: np.ndarray, **columns: np.ndarray) -> None:
        """Rows of equal length; the same columns every time."""
        if len(latent):
            self.new.append(pd.DataFrame({"latent": latent, "key": key, **columns}))
            self.held += len(latent)
        if self.held > 2 * len(self.kept) + 100_000:
            self._prune()

    def table(self) -> pd.DataFrame:
        """``latent, key`` and the further columns; by latent, the largest key first."""
        self._prune()
        return self.kept

    def _prune(self) -> None:
        if not self.new:
            return
        rows = pd.concat([self.kept, *self.new] if len(self.kept) else self.new, ignore_index=True)
        rows = rows.sort_values(["latent", "key"], ascending=[True, False], kind="stable")
        self.kept = rows.groupby("latent", sort=False).head(self.n).reset_index(drop=True)
        self.new, self.held = [], 0
