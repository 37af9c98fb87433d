"""The same training step as dense products, written out plainly."""

import torch
import torch.nn.functional as F
from contenders import Contender, Start
from torch import Tensor

from tl_crosscoder.dictionary.sparse_ops import flat_nonzero


class Dense(Contender):
    """The same mathematics as dense products over all latents, with nothing clever but the fused Adam."""

    key, title = "dense", "own dense step, fp32"
    autocast = False

    def __init__(self, start: Start, lr: float):
        self.k, self.dead, self.n_models = start.k, start.dead.nonzero()[:, 0], start.W_dec.shape[1]
        parts = start.W_enc.flatten(1), start.b_enc, start.W_dec.flatten(1), start.b_dec.flatten()
        self.parameters = [part.clone().requires_grad_() for part in parts]
        self.optimizer = torch.optim.Adam(self.parameters, lr=lr, fused=True)

    def step(self, x: Tensor) -> Tensor:
        y = x.flatten(1)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.autocast):
            pre_acts, _, recon = self._forward(y)
            residual = y - recon
            loss = mse = residual.square().sum() / len(y)
            if len(self.dead):
                loss = mse + self._auxk(pre_acts, residual.detach()) / 32
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        return mse.detach()

    def _forward(self, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        W_enc, b_enc, W_dec, b_dec = self.parameters
        pre_acts = F.linear(y, W_enc, b_enc)
        scores = pre_acts.detach().relu() * self._norms()
        kept = self._largest(scores.flatten(), self.k * len(y))
        mask = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
        mask[kept] = True
        acts = pre_acts.where(mask.view_as(scores), 0)
        return pre_acts, acts, acts @ W_dec + b_dec

    def _largest(self, scores: Tensor, count: int) -> Tensor:
        """Where the ``count`` largest scores are."""
        return scores.topk(count, sorted=False).indices

    def _auxk(self, pre_acts: Tensor, residual: Tensor) -> Tensor:
        acts = pre_acts[:, self.dead].relu()
        k_aux = min(residual.shape[1] // self.n_models // 2, len(self.dead))
        scores = acts.detach() * self._norms()[self.dead]
        chosen = scores.topk(k_aux, dim=-1, sorted=False).indices
        acts = torch.zeros_like(acts).scatter(1, chosen, acts.gather(1, chosen))
        return (residual - acts @ self.parameters[2][self.dead]).square().sum() / len(residual)

    def _norms(self) -> Tensor:
        """The sum of each latent's decoder norms."""
        return self.parameters[2].detach().unflatten(1, (self.n_models, -1)).norm(dim=-1).sum(1)

    @torch.no_grad()
    def l0(self, x: Tensor) -> float:
        return self._forward(x.flatten(1))[1].count_nonzero().item() / len(x)


class DenseBf16(Dense):
    """Products in bfloat16."""

    key, title = "dense-bf16", "own dense step, bf16 autocast"
    autocast = True


class DenseBf16Guess(DenseBf16):
    """The strongest dense step.  Finding the largest of all scores takes a third of the plain one; here only those above nine
    tenths of the smallest one kept before are looked at.
    """

    key, title = "dense-bf16-guess", "own dense step, bf16, guessed threshold"
    guess = 0.0

    def _largest(self, scores: Tensor, count: int) -> Tensor:
        candidates = flat_nonzero(scores > self.guess)
        if len(candidates) < count:
            candidates = flat_nonzero(scores > 0)
        values, chosen = scores[candidates].topk(min(count, len(candidates)), sorted=False)
        self.guess = 0.9 * values.min().item()
        return candidates[chosen]
