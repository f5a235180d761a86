"""The part of moediag that runs inside vLLM's workers: taps on routers, steps and the sampler.

vLLM mixes :class:`MoediagWorkerExtension` into its worker class (``worker_extension_cls``), in-process,
multi-process and tensor-parallel alike; ``collective_rpc`` calls its methods by name. Only plain data
crosses that border: rows leave through a safetensors file.

Invariants:
    - taps only copy; they never change what a router, the model or the sampler receives or returns;
    - vLLM's V1 model runner keeps its batch in ``input_batch`` and gets counts from the scheduler, the V2 runner makes
      an ``InputBatch`` in ``prepare_inputs``. Dummy runs (profiling, warm-up) go through neither, so a step without a
      batch is one of vLLM's own and leaves no rows;
    - every pipeline stage sees its own layers; its first tensor-parallel rank records and writes, every other records
      expert ids only, and the digest of what it saw is held against that of the first: ranks that route differently
      are an error, not a choice. Under expert parallelism, too, every rank of a stage routes every token, to the
      model's own ids, before it runs the experts that it has.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from moediag.engines.assemble import IDS
from moediag.engines.provenance import process_facts
from moediag.engines.routers import ModelRouting
from moediag.engines.vllm.built import vllm_dtypes, vllm_kernels
from moediag.engines.vllm.modules import ModuleRecorder
from moediag.engines.vllm.routing import run_routers
from moediag.engines.vllm.rows import StepRecorder, stage_file

_RULE_ATTRIBUTES = ("scoring_func", "renormalize", "num_expert_group", "topk_group", "routed_scaling_factor")
_DECODER_LAYER = re.compile(r"\.layers\.(\d+)\.")

Undo = Callable[[], None]
Batch = tuple[Sequence[str], Sequence[int]]
"""Requests of the step in the runner's row order, and the rows of each."""


class MoediagWorkerExtension:
    """Methods that vLLM's worker gains; every name is prefixed, vLLM refuses clashes."""

    rank: int
    model_runner: Any
    vllm_config: Any

    def _moediag_place(self) -> tuple[int, int]:
        """Pipeline stage and tensor-parallel rank within it."""
        return divmod(self.rank, int(self.vllm_config.parallel_config.tensor_parallel_size))

    def _moediag_file(self, path: str) -> Path | None:
        """What this rank writes where every stage writes a file; None where it only looks."""
        stage, rank = self._moediag_place()
        return stage_file(Path(path), stage) if rank == 0 else None

    def moediag_route(self, given: str, output: str) -> list[dict[str, Any]]:
        """Run the routers on the probes of a file, see :func:`~.routing.run_routers`; every stage writes a file."""
        model, routers = self.model_runner.model, find_routers(self.model_runner.model)
        dtype = self.model_runner.model_config.dtype
        scales = scales_after_experts(routers)
        return run_routers(model, routers, scales, dtype, Path(given), self._moediag_file(output))

    def moediag_install(
        self, spec: dict[str, Any] | None, level: str, bias: list[list[float]] | None = None
    ) -> dict[str, Any]:
        """Set the taps on this worker, in place of those of an earlier arm.

        Args:
            spec: fields of :class:`ModelRouting`, of all stages, or None for a dense model.
            level: ``ids``, ``margins`` or ``full``; see :mod:`moediag.engines.assemble`.
            bias: correction bias by MoE layer of all stages and expert, for routers that do not hold theirs.

        Returns:
            What the loaded model is: MoE layers, E, K, dtypes, kernels, attention backend.
        """
        self.moediag_remove()
        routers = find_routers(self.model_runner.model)
        layers = tuple(layer for layer, _, _ in routers)
        whole = ModelRouting.from_record(spec) if spec else None
        bias_LE = correction_bias([router for _, _, router in routers])
        if bias_LE is None and bias is not None and whole is not None:
            bias_LE = torch.tensor(
                [row for row, layer in zip(bias, whole.decoder_layers, strict=True) if layer in layers]
            )
        own = replace(whole, decoder_layers=layers) if whole is not None and layers else None
        _, rank = self._moediag_place()
        recorder = StepRecorder(own, level if rank == 0 else IDS, bias_LE, scales_after_experts(routers))
        self._moediag_recorder = recorder
        self._moediag_undo: list[Undo] = [
            *tap_runner(self.model_runner, recorder),
            *(_tap_router(router, layer, recorder) for layer, (_, _, router) in enumerate(routers)),
        ]
        return self.moediag_describe()

    def moediag_describe(self) -> dict[str, Any]:
        """What was really loaded and selected in this worker."""
        runner = self.model_runner
        return {**describe_worker(runner, find_routers(runner.model)), "is_v2_runner": is_v2(runner)}

    def moediag_remove(self) -> None:
        """Take the taps off: the worker is as vLLM made it."""
        for undo in getattr(self, "_moediag_undo", []):
            undo()
        self._moediag_undo = []

    def moediag_begin(self, seed: int | None, kept: dict[str, int] | None = None) -> None:
        """Start a shard: forget rows; with a seed, reseed this worker's default generator.

        Args:
            kept: requests whose whole next-token distributions are kept, each from a position on.
        """
        stage, rank = self._moediag_place()
        if stage > 0:
            make_receiving_buffer(self.model_runner)
        if seed is not None:
            torch.manual_seed(seed)
        if hasattr(self, "_moediag_recorder"):
            self._moediag_recorder.begin()
            self._moediag_recorder.keep_distributions((kept or {}) if rank == 0 else {})

    def moediag_modules_begin(
        self, given: str, order: list[list[Any]], factors: dict[str, float], is_free: bool
    ) -> None:
        """Give the modules what another engine's received, from now on; see :mod:`~.modules`."""
        self.moediag_remove()
        runner, routers = self.model_runner, find_routers(self.model_runner.model)
        recorder = ModuleRecorder(runner, routers, scales_after_experts(routers), Path(given), order, factors, is_free)
        self._moediag_modules = recorder
        self._moediag_undo = [*tap_runner(runner, recorder), recorder.remove]

    def moediag_modules_end(self, output: str) -> dict[str, Any]:
        """Write what they made of it, and take everything off."""
        facts = self._moediag_modules.write(Path(output))
        self.moediag_remove()
        del self._moediag_modules
        return facts

    def moediag_bias(self) -> list[list[float]] | None:
        """The routers' correction bias by MoE layer and expert; None where the rule has none."""
        bias_LE = correction_bias([router for _, _, router in find_routers(self.model_runner.model)])
        return None if bias_LE is None else [[float(bias) for bias in row] for row in bias_LE.tolist()]

    def moediag_flush(self, path: str) -> dict[str, Any]:
        """Each stage writes its rows, see :func:`~.rows.stage_file`; every rank returns what it saw."""
        return {"rank": self.rank, **self._moediag_recorder.flush(self._moediag_file(path))}


