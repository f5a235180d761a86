"""Taps on the modules of a decoder, for both engines: what each was given, what it made of it, and what it is given
instead.

Which modules those are is seen from the structure: the children of every decoder layer, and what stands beside the
layers and runs after them (the final norm). A module's input is the first floating-point argument as wide as the
hidden states. With inputs given, every module computes on them, so that nothing that happened before can reach its
output; the residual stream stays the engine's own, the sum of what its modules made of the given inputs.

vLLM's norms add the residual first and return the sum: such a norm gets the given input and a residual of zeros, and
the sum that it would have made is put back in place of the one it returns. Some norms pass a residual on without adding
it (cohere); which of the two it is shows on the residual that comes back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

NORM, ATTENTION, MOE, OTHER = "norm", "attention", "moe", "other"

INPUTS = ("in:", "arg:")
"""How the names of inputs begin; outputs are ``out:``, ``stream:``, ``routed:``, ``router:``, ``rule:``."""

_CACHED = ("past_key_values", "past_key_value", "cache_params", "position_embeddings", "attention_mask")
"""Arguments by which transformers' layers call what mixes positions, and nothing else."""

_PROBE = (64, 2048)  # rows, terms of a sum


def layer_list(model: torch.nn.Module, n_layers: int) -> tuple[torch.nn.Module, torch.nn.ModuleList] | None:
    """What holds the decoder layers, and their list: the first of as many modules as the model has layers."""
    for module in model.modules():
        for child in module.children():
            if isinstance(child, torch.nn.ModuleList) and len(child) == n_layers:
                return module, child
    return None


def is_norm(module: torch.nn.Module) -> bool:
    """A module of vectors only."""
    parameters = list(module.parameters())
    return not any(parameter.dim() > 1 for parameter in parameters) and "norm" in type(module).__name__.lower()


def float32_error(device: torch.device | str) -> float:
    """Largest relative error of a float32 matrix product on a device, against float64: 1e-7 where it is float32, 1e-4
    and more where it is TF32."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(_PROBE, generator=generator)
    b = torch.randn(_PROBE[::-1], generator=generator)
    exact = a.double() @ b.double()
    found = (a.to(device) @ b.to(device)).double().cpu()
    return float((found - exact).norm() / exact.norm())


def rows_of(tensor: torch.Tensor, n_rows: int) -> torch.Tensor:
    """The first rows of a tensor of any leading shape, on the host: later work in place does not reach them."""
    return tensor.detach().reshape(-1, tensor.shape[-1])[:n_rows].to("cpu", copy=True)


def storable(kept: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What was kept, to be read without torch: outputs in float32, inputs as they are."""
    return {
        name: (one.float() if one.is_floating_point() and not name.startswith(INPUTS) else one).contiguous()
        for name, one in kept.items()
    }


def arguments_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[int | str, Any]:
    """What a module is called with, by place or name, in order."""
    arguments: dict[int | str, Any] = dict(enumerate(args))
    arguments.update(kwargs)
    return arguments


