"""The options that ``profile`` and ``capture`` share, listed once: what is sampled, what is kept, how engines load.

A command that takes ``settings: Settings`` and is decorated with :func:`with_settings` has every field as an option of
its own, in the place of that parameter.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from moediag.cli import options as o
from moediag.errors import EngineError
from moediag.run.recipes import SERVER, VLLM, recipe

if TYPE_CHECKING:
    from moediag.engines.arms import ArmRequest
    from moediag.engines.cluster import ClusterOptions
    from moediag.engines.plan import Plan


@dataclass(frozen=True)
class Settings:
    """The shared options as they were given; each field's type says what it is and which values it takes."""

    limit: o.Limit = None
    revision: o.Revision = None
    trust_remote_code: o.TrustRemoteCode = False
    dtype: o.Dtype = o.ModelDtype.auto
    temperature: o.Temperature = 1.0
    top_p: o.TopP = 1.0
    top_k: o.TopK = 0
    min_p: o.MinP = 0.0
    max_tokens: o.MaxTokens = 256
    n: o.Samples = 1
    seed: o.Seed = 0
    ignore_eos: o.IgnoreEos = False
    stop_token_ids: o.StopTokenIds = None
    router_logits: o.Logits = o.RouterLogits.none
    ids_only: o.IdsOnly = False
    full_vocab: o.FullVocab = None
    shard_size: o.ShardSize = 32
    max_model_len: o.MaxModelLen = None
    tensor_parallel_size: o.TensorParallel = 1
    gpu_memory_utilization: o.GpuMemory = None
    max_num_seqs: o.MaxNumSeqs = None
    max_num_batched_tokens: o.MaxBatched = None
    vllm_option: o.VllmOption = None
    observer: o.ObserverOption = o.Observer.hooks
    scoring: o.ScoringOption = o.Scoring.prefill
    attn_implementation: o.AttnImplementation = None
    experts_implementation: o.ExpertsImplementation = None
    device_map: o.DeviceMap = None
    batch_size: o.BatchSize = 1
    batching: o.LayoutOption = o.Layout.padded
    accept: o.AcceptOption = None
    server: o.ServerUrl = None
    server_model: o.ServerModel = None
    ray: o.Ray = False
    ray_address: o.RayAddress = None
    num_workers: o.NumEngines = None
    gpus_per_worker: o.GpusPerWorker = None

    def plan(self, ckpt: str, prompts: Path, sampled_by: str) -> Plan:
        """The run that the options describe.

        Raises:
            MoediagError: they cannot be met.
        """
        from moediag.cli.console import doing
        from moediag.engines.checkpoint import open_checkpoint
        from moediag.engines.plan import SamplingOptions, make_plan
        from moediag.prompts import read_prompts

        names = [field.name for field in fields(SamplingOptions) if field.name != "stop_token_ids"]
        sampling = SamplingOptions(
            **{name: getattr(self, name) for name in names}, stop_token_ids=tuple(self.stop_token_ids or ())
        )
        read_prompts(prompts, 1)  # a file that is none is refused before the weights are hashed
        with doing(f"reading {ckpt}, its tokenizer and the prompts, and hashing its weights"):
            return make_plan(
                open_checkpoint(ckpt, self.revision, self.trust_remote_code),
                prompts,
                sampling,
                limit=self.limit,
                router_logits=self.router_logits.value,
                shard_size=self.shard_size,
                max_model_len=self.max_model_len,
                trust_remote_code=self.trust_remote_code,
                ids_only=self.ids_only,
                sampled_by=sampled_by,
                full_vocab=o.parse_full_vocab(
                    self.full_vocab, self.observer if self.server is None else o.Observer.native
                ),
            )

    def check_server(self) -> None:
        """Before a run is begun: the server is there and serves the model.

        Raises:
            EngineError: it is not, or does not.
        """
        if self.server is not None:
            from moediag.engines.server import open_server

            open_server(self.server, self.server_model)

    def cluster(self) -> ClusterOptions | None:
        """Which Ray cluster captures; None where this machine does.

        Raises:
            DependencyError: ray is not installed, or too old.
            EngineError: an option that needs --ray is given without it, or one that one machine alone can do with it.
        """
        if self.ray and self.server is not None:
            raise EngineError("--ray with --server: a server takes requests from one process; leave --ray out")
        if self.ray and self.observer == o.Observer.auto:
            raise EngineError("--ray with --observer auto: name it (hooks, native or both), for all workers alike")
        given = {"address": self.ray_address, "num_workers": self.num_workers, "gpus_per_worker": self.gpus_per_worker}
        return o.cluster_options(self.ray, self.tensor_parallel_size, **given)

    def request(
        self, name: str, given: bool, max_model_len: int, seed: int, is_beside_rollouts: bool = False, **more: Any
    ) -> ArmRequest:
        """An arm of a recipe, captured as the options say.

        Args:
            name: of the recipe.
            given: the run's completions were given with its prompts.
            max_model_len: longest sequence that the run needs [tokens].
            seed: the run's, which an arm that joins one takes over.
            is_beside_rollouts: unobserved rollouts sample the tokens, with the options that only they may have; this
                arm decodes them again.
            more: as for :func:`~moediag.engines.arms.arm_request`.

        Raises:
            EngineError: an option that would make the capture wrong, with the reason.
        """
        from moediag.engines.arms import UNOBSERVED, arm_request
        from moediag.engines.launch import train_options
        from moediag.engines.vllm.options import infer_options, observable

        made, shared = recipe(name), {"dtype": self.dtype.value, "trust_remote_code": self.trust_remote_code or None}
        if made.engine == VLLM:
            extra = o.parse_vllm_options(self.vllm_option)
            options = infer_options(
                observable(extra) if is_beside_rollouts and made.is_observed else extra,
                self.observer.value if made.is_observed else UNOBSERVED,
                **shared,
                max_model_len=max_model_len,
                seed=seed,
                tensor_parallel_size=self.tensor_parallel_size,
                gpu_memory_utilization=self.gpu_memory_utilization,
                max_num_seqs=self.max_num_seqs,
                max_num_batched_tokens=self.max_num_batched_tokens,
            )
        elif made.engine == SERVER:
            known = {"model": self.server_model, "max_num_seqs": self.max_num_seqs}
            options = {name: value for name, value in known.items() if value is not None}
        else:
            options = train_options(
                **shared,
                attn_implementation=self.attn_implementation,
                experts_implementation=self.experts_implementation,
                device_map=self.device_map,
            )
        return arm_request(
            name,
            options,
            given,
            observer=self.observer.value,
            scoring=self.scoring.value,
            batching=o.parse_batching(self.batch_size, self.batching),
            accept=self.accept.value if self.accept else "",
            server=self.server or "",
            **more,
        )


def with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """The command with the fields of :class:`Settings` as parameters, where it has ``settings`` itself."""
    hints = {**get_type_hints(command, include_extras=True), **get_type_hints(Settings, include_extras=True)}
    shared = [(field.name, field.default) for field in fields(Settings)]
    listed: list[tuple[str, Any]] = []
    for name, parameter in inspect.signature(command).parameters.items():
        listed += shared if name == "settings" else [(name, parameter.default)]

    def with_options(**given: Any) -> None:
        settings = Settings(**{name: given.pop(name) for name, _ in shared})
        command(settings=settings, **given)

    keyword = inspect.Parameter.KEYWORD_ONLY  # typer calls by name, and defaults may then stand in any order
    with_options.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter(name, keyword, default=default, annotation=hints[name]) for name, default in listed]
    )
    with_options.__annotations__ = {name: hints[name] for name, _ in listed}
    with_options.__doc__, with_options.__name__ = command.__doc__, command.__name__
    return with_options
