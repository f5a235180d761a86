"""vLLM's two model runners behind one face: whose rows a step has, when it begins and ends, what the sampler gets.

The V1 runner keeps its batch in ``input_batch`` and is told the counts by the scheduler; the V2 runner makes an
``InputBatch`` of its own in ``prepare_inputs``. Dummy runs (profiling, warm-up) go through neither, so a step without
a batch is one of vLLM's own and leaves no rows. The positions and token ids are in both cases what the model receives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from moediag.engines.vllm_rows import StepRecorder

Undo = Callable[[], None]
Batch = tuple[Sequence[str], Sequence[int]]
"""Requests of the step in the runner's row order, and the rows of each."""


def tap_runner(runner: Any, recorder: StepRecorder) -> list[Undo]:
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
        """The V2 sampler is no module: a stand-in that is called in its place and is it in every other respect."""
        runner, original = self.runner, self.runner.sampler

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


def _tap_steps(runner: Any, adapter: _V1Runner | _V2Runner, recorder: StepRecorder) -> Undo:
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


def _tap_model(model: torch.nn.Module, adapter: _V1Runner | _V2Runner, recorder: StepRecorder) -> Undo:
    def before_forward(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        batch = adapter.batch()
        if batch is not None:  # None: a dummy run of vLLM's own
            recorder.on_forward(*batch, kwargs["positions"], kwargs["input_ids"])

    handle = model.register_forward_pre_hook(before_forward, with_kwargs=True)
    return handle.remove
