"""Two models run as one, with one hook: where the activations of both lie side by side."""

from types import SimpleNamespace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from sae_lens import SAE, HookedSAETransformer
from torch import Tensor, nn
from transformer_lens.hook_points import HookedRootModule, HookPoint

from tl_crosscoder.errors import HookNotFound
from tl_crosscoder.hub.sae_lens.native.metadata import attaching_to_both
from tl_crosscoder.models.pair import ModelPair
from tl_crosscoder.models.tokens import TokenBatch
from tl_crosscoder.types import TUNED


class JointModel(HookedRootModule):
    """A model whose residual stream at ``hook`` is that of base and tuned side by side, [seq, pos, 2 · d_in], base first.

    Its logits are those of ``model`` (0 base, 1 tuned), computed with its half of what the hook leaves; the other half changes
    nothing.  Everything that SAE-Lens does with a model and an SAE it does with this one and a crosscoder: ``run_with_saes``,
    ``run_evals``, ``ActivationsStore``, ``LanguageModelSAETrainingRunner(override_model=...)``.  No gradients flow.
    """

    pair: ModelPair

    def __init__(self, pair: ModelPair, model: int = TUNED):
        super().__init__()
        if model not in (0, 1):
            raise ValueError(f"model is 0 (base) or 1 (tuned), got {model!r}")
        # not as submodules: their hooks would change their names
        self.__dict__["pair"] = pair
        self.out, self.hook, self.tokenizer = model, pair.hook, pair.tokenizer
        device = (pair.base, pair.tuned)[model].device
        self.cfg = SimpleNamespace(device=device, d_model=2 * pair.d_in, model_name="joint")
        _, layer, name = pair.hook.split(".")
        self.blocks = nn.ModuleList([nn.Module() for _ in range(int(layer) + 1)])
        self.blocks[int(layer)].add_module(name, HookPoint())
        self._acts_to_saes: dict[str, Any] = {}
        self._transcoder_output_hooks: dict[str, str] = {}
        self.setup()

    def forward(
        self,
        tokens: Int[Tensor, "seq pos"],
        *,
        return_type: Literal["logits", "loss", "both"] | None = "logits",
        loss_per_token: bool = False,
        attention_mask: Tensor | None = None,
        stop_at_layer: int | None = None,
        prepend_bos: bool = False,
    ) -> Any:
        """Logits, or the loss of predicting each next token, or both; where to stop: the joint activations.

        ``tokens`` are ids, with BOS if the models want it.  Arguments it does not know raise TypeError.
        """
        if prepend_bos:
            raise ValueError("the tokens are ids already: prepend BOS to them, and pass prepend_bos=False")
        batch = TokenBatch.from_ids(tokens, attention_mask)
        own, other = self.pair.sides(("base", "tuned")[self.out])
        theirs = other.capture(batch, self.hook)
        with self._token_masks(tokens, {}):
            if stop_at_layer is not None:
                return self._both(own.capture(batch, self.hook), theirs)
            seen: list[Tensor] = []

            def splice(acts: Tensor, hook: Any = None) -> Tensor:  # noqa: ARG001
                seen.append(acts)
                return self._both(acts, theirs).unflatten(-1, (2, -1))[..., self.out, :]

            logits = own.run(batch, {self.hook: splice})
        if not seen:
            raise RuntimeError(f"the model ran without passing {self.hook!r}")
        if return_type in (None, "logits"):
            return logits if return_type else None
        loss = next_token_loss(logits, tokens)
        loss = loss if loss_per_token else loss.mean()
        return loss if return_type == "loss" else (logits, loss)

    def to_tokens(
        self,
        text: str | list[str],
        *,
        prepend_bos: bool = True,
        truncate: bool = True,  # noqa: ARG002 - nothing is cut
        move_to_device: bool = True,
        padding_side: Literal["left", "right"] = "right",
    ) -> Int[Tensor, "seq pos"]:
        """Ids of text; texts of different lengths are padded with EOS."""
        texts = [text] if isinstance(text, str) else text
        bos = [self.tokenizer.bos_token_id] if prepend_bos and self.tokenizer.bos_token_id is not None else []
        rows = [bos + self.tokenizer(one, add_special_tokens=False)["input_ids"] for one in texts]
        width = max(map(len, rows))
        pad = [[self.tokenizer.eos_token_id] * (width - len(row)) for row in rows]
        filled = [p + r if padding_side == "left" else r + p for r, p in zip(rows, pad, strict=True)]
        return torch.tensor(filled, device=self.cfg.device if move_to_device else None)

    def add_sae(self, sae: SAE, use_error_term: bool | None = None, **settings: Any) -> None:
        """As in SAE-Lens, but raises HookNotFound where that would skip the SAE."""
        if (name := sae.cfg.metadata.hook_name) != self.hook:
            raise HookNotFound(
                f"this SAE is for the hook {name!r}; these two models run as one have {self.hook!r}.  If it is the same place, "
                f"set sae.cfg.metadata.hook_name = {self.hook!r}"
            )
        with attaching_to_both():
            HookedSAETransformer.add_sae(self, sae, use_error_term, **settings)  # pyright: ignore[reportArgumentType]

    def run_with_cache_with_saes(self, tokens: Tensor, *, saes: Any = (), **settings: Any) -> Any:
        """What the run returns, and the activations by hook name."""
        with self.saes(saes=saes, **settings):
            return self.run_with_cache(tokens)

    # What SAE-Lens does with wrappers once an SAE is attached asks nothing of a model but its hooks.
    acts_to_saes: Any = HookedSAETransformer.acts_to_saes
    saes: Any = HookedSAETransformer.saes
    reset_saes: Any = HookedSAETransformer.reset_saes
    run_with_saes: Any = HookedSAETransformer.run_with_saes
    run_with_hooks_with_saes: Any = HookedSAETransformer.run_with_hooks_with_saes
    _reset_sae: Any = HookedSAETransformer._reset_sae
    _token_masks: Any = HookedSAETransformer._token_masks
    _compute_exclusion_mask: Any = HookedSAETransformer._compute_exclusion_mask

    def _both(self, own: Tensor, other: Tensor) -> Float[Tensor, "seq pos _"]:
        """The two models' activations, past the hook."""
        halves = [own, other.to(own)]
        joint = torch.cat(halves if self.out == 0 else halves[::-1], dim=-1)
        return self.get_submodule(self.hook)(joint)


def next_token_loss(
    logits: Float[Tensor, "seq pos d_vocab"], tokens: Int[Tensor, "seq pos"]
) -> Float[Tensor, "seq _"]:
    """The cross entropy of each token but the first, in nats."""
    wanted = tokens[:, 1:].to(logits.device)
    return F.cross_entropy(logits[:, :-1].float().transpose(1, 2), wanted, reduction="none")