def make_receiving_buffer(runner: Any) -> None:
    """Where a later pipeline stage receives hidden states: vLLM's V1 runner makes it in its profiling run only, which
    the CPU build leaves out in eager execution (0.32), and then fails in the first step."""
    if getattr(runner, "intermediate_tensors", ...) is None and not is_v2(runner):
        runner.intermediate_tensors = runner.model.make_empty_intermediate_tensors(
            batch_size=runner.max_num_tokens, dtype=runner.model_config.dtype, device=runner.device
        )


def find_routers(model: torch.nn.Module) -> list[tuple[int, torch.nn.Module, Any]]:
    """(decoder layer, module, router) of every MoE layer in order, found by what they do, not by class.

    Raises:
        ValueError: a router sits outside the numbered decoder layers.
    """
    found: dict[int, tuple[int, torch.nn.Module, Any]] = {}
    for name, module in model.named_modules():
        router = getattr(module, "router", None)
        if not hasattr(router, "select_experts") or id(router) in found:
            continue
        match = _DECODER_LAYER.search(f".{name}.")
        if match is None:
            raise ValueError(f"router of module {name} belongs to no numbered decoder layer")
        found[id(router)] = (int(match.group(1)), module, router)
    return sorted(found.values(), key=lambda entry: entry[0])


def correction_bias(routers: list[Any]) -> torch.Tensor | None:
    """Bias per MoE layer and expert, (L, E), that enters the choice only; None where the routers have none."""
    biases = [getattr(router, "e_score_correction_bias", None) for router in routers]
    found = [bias for bias in biases if bias is not None]
    return torch.stack([bias.detach().float() for bias in found]) if found and len(found) == len(routers) else None


