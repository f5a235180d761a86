"""vLLM's modules on the inputs that another engine's modules received, inside its worker, in ordinary prefills.

Attention keeps its forward context and its KV cache: only the hidden states that go in are replaced. Routers are given
the other engine's logits (what their rule makes of them), and the experts its choices and gate weights.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from moediag.engines.modules import ModuleTaps, float32_error, layer_list, paired_names, storable
from moediag.engines.vllm.routing import not_on_path

_SAME = 1e-2
"""Relative distance within which a block's output is a number times its experts': rounding to bfloat16 is 4e-3."""
_CALIBRATION_TOKENS = 16


class ModuleRecorder:
    """The modules of one worker on given inputs; set beside the taps that say whose rows a step has.

    Args:
        routers: decoder layer, holder and router of every MoE layer.
        scales: what vLLM multiplies the sum of the experts' outputs by, by MoE layer.
        given: file of another engine's pass.
        order: its modules, in the order in which they ran.
        factors: what a MoE block of vLLM's model multiplies the output of its experts by, shared ones included, by
            decoder layer (cohere averages the two); 1 where it is not told.
        is_free: nothing is given: the engine runs as it is, and its residual streams are kept.
    """

    def __init__(
        self,
        runner: Any,
        routers: Sequence[tuple[int, torch.nn.Module, Any]],
        scales: Sequence[float],
        given: Path,
        order: Sequence[Sequence[Any]],
        factors: Mapping[str, float],
        is_free: bool,
    ) -> None:
        self.runner, self.device = runner, runner.device
        config = runner.model_config.hf_text_config
        found = layer_list(runner.model, config.num_hidden_layers)
        if found is None:
            raise ValueError(f"{type(runner.model).__name__} has no list of {config.num_hidden_layers} decoder layers")
        names, self.alone, self.extra = paired_names(
            [(int(layer), str(name), str(kind)) for layer, name, kind in order], *found
        )
        self.is_free, self.given = is_free, {} if is_free else load_file(given)
        self.taps = ModuleTaps(*found, config.hidden_size, None if is_free else self.given, names)
        self.taps.__enter__()
        self._undo: list[Callable[[], None]] = []
        self.unseen: list[int] = []
        self.factors: dict[str, float] = {}
        if is_free:
            return
        for scale, (layer, module, router) in zip(scales, routers, strict=True):
            if not_on_path(module, router):
                self.unseen.append(layer)
            else:
                self._tap_router(layer, module, router, scale * factors.get(str(layer), 1.0))
            self._tap_block(layer, found[1][layer], module)

    def on_forward(
        self, names: Sequence[str], counts: Sequence[int], positions: torch.Tensor, input_ids: torch.Tensor
    ) -> None:
        """Before the model runs: which rows of the sequence the step computes."""
        if len(counts) != 1:
            self.taps.problems.append(f"{len(counts)} sequences in one step, expected one")
        self.taps.begin(int(positions[0]), int(sum(counts)))

    def end_step(self) -> None:
        """After the model ran: what comes until the next step is none of it."""
        self.taps.begin(0, 0)

    def on_sample(self, logits: torch.Tensor) -> None:
        """Nothing: the head is given its rows by itself."""

    def on_prompt(self, first: int, logits: torch.Tensor) -> None:
        """Nothing."""

    def remove(self) -> None:
        """Take the hooks off."""
        self.taps.__exit__()
        for undo in self._undo:
            undo()
        self._undo = []

    def write(self, output: Path) -> dict[str, Any]:
        """The head on its given rows; then all that was kept to a file."""
        dtype, seen = self.runner.model_config.dtype, self.taps.seen
        if self.is_free:
            seen = {name: one for name, one in seen.items() if name.startswith("stream:")}
        else:
            with torch.inference_mode():
                logits = self.runner.model.compute_logits(self.given["in:head"].to(self.device, dtype))
            seen["out:head"] = logits.float().to("cpu", copy=True)
        save_file(storable(seen), output)
        return {
            "alone": self.alone,
            "extra": self.extra,
            "problems": self.taps.problems[:5],
            "unseen_routers": self.unseen,
            "factors": self.factors,
            "float32_error": float32_error(self.device),
            "dtype": str(dtype).removeprefix("torch."),
        }

    def _tap_block(self, layer: int, decoder: torch.nn.Module, experts: torch.nn.Module) -> None:
        """Measure what the block makes of its experts' output: a number times it."""
        seen: list[torch.Tensor] = []
        block = next((one for one in decoder.children() if any(inner is experts for inner in one.modules())), experts)
        if block is experts:
            return

        def after_experts(module: torch.nn.Module, args: Any, output: Any) -> None:
            seen[:] = [output.detach().double().flatten()] if isinstance(output, torch.Tensor) else []

        def after_block(module: torch.nn.Module, args: Any, output: Any) -> None:
            made = output[0] if isinstance(output, tuple) else output
            if self.taps.n_rows and seen and isinstance(made, torch.Tensor) and made.numel() == seen[0].numel():
                x, y = seen[0], made.detach().double().flatten()
                factor = float((x * y).sum() / x.square().sum())
                if factor and float((y - factor * x).norm()) < _SAME * float(y.norm()):
                    self.factors[str(layer)] = float(f"{factor:.3g}")

        handles = (experts.register_forward_hook(after_experts), block.register_forward_hook(after_block))
        self._undo += [handle.remove for handle in handles]

    def _tap_router(self, layer: int, module: torch.nn.Module, router: Any, scale: float) -> None:
        original, taps = router.select_experts, self.taps
        n_experts = int(router.global_num_experts)

        def select_experts(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
            own = kwargs["router_logits"] if "router_logits" in kwargs else args[1]
            logits = taps.given_rows(f"router:{layer}", own) if taps.n_rows else None
            if logits is None or own.shape[-1] != n_experts:
                return original(*args, **kwargs)  # type: ignore[no-any-return]
            n_rows = taps.n_rows
            taps.keep(f"router:{layer}", own)
            theirs = own.clone()
            theirs[:n_rows] = logits
            if "router_logits" in kwargs:
                kwargs = {**kwargs, "router_logits": theirs}
            else:
                args = (args[0], theirs, *args[2:])
            weights, ids = original(*args, **kwargs)
            rule = torch.zeros(n_rows, n_experts, device=ids.device)
            taps.keep(f"rule:{layer}", rule.scatter_add(1, ids[:n_rows].long(), weights[:n_rows].float() * scale))
            weights, ids = weights.clone(), ids.clone()
            forced = self.given[f"weights:{layer}"][taps.first_row : taps.first_row + n_rows].float() / scale
            weights[:n_rows] = forced.to(weights.device, weights.dtype)
            chosen = self.given[f"ids:{layer}"][taps.first_row : taps.first_row + n_rows]
            ids[:n_rows] = chosen.to(ids.device, ids.dtype)
            return weights, ids

        router.select_experts = select_experts
        self._undo.append(lambda: delattr(router, "select_experts"))
        experts: Any = getattr(module, "routed_experts", None)
        if not hasattr(experts, "forward_modular"):
            return
        run = experts.forward_modular

        def forward_modular(*args: Any, **kwargs: Any) -> Any:
            routed = run(*args, **kwargs)
            if taps.n_rows and isinstance(routed, torch.Tensor):
                taps.keep(f"routed:{layer}", routed[..., : taps.n_hidden] * scale)
            return routed

        experts.forward_modular = forward_modular
        self._undo.append(lambda: delattr(experts, "forward_modular"))


def record_modules(writer: Any, options: dict[str, Any], reporter: Any, held: Any) -> None:
    """Prefill every sequence in every pass; writes what :func:`~..hf.modules.record_modules` writes.

    A pass in float32 that vLLM refuses (some attention kernels have none) is left out; the reason is in its facts.

    Args:
        options: as there; ``options`` are vLLM's.
    """
    for one in options["passes"]:
        try:
            _run_pass(one, options, reporter, held)
        except Exception as error:  # vLLM raises anything
            if not one["optional"]:
                raise
            lines = str(error).strip().splitlines() or [repr(error)]
            Path(options["output"], f"{one['name']}.json").write_text(json.dumps({"refused": lines[0]}))
            with suppress(Exception):  # an engine that failed is not used again
                held.get("none", lambda: None, lambda nothing: None)


def _run_pass(one: dict[str, Any], options: dict[str, Any], reporter: Any, held: Any) -> None:
    from vllm import SamplingParams

    from moediag.engines.arms import ArmRequest
    from moediag.engines.vllm.engine import held_llm

    output, sequences = Path(options["output"]), options["sequences"]
    factors: dict[str, float] = {}
    parameters = SamplingParams(temperature=0.0, max_tokens=1)
    known = json.loads((output / f"{one['given']}.json").read_text())
    request = ArmRequest("modules", "infer", {**options["options"], "dtype": one["dtype"]})
    llm = held_llm(held, options["folder"], request, reporter)

    def run(token_ids: list[int], given: Path, target: Path) -> dict[str, Any]:
        arguments = (str(given), known["order"], factors, one["is_free"])
        llm.collective_rpc("moediag_modules_begin", args=arguments)
        llm.generate([{"prompt_token_ids": token_ids}], parameters, use_tqdm=False)
        facts: dict[str, Any] = llm.collective_rpc("moediag_modules_end", args=(str(target),))[0]
        return facts

    if known["factor"] != 1 and not one["is_free"]:  # does vLLM's block apply it, or its router?
        spare = output / f"{one['name']}.calibration"
        factors = run(sequences[0][0][:_CALIBRATION_TOKENS], output / f"{one['given']}-0.safetensors", spare)["factors"]
        spare.unlink()
    facts: dict[str, Any] = {}
    for i, (token_ids, _) in enumerate(sequences):
        given, target = (output / f"{one[name]}-{i}.safetensors" for name in ("given", "name"))
        facts = run(token_ids, given, target)
        reporter.progress(i + 1, len(sequences), f"sequences ({one['name']})")
    (output / f"{one['name']}.json").write_text(json.dumps(facts))
