"""Where in a model to read: a layer of the residual stream, before or after it."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from tl_crosscoder.errors import HookNotFound
from tl_crosscoder.types import Edit

_POINTS = {"hook_resid_post": "post", "hook_out": "post", "hook_resid_pre": "pre", "hook_in": "pre"}
_NAME = re.compile(r"blocks\.(\d+)\.(\w+)")
_PATHS = (
    "model.layers",
    "transformer.h",
    "gpt_neox.layers",
    "model.decoder.layers",
    "model.language_model.layers",
    "language_model.model.layers",
    "transformer.blocks",
)


@dataclass(frozen=True)
class Site:
    """The residual stream before (``pre``) or after (``post``) one block."""

    layer: int
    point: Literal["pre", "post"]

    @property
    def name(self) -> str:
        """The name TransformerLens gives it; both of its classes know it."""
        return f"blocks.{self.layer}.hook_resid_{self.point}"


def parse_hook(hook: object, n_layers: int) -> Site:
    """The site that ``blocks.L.hook_resid_post`` or ``hook_resid_pre`` names.

    TransformerLens' newer spellings ``hook_out`` and ``hook_in`` mean the same two points.
    """
    match = _NAME.fullmatch(hook) if isinstance(hook, str) else None
    if match is None or match[2] not in _POINTS:
        raise HookNotFound(
            f"no hook named {hook!r}: the residual stream is read at 'blocks.L.hook_resid_post' or "
            f"'blocks.L.hook_resid_pre', L from 0 to {n_layers - 1}"
        )
    layer = int(match[1])
    if layer >= n_layers:
        raise HookNotFound(f"this model has no hook {hook!r}; it has {n_layers} blocks, so 0..{n_layers - 1}")
    return Site(layer, "post" if _POINTS[match[2]] == "post" else "pre")


def in_order(hooks: Iterable[str], n_layers: int) -> dict[Site, str]:
    """Sites in the order a forward pass reaches them, each with the name the caller used."""
    named: dict[Site, str] = {}
    for hook in hooks:
        site = parse_hook(hook, n_layers)
        if site in named:
            raise ValueError(f"{named[site]!r} and {hook!r} are one place; compose their two edits into one")
        named[site] = hook
    return dict(sorted(named.items(), key=lambda item: (item[0].layer, item[0].point == "post")))


def edits_in_order(edits: Mapping[str, Edit], n_layers: int) -> list[tuple[Site, Edit]]:
    """Each edit with its site, in the order a forward pass reaches them."""
    return [(site, edits[hook]) for site, hook in in_order(edits, n_layers).items()]


def decoder_layers(model: nn.Module, path: str | None = None) -> tuple[str, nn.ModuleList]:
    """The path and the list of the model's decoder blocks.

    Known places first, then the only module list as long as the config says; ``path`` names it outright.
    """
    if path is not None:
        return path, _module_list(model.get_submodule(path), path)
    for known in (f"{prefix}{path}" for prefix in ("", "base_model.model.") for path in _PATHS):
        found = _submodule(model, known)
        if isinstance(found, nn.ModuleList):
            return known, found
    wanted = _n_layers(model)
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    right = [(name, module) for name, module in lists.items() if len(module) == wanted]
    if len(right) == 1:
        return right[0]
    raise ValueError(
        f"cannot tell which part of {type(model).__name__} holds its {wanted} decoder blocks; candidates: "
        f"{', '.join(f'{name} ({len(module)})' for name, module in lists.items()) or 'none'}; "
        "pass layers='the.path'"
    )


def _submodule(model: nn.Module, path: str) -> nn.Module | None:
    found: object = model
    for part in path.split("."):
        found = getattr(found, "_modules", {}).get(part)
    return found if isinstance(found, nn.Module) else None


def _module_list(module: nn.Module, path: str) -> nn.ModuleList:
    if not isinstance(module, nn.ModuleList):
        raise ValueError(f"{path!r} is a {type(module).__name__}, wanted the ModuleList of decoder blocks")
    return module


def _n_layers(model: Any) -> int | None:
    config = getattr(model, "config", None)
    text = config.get_text_config() if config is not None and hasattr(config, "get_text_config") else config
    return getattr(text, "num_hidden_layers", None)