def scales_after_experts(routers: list[tuple[int, torch.nn.Module, Any]]) -> list[float]:
    """By MoE layer, what vLLM multiplies the sum of the experts' weighted outputs by.

    vLLM hands ``routed_scaling_factor`` to one of two: to the router, whose weights then contain it, or to the module
    that holds the router and runs the experts, which scales their sum (``apply_routed_scale_to_output``). Which of the
    two depends on model, kernel and platform; the other one gets 1. Same in vLLM 0.30 to 0.32.
    """
    return [float(getattr(module, "routed_scaling_factor", 1.0)) for _, module, _ in routers]


def describe_worker(runner: Any, routers: list[tuple[int, torch.nn.Module, Any]]) -> dict[str, Any]:
    """What was really loaded and selected in this worker."""
    parameters = {str(parameter.dtype).removeprefix("torch.") for parameter in runner.model.parameters()}
    backends = {group.backend.get_name() for groups in getattr(runner, "attn_groups", []) for group in groups}
    quant_methods = [getattr(_experts(module), "quant_method", None) for _, module, _ in routers]
    return {
        "decoder_layers": [layer for layer, _, _ in routers],
        "n_experts": sorted({int(getattr(r, "global_num_experts", 0)) for _, _, r in routers}),
        "top_k": sorted({int(getattr(r, "top_k", 0)) for _, _, r in routers}),
        "router_rule": {
            name: value
            for name in _RULE_ATTRIBUTES
            if (value := getattr(routers[0][2], name, None) if routers else None) is not None
        },
        "scale_after_experts": sorted(set(scales_after_experts(routers))),
        "weights_on_input": any(
            bool(getattr(_experts(m), "apply_router_weight_on_input", False)) for _, m, _ in routers
        ),
        "router_classes": sorted({type(r).__name__ for _, _, r in routers}),
        "experts_kernel": sorted({type(method).__name__ for method in quant_methods if method is not None}),
        "is_monolithic": any(bool(getattr(method, "is_monolithic", False)) for method in quant_methods),
        "has_correction_bias": correction_bias([router for _, _, router in routers]) is not None,
        "eplb": any(getattr(r, "eplb_state", None) is not None for _, _, r in routers),
        "misses_experts": any(_misses_experts(module) for _, module, _ in routers),
        "parameter_dtypes": sorted(parameters),
        "model_class": type(runner.model).__name__,
        "runner_class": type(runner).__name__,
        "attention_backends": sorted(backends),
        "device": str(runner.device),
        "n_threads": torch.get_num_threads(),
        "kernels": vllm_kernels(runner),
        "dtypes": vllm_dtypes(runner),
        "process": process_facts(),
    }


def _experts(module: torch.nn.Module) -> Any:
    return getattr(module, "routed_experts", module)


def _misses_experts(module: torch.nn.Module) -> bool:
    """The kernel takes the experts that this rank has for all of them: the CPU build's read no expert map (0.32)."""
    experts = _experts(module)
    kernel = getattr(getattr(getattr(experts, "quant_method", None), "moe_kernel", None), "fused_experts", None)
    return getattr(experts, "expert_map", None) is not None and type(kernel).__module__.endswith(".cpu_moe")