class ModuleTaps:
    """Hooks on the modules of every decoder layer while the context is entered.

    Args:
        parent, layers: as :func:`layer_list` has them.
        n_hidden: width of the hidden states.
        given: inputs by place, (T, n_hidden); None = the modules compute on their own, which are kept.
        names: what the given inputs call a module, by decoder layer and this engine's name; None = the same.
    """

    def __init__(
        self,
        parent: torch.nn.Module,
        layers: torch.nn.ModuleList,
        n_hidden: int,
        given: Mapping[str, torch.Tensor] | None = None,
        names: Mapping[tuple[int, str], str] | None = None,
    ) -> None:
        self.parent, self.layers, self.n_hidden = parent, layers, n_hidden
        self.given, self.names = given, names
        self.seen: dict[str, torch.Tensor] = {}
        self.order: list[tuple[int, str, str]] = []
        self.problems: list[str] = []
        self.first_row, self.n_rows = 0, 0
        self._pending: dict[str, tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor]] = {}
        self._is_past_layers = False
        self._handles: list[Any] = []

    def __enter__(self) -> ModuleTaps:
        self._handles.append(self.layers[0].register_forward_pre_hook(self._at_first_layer))
        self._handles.append(self.layers[-1].register_forward_hook(self._after_last_layer))
        for layer, module in enumerate(self.layers):
            for name, child in module.named_children():
                self._tap(layer, name, child)
        for name, child in self.parent.named_children():
            if child is not self.layers:
                self._tap(len(self.layers), name, child)
        return self

    def __exit__(self, *exc: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def begin(self, first_row: int, n_rows: int) -> None:
        """Before a forward: it computes rows ``first_row`` and so many of the sequence; 0 = not looked at."""
        self.first_row, self.n_rows = first_row, n_rows
        self._pending.clear()
        self._is_past_layers = False

    def keep(self, name: str, rows: torch.Tensor) -> None:
        """Keep rows of the step under a name; those of further steps are put behind them."""
        part = rows_of(rows, self.n_rows)
        known = self.seen.get(name)
        self.seen[name] = part if known is None else torch.cat([known, part])

    def given_rows(self, name: str, like: torch.Tensor) -> torch.Tensor | None:
        """The given rows of this step, in the dtype and on the device of a tensor; None where there are none."""
        found = None if self.given is None else self.given.get(name)
        if found is None:
            return None
        return found[self.first_row : self.first_row + self.n_rows].to(like.device, like.dtype)

    def _at_first_layer(self, module: torch.nn.Module, args: Any) -> None:
        self._is_past_layers = False

    def _after_last_layer(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        self._is_past_layers = True

    def _tap(self, layer: int, name: str, module: torch.nn.Module) -> None:
        called = name if self.names is None else self.names.get((layer, name))
        if called is None or isinstance(module, torch.nn.ModuleList):
            return
        key = f"{layer}.{called}"
        before, after = self._before(layer, called, key), self._after(key)
        self._handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        self._handles.append(module.register_forward_hook(after, with_kwargs=True))

    def _before(self, layer: int, name: str, key: str) -> Callable[..., Any]:
        def hook(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if not self.n_rows or (layer == len(self.layers) and not self._is_past_layers) or key in self._pending:
                return None
            places = self._hidden_places(args, kwargs)
            if not places:
                return None
            arguments = arguments_of(args, kwargs)
            hidden = arguments[places[0]]
            has_residual = is_norm(module) and len(places) > 1
            residual = arguments[places[1]] if has_residual else None
            own, passed = hidden.clone(), None if residual is None else residual.clone()  # norms work in place
            self._pending[key] = (own, passed, own)
            if (layer, name) not in [entry[:2] for entry in self.order]:
                self.order.append((layer, name, _kind(module, kwargs)))
            rows = self.given_rows(f"in:{key}", hidden)
            if rows is None:
                if self.given is None:
                    self.keep(f"in:{key}", hidden)
                return None
            changed = hidden.clone()
            changed.view(-1, self.n_hidden)[: self.n_rows] = rows
            arguments[places[0]] = changed
            if residual is not None:
                arguments[places[1]] = torch.zeros_like(residual)
            self._pending[key] = (own, passed, changed.clone())
            return tuple(arguments[i] for i in range(len(args))), {name: arguments[name] for name in kwargs}

        return hook

    def _after(self, key: str) -> Callable[..., Any]:
        def hook(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            pending = self._pending.get(key)
            if pending is None or pending[0] is None:
                return None
            own, residual, used = pending[0], pending[1], pending[2]
            self._pending[key] = (None, None, used)  # a second call in one forward is not looked at
            parts = output if isinstance(output, tuple | list) else (output,)
            wide = [part for part in parts if self._is_hidden(part)]
            if not wide and output is None:  # written into an argument
                arguments = arguments_of(args, kwargs)
                wide = [arguments[place] for place in self._hidden_places(args, kwargs)[1:]]
            if not wide:
                return None
            self.keep(f"out:{key}", wide[0])
            if not is_norm(module):
                return None
            total = own
            is_added = False
            if residual is not None and len(wide) > 1:
                expected = own + residual if used is own else used
                is_added = bool(torch.isclose(wide[1], expected, equal_nan=True).all())
                total = own + residual if is_added else own
            self.keep(f"stream:{key}", total)
            if residual is None or len(parts) < 2 or self.given is None:
                return None
            return (parts[0], total if is_added else residual, *parts[2:])

        return hook

    def _hidden_places(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[int | str]:
        arguments = arguments_of(args, kwargs)
        return [place for place, value in arguments.items() if self._is_hidden(value)]

    def _is_hidden(self, value: Any) -> bool:
        return (
            isinstance(value, torch.Tensor)
            and value.is_floating_point()
            and value.dim() in (2, 3)
            and value.shape[-1] == self.n_hidden
            and value.numel() >= self.n_rows * self.n_hidden
        )


def _kind(module: torch.nn.Module, kwargs: dict[str, Any]) -> str:
    if is_norm(module):
        return NORM
    if any(isinstance(getattr(one, "experts", None), torch.nn.Module) for one in module.modules()):
        return MOE
    return ATTENTION if any(name in kwargs for name in _CACHED) else OTHER


def paired_names(
    order: Sequence[tuple[int, str, str]], parent: torch.nn.Module, layers: torch.nn.ModuleList
) -> tuple[dict[tuple[int, str], str], list[str], list[str]]:
    """What another engine's record calls the modules of this one: the same name, or the only ones left of their kind.

    Args:
        order: decoder layer, name and kind of the other engine's modules, in the order in which they ran.

    Returns:
        Name there by decoder layer and name here; the modules there that have no counterpart here, and those here that
        have none there.
    """
    names: dict[tuple[int, str], str] = {}
    alone, extra = [], []
    for layer in sorted({entry[0] for entry in order}):
        there = {name: kind for one, name, kind in order if one == layer}
        owner = layers[layer] if layer < len(layers) else parent
        here = {name: child for name, child in owner.named_children() if child is not layers}
        names.update({(layer, name): name for name in there if name in here})
        for of_norms in (True, False):
            left = [name for name, kind in there.items() if name not in here and (kind == NORM) == of_norms]
            spare = [
                name
                for name, child in here.items()
                if name not in there and is_norm(child) == of_norms and any(True for _ in child.parameters())
            ]
            if len(left) == len(spare):
                names.update({(layer, mine): other for mine, other in zip(spare, left, strict=True)})
            else:
                alone += [f"{layer}.{name}" for name in left]
                extra += [f"{layer}.{name}" for name in spare if layer < len(layers)]
    return names, alone, extra