def _tap_router(router: Any, layer: int, recorder: StepRecorder) -> Undo:
    original = router.select_experts

    def select_experts(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        weights, ids = original(*args, **kwargs)
        recorder.on_route(layer, kwargs["router_logits"] if "router_logits" in kwargs else args[1], weights, ids)
        return weights, ids

    router.select_experts = select_experts
    return lambda: delattr(router, "select_experts")


# Runners: whose rows a step has, when it begins and ends, what the sampler gets


def tap_runner(runner: Any, recorder: StepRecorder | ModuleRecorder) -> list[Undo]:
    """Set the taps on steps, the model's inputs and the sampler; returns how to take them off."""
    adapter = _V2Runner(runner) if is_v2(runner) else _V1Runner(runner)
    return [
        *adapter.tap_batches(),
        _tap_model(runner.model, adapter, recorder),
        _tap_steps(runner, adapter, recorder),
        adapter.tap_sampler(recorder.on_sample),
        *adapter.tap_prompts(recorder.on_prompt),
    ]


def is_v2(runner: Any) -> bool:
    """True for vLLM's V2 model runner, on whatever device."""
    return any(base.__module__.startswith("vllm.v1.worker.gpu.") for base in type(runner).__mro__)


class _V1Runner:
    """Row order: ``input_batch.req_ids``, not the order of the scheduler's dict."""

    def __init__(self, runner: Any) -> None:
        self.runner = runner
        self.scheduler_output: Any = None

    def tap_batches(self) -> list[Undo]:
        return []

    def begin(self, scheduler_output: Any) -> None:
        self.scheduler_output = scheduler_output

    def end(self) -> None:
        self.scheduler_output = None

    def batch(self) -> Batch | None:
        if self.scheduler_output is None:
            return None
        names = self.runner.input_batch.req_ids[: self.runner.input_batch.num_reqs]
        return names, [self.scheduler_output.num_scheduled_tokens[name] for name in names]

    def tap_sampler(self, on_sample: Callable[[torch.Tensor], None]) -> Undo:
        def before_sampling(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            on_sample(kwargs["logits"] if "logits" in kwargs else args[0])

        handle = self.runner.sampler.register_forward_pre_hook(before_sampling, with_kwargs=True)
        return handle.remove  # type: ignore[no-any-return]

    def tap_prompts(self, on_prompt: Callable[[int, torch.Tensor], None]) -> list[Undo]:
        """Logits behind prompt log-probabilities: computed request by request, from consecutive rows of the step.

        Which rows they are is seen from where the view that the head is given lies in the step's hidden states.
        """
        runner, original = self.runner, self.runner._get_prompt_logprobs_dict

        def with_tapped_head(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            model, head = runner.model, runner.model.compute_logits
            n_bytes = hidden_states.stride(0) * hidden_states.element_size()

            def compute_logits(rows: torch.Tensor, *more: Any, **options: Any) -> Any:
                logits = head(rows, *more, **options)
                on_prompt((rows.data_ptr() - hidden_states.data_ptr()) // n_bytes, logits)
                return logits

            model.compute_logits = compute_logits
            try:
                return original(hidden_states, *args, **kwargs)
            finally:
                del model.compute_logits

        runner._get_prompt_logprobs_dict = with_tapped_head
        return [lambda: delattr(runner, "_get_prompt_logprobs_dict")]


class _V2Runner:
    """Row order: the ``InputBatch`` that ``prepare_inputs`` returns, once per real step."""

    def __init__(self, runner: Any) -> None:
        self.runner = runner
        self.input_batch: Any = None

    def tap_batches(self) -> list[Undo]:
        runner, original = self.runner, self.runner.prepare_inputs

        def prepare_inputs(*args: Any, **kwargs: Any) -> Any:
            self.input_batch = original(*args, **kwargs)
            return self.input_batch

        runner.prepare_inputs = prepare_inputs
        return [lambda: delattr(runner, "prepare_inputs")]

    def begin(self, scheduler_output: Any) -> None:
        self.input_batch = None

    def end(self) -> None:
        self.input_batch = None

    def batch(self) -> Batch | None:
        if self.input_batch is None:
            return None
        return self.input_batch.req_ids, self.input_batch.num_scheduled_tokens.tolist()

    def tap_sampler(self, on_sample: Callable[[torch.Tensor], None]) -> Undo:
        """The V2 sampler is no module: an object that is called in its place and is it in every other respect."""
        runner, original = self.runner, self.runner.sampler
        if original is None:  # another pipeline stage samples
            return lambda: None

        class TappedSampler:
            def __call__(self, logits: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
                on_sample(logits)
                return original(logits, *args, **kwargs)

            def __getattr__(self, name: str) -> Any:
                return getattr(original, name)

        runner.sampler = TappedSampler()

        def undo() -> None:
            runner.sampler = original

        return undo

    def tap_prompts(self, on_prompt: Callable[[int, torch.Tensor], None]) -> list[Undo]:
        """None: the V2 runner's kernel never makes whole rows of prompt log-probabilities (the engine refuses)."""
        return []


def _tap_steps(runner: Any, adapter: _V1Runner | _V2Runner, recorder: StepRecorder | ModuleRecorder) -> Undo:
    original = runner.execute_model

    def execute_model(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        adapter.begin(scheduler_output)
        try:
            return original(scheduler_output, *args, **kwargs)
        finally:
            adapter.end()
            recorder.end_step()

    runner.execute_model = execute_model
    return lambda: delattr(runner, "execute_model")


def _tap_model(model: torch.nn.Module, adapter: _V1Runner | _V2Runner, recorder: StepRecorder | ModuleRecorder) -> Undo:
    def before_forward(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        batch = adapter.batch()
        if batch is not None:  # None: a dummy run of vLLM's own
            recorder.on_forward(*batch, kwargs["positions"], kwargs["input_ids"])

    handle = model.register_forward_pre_hook(before_forward, with_kwargs=True)
    return handle.remove
