"""What the sealed JSON files of a run hold, as types: run.json, checkpoints, arm.json, sidecars.

A seal says that a file is whole, not that it makes sense. Everything the store and the analysis rely on is held
against its type here, once, when a file is read; code behind it may then use it without asking. Whatever is said of an
arm is a field: nothing is ever read off its name.
"""

from __future__ import annotations

import json
from collections import Counter
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from moediag.errors import CorruptRunError, SchemaVersionError
from moediag.notation import SCHEMA_VERSION
from moediag.run.capture import Shard
from moediag.run.files import digest_of, read_sealed, write_sealed

MANIFEST: Final = "run.json"
PROMPTS: Final = "prompts.parquet"
KIND: Final = "moediag run"

Role = Literal["infer", "train", "reference"]
ScorePath = Literal["sampled", "decode", "prefill", "teacher-forced", "unknown"]
Change = Literal[
    "repeat", "path", "engine", "perturbation", "replay", "dtype", "router-dtype", "batching", "observation",
    "checkpoint", "option",
]  # fmt: skip

Count = Annotated[int, Field(ge=0, le=2**53)]
"""JSON integers above 2^53 are not the same number to every reader."""
Number = Annotated[float, Field(ge=-(2**53), le=2**53, allow_inf_nan=False)]


class Record(BaseModel):
    """A frozen record; unknown entries are refused, and so is another type than the one declared."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    def content(self) -> dict[str, Any]:
        """As JSON holds it."""
        return self.model_dump(mode="json")


OTHER_LOGITS = "the engines' routers give other logits for the same hidden states"
"""What a disagreement of routers (:class:`ArmRecord`) that is none of rules begins with."""


class RouterSpec(Record):
    """How one router chooses its experts, and what weight it gives them.

    Args:
        family: ``model_type`` of the config.json that it was read from.
        score_function: what TopK compares before the bias: ``softmax``, ``sigmoid`` or ``sqrtsoftplus`` of the logits,
            or the ``logit``.
        has_correction_bias: a learned bias per expert enters the choice but not the gate.
        n_group, topk_group: experts are split in ``n_group`` groups of which ``topk_group`` compete; 1, 1 = off.
        gate: what the gate weight of a chosen expert is: its score (``scores``), or the softmax or sigmoid of the
            chosen logits (``softmax_of_chosen``, ``sigmoid``); ``unknown`` where no formula explains it.
        renormalize: gate weights are divided by their sum.
        scaling_factor: then multiplied by this.
        n_shared_experts: experts every token passes, beside the routed ones.
        group_score: groups are compared by their ``two_best`` together, or by their ``best``.
        masked_value: choice score of an expert whose group lost: ``-inf`` or ``0``.
        epsilon: added to the sum that gate weights are divided by.
        has_expert_scale: gate weights are multiplied by a learned factor per expert.
    """

    family: str
    score_function: str
    has_correction_bias: bool
    n_group: Count
    topk_group: Count
    gate: str
    renormalize: bool
    scaling_factor: Number
    n_shared_experts: Count
    group_score: str = "two_best"
    masked_value: str = "-inf"
    epsilon: Number = 0.0
    has_expert_scale: bool = False


class Router(Record):
    """The router of one MoE layer, as one arm had it.

    Args:
        decoder_layer: its decoder layer.
        n_experts, top_k: E and K.
        n_zero_experts: how many of these, the last, compute nothing (LongCat's ``zero_expert_num``).
        spec: its rule; None where it is not known (an imported dump).
        proof: how the rule is known: shown on the loaded router, or read from ``config.json``; where ``spec`` is None,
            why it is not known. None for an imported dump.
    """

    decoder_layer: Annotated[int, Field(ge=0, le=2**31)]
    n_experts: Annotated[int, Field(ge=1, le=32_767)]  # expert ids are int16 in memory
    top_k: Annotated[int, Field(ge=1)]
    spec: RouterSpec | None = None
    proof: str | None = None
    n_zero_experts: Count = 0

    @model_validator(mode="after")
    def _is_a_routing(self) -> Self:
        if self.top_k > self.n_experts:
            raise ValueError(f"top_k = {self.top_k} of n_experts = {self.n_experts} is no routing")
        return self

    @model_serializer(mode="wrap")
    def _without_what_is_newer(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """As earlier versions of schema 2 wrote it, where there are no zero experts: they refuse entries unknown."""
        content: dict[str, Any] = serialise(self)
        return content if self.n_zero_experts else {k: v for k, v in content.items() if k != "n_zero_experts"}


def _rising(routers: tuple[Router, ...]) -> tuple[Router, ...]:
    if not all(a.decoder_layer < b.decoder_layer for a, b in pairwise(routers)):
        raise ValueError("decoder layers should rise from router to router")
    return routers


Routers = Annotated[tuple[Router, ...], AfterValidator(_rising)]
"""Routers of a model's MoE layers, in order; empty for a dense model."""


class TensorRecord(Record):
    """One tensor of a checkpoint: dtype by safetensors' name, shape, sha256 of its bytes."""

    dtype: str
    shape: tuple[Count, ...]
    sha256: str


class CheckpointRecord(Record):
    """A checkpoint that arms of the run loaded; where it lay is only shown, never compared.

    Args:
        source: what the user called it: a folder or a hub id.
        quantization: ``quantization_config`` of config.json.
        tokenizer_sha256: digest of the tokenizer's files.
        routers: as config.json describes them.
        tensors: every stored tensor by name; None for runs of schema 1.
    """

    kind: Literal["moediag checkpoint"] = "moediag checkpoint"
    schema_version: int = SCHEMA_VERSION
    source: str
    revision: str | None = None
    architecture: str | None = None
    model_type: str | None = None
    n_decoder_layers: Count | None = None
    n_vocabulary: Count | None = None
    stored_dtype: str | None = None
    quantization: dict[str, Any] | None = None
    config_sha256: str | None = None
    weights_sha256: str | None = None
    tokenizer_sha256: str | None = None
    routers: Routers = ()
    tensors: dict[str, TensorRecord] | None = None

    @cached_property
    def digest(self) -> str:
        """Its name in the run: weights and config."""
        return digest_of([self.weights_sha256, self.config_sha256])[:16]

    @property
    def words(self) -> str:
        """As messages call it."""
        return f"{self.source} (weights {str(self.weights_sha256)[:8]}, config {str(self.config_sha256)[:8]})"

    @property
    def scheme(self) -> str:
        """How its weights, and the activations that meet them, are quantised; empty where they are not.

        Example:
            >>> CheckpointRecord(source="x", quantization={"quant_method": "gptq", "bits": 4, "group_size": 128}).scheme
            'gptq: weights 4 bits in groups of 128'
        """
        if not self.quantization:
            return ""
        groups = (self.quantization.get("config_groups") or {}).values()
        found = [
            f"{side} {_quantised(group[key])}"
            for group in groups
            for side, key in (("weights", "weights"), ("activations", "input_activations"))
            if group.get(key)
        ]
        if not found and (self.quantization.get("bits") or self.quantization.get("weight_block_size")):
            blocks = self.quantization.get("weight_block_size")
            found = [f"weights in blocks of {'x'.join(map(str, blocks))}"] if blocks else []
            found = found or [f"weights {_quantised({**self.quantization, 'num_bits': self.quantization['bits']})}"]
        method = str(self.quantization.get("quant_method") or "quantised")
        return f"{method}: {', '.join(dict.fromkeys(found))}" if found else method


def _quantised(how: dict[str, Any]) -> str:
    """``int8 per channel``, ``int4 in groups of 32``, ``float8 per token``: one side of a quantization_config."""
    kind, bits = how.get("type"), how.get("num_bits")
    width = f"{kind}{bits}" if kind else f"{bits} bits"
    size = how.get("group_size")
    where = f"in groups of {size}" if size and size > 0 else f"per {how['strategy']}" if how.get("strategy") else ""
    return f"{width} {where}".strip()


class TensorDifference(Record):
    """How one tensor of checkpoint b differs from a's.

    Args:
        kind: ``equal``, ``equal_after_rounding``, ``differs``, ``dequantised``, ``not_comparable``, ``not_measured``.
        n_parameters: elements of a's tensor (of the stored one where only b has it).
        relative_error: ||a - b|| / ||a|| over elements that are finite in both; None if not measured, or if a is zero
            and b is not.
        largest: largest |a - b| of those; None if not measured.
        n_differing: elements that are not the same (other dtypes: not even after rounding to the narrower).
        n_not_finite: those of them that are not finite in a or in b.
        reason: why it is not comparable.
    """

    name: str
    group: str
    kind: str
    n_parameters: Count
    relative_error: float | None = None
    largest: float | None = None
    n_differing: Count = 0
    n_not_finite: Count = 0
    reason: str = ""


class GroupDifference(Record):
    """The tensors of one group (or all of them) together; measures are over those that could be measured.

    Args:
        n_tensors, n_parameters: by kind; kinds that do not occur are left out.
        share_differing: of the elements of measured tensors; None if none was measured.
        norm_ratio, cosine: of the tensors that differ together, ||b|| / ||a|| and the cosine of the angle between them;
            None if none does, or one of them is zero.
    """

    group: str
    n_tensors: dict[str, Count]
    n_parameters: dict[str, Count]
    relative_error: float | None
    largest: float | None
    share_differing: float | None
    n_not_finite: Count
    norm_ratio: float | None = None
    cosine: float | None = None


class PermutedExperts(Record):
    """A layer whose experts are the same in both checkpoints, bit for bit, and lie in other slots.

    Args:
        layer: what the names of its experts' tensors begin with.
        n_slots: slots that hold another expert, of ``n_experts``.
    """

    layer: str
    n_slots: Count
    n_experts: Count


class NotComparable(Record):
    """One reason why tensors could not be compared, how many they are, and the first of them by name."""

    reason: str
    n_tensors: Count
    n_parameters: Count
    example: str


class WeightsComparison(Record):
    """How the weights of checkpoint b (what vLLM samples from) differ from those of a (what is trained).

    Args:
        a, b: digests of the two.
        measured_from: their files, or only their tensors' digests, which tell what is equal and not by how much.
        summary: in one sentence.
        is_equal: every tensor is of the same dtype, shape and bytes.
        overall: all tensors together; ``groups``: by what they are (routers, experts, attention, ...).
        worst: tensors that differ, largest relative error first, those with other non-finite elements before all.
        not_comparable: by reason, most tensors first.
        permuted: layers whose experts only lie in other slots.
        n_scales: tensors of a and of b that only tell how others are stored; they are not counted as tensors.
    """

    kind: Literal["moediag weights comparison"] = "moediag weights comparison"
    schema_version: int = SCHEMA_VERSION
    a: str = ""
    b: str = ""
    measured_from: Literal["files", "digests"] = "files"
    summary: str
    is_equal: bool
    overall: GroupDifference
    groups: tuple[GroupDifference, ...]
    worst: tuple[TensorDifference, ...]
    not_comparable: tuple[NotComparable, ...]
    permuted: tuple[PermutedExperts, ...] = ()
    n_scales: tuple[Count, Count]


class Prompts(Record):
    """Which prompts: how many, digests of the tokenised table and of the file as written."""

    n: Count
    data_sha256: str
    source: str
    source_sha256: str


class Tokenizer(Record):
    """The tokenizer that made the tokens.

    Args:
        source: where it is from, as the user called it.
        files_sha256: digest of its files.
        map_sha256: digest of its token-to-id map, where it could be loaded.
    """

    source: str = ""
    files_sha256: str
    map_sha256: str | None = None


class TokensFrom(Record):
    """Where the run's tokens come from.

    Args:
        origin: sampled by an arm, given with the prompts, or imported.
        arm: the arm that sampled them.
        notes: what a reader has to know of them, a sentence each, where no imported arm says it.
    """

    origin: Literal["sampled", "given", "imported"]
    arm: str | None = None
    notes: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _has_a_sampler(self) -> Self:
        if (self.origin == "sampled") != (self.arm is not None):
            raise ValueError(f"tokens are {self.origin}, by arm {self.arm}: an arm is named where they are sampled")
        return self


class Sampling(Record):
    """Sampling parameters by vLLM's own names, as really used; what a dump does not tell is absent."""

    temperature: Number | None = None
    top_p: Number | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Number | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    ignore_eos: bool | None = None
    stop_token_ids: tuple[Count, ...] | None = None

    def content(self) -> dict[str, Any]:
        """As JSON holds it: what is known."""
        return self.model_dump(mode="json", exclude_none=True)


class RunRecord(Record):
    """run.json.

    Args:
        configuration: what was requested: the same configuration resumes, another one is refused.
        checkpoint: digest of the checkpoint that the run was begun with; None for an imported run.
        sampling: None where nothing is known of it.
        level: how much of routing the arms keep: ``ids``, ``margins`` or ``full``.
        full_vocab: sequences whose whole next-token distributions the reference arms keep.
        main_pair: (minuend, subtrahend) where roles do not say it.
        step: training step, in a series.
    """

    kind: Literal["moediag run"] = KIND
    schema_version: int = SCHEMA_VERSION
    moediag_version: str
    configuration: dict[str, Any] = {}
    checkpoint: str | None = None
    tokenizer: Tokenizer | None = None
    tokens: TokensFrom
    prompts: Prompts | None = None
    sampling: Sampling | None = None
    level: Literal["ids", "margins", "full"] = "margins"
    full_vocab: Count = 0
    shards: tuple[Shard, ...]
    main_pair: tuple[str, str] | None = None
    step: int | None = None

    @model_validator(mode="after")
    def _shards_are_joined(self) -> Self:
        if not self.shards:
            raise ValueError("shards should be a list of shards, found none")
        end = 0
        for i, shard in enumerate(self.shards):
            if (shard.index, shard.first_sequence) != (i, end) or not 1 <= shard.n_sequences <= 2**53:
                raise ValueError(f"unusable shard table at entry {i}")
            end += shard.n_sequences
        return self


class Captured(Record):
    """An arm that moediag captured.

    Args:
        recipe: what ``capture`` calls it.
        configuration: the options of the engine; arms of the same recipe, checkpoint and configuration are the same.
        versions, environment: of everything that enters numerics.
        facts: what the engine says of itself, by section (:mod:`moediag.run.environment`).
    """

    kind: Literal["captured"] = "captured"
    recipe: str
    configuration: dict[str, Any]
    versions: dict[str, str | None] = {}
    environment: dict[str, str | None] = {}
    facts: dict[str, Any] = {}


class Imported(Record):
    """An arm that was read from another tool's files.

    Args:
        format: the format's name.
        files: sha256 by file name.
        notes: what the reader of the run should know, a sentence each.
    """

    kind: Literal["imported"] = "imported"
    format: str
    files: dict[str, str] = {}
    notes: tuple[str, ...] = ()


class Score(Record):
    """What a log-probability of the arm is; None = not known.

    Args:
        temperature: logits were divided by it.
        processed: taken after temperature, penalties and truncation, as the sampler saw them; False = raw.
        truncation: names of the truncations in force (``top_p=0.9``), where processed.
        dtype: of the log-softmax.
    """

    temperature: Number | None = None
    processed: bool | None = None
    truncation: tuple[str, ...] = ()
    dtype: str | None = None


class ArmRecord(Record):
    """arm.json.

    Args:
        name: free; nothing is read off it.
        role: ``infer`` (the rollout's side), ``train`` (the trainer's), ``reference`` (neither).
        engine: ``vllm``, ``transformers``, ``server`` (a running one), or the format it was imported from.
        path: how scores came about.
        variant_of, change: the arm that this one repeats or changes, and what is different.
        checkpoint: digest of the checkpoint loaded, or None with the reason in ``no_checkpoint``.
        arrays: what the arm has of :class:`~moediag.run.capture.Capture`, and ``distributions``.
        dtype: of the model.
        routers: per MoE layer; empty for a dense model.
        gate_weights: what the gate weights are: ``effective`` (the coefficient of the expert's output in the block's
            output), ``effective, on the expert's input``, or None: kept by nobody, or of undefined scale.
        correction_bias_sha256: digest of the routers' correction bias, which stands beside.
        disagreements: where the loaded routers follow another rule than config.json.
        n_shards: it covers only so many of the run's shards, from the first on; None = all.
    """

    kind: Literal["moediag arm"] = "moediag arm"
    schema_version: int = SCHEMA_VERSION
    name: str
    role: Role
    engine: str
    path: ScorePath = "unknown"
    variant_of: str | None = None
    change: Change | None = None
    checkpoint: str | None = None
    no_checkpoint: str = ""
    origin: Annotated[Captured | Imported, Field(discriminator="kind")]
    score: Score = Score()
    dtype: str | None = None
    arrays: tuple[str, ...]
    routers: Routers = ()
    gate_weights: str | None = None
    correction_bias_sha256: str | None = None
    disagreements: tuple[str, ...] = ()
    n_shards: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="after")
    def _is_one_thing(self) -> Self:
        if (self.variant_of is None) != (self.change is None):
            raise ValueError("variant_of and change belong together")
        if "logp_T" not in self.arrays:
            raise ValueError("arrays lack logp_T")
        if self.is_routed and not self.routers:
            raise ValueError("arrays have expert ids, and there are no routers")
        if self.checkpoint is None and not self.no_checkpoint:
            raise ValueError("checkpoint is null without a reason in no_checkpoint")
        return self

    @property
    def is_routed(self) -> bool:
        """True when the arm kept expert ids."""
        return "expert_ids_TLK" in self.arrays

    @property
    def decoder_layers(self) -> tuple[int, ...]:
        """Decoder layer of every MoE layer."""
        return tuple(router.decoder_layer for router in self.routers)

    @property
    def n_experts(self) -> int:
        """E of the largest layer; 0 for a dense model."""
        return max((router.n_experts for router in self.routers), default=0)

    @property
    def top_k(self) -> int:
        """K of the largest layer: the width of the arm's arrays; 0 for a dense model."""
        return max((router.top_k for router in self.routers), default=0)

    @property
    def comparable_layers(self) -> tuple[int, ...]:
        """Indices of the MoE layers of the K that most layers have: expert sets of several sizes are not compared."""
        counts = Counter(router.top_k for router in self.routers)
        common = max(counts, key=lambda k: (counts[k], k), default=0)
        return tuple(i for i, router in enumerate(self.routers) if router.top_k == common)

    @property
    def captured(self) -> Captured | None:
        """How it was captured; None where it was imported."""
        return self.origin if isinstance(self.origin, Captured) else None

    @property
    def facts(self) -> dict[str, Any]:
        """What its engine said of itself; empty where it was imported."""
        return self.origin.facts if isinstance(self.origin, Captured) else {}

    def made_as(self) -> str:
        """Digest of how the arm is made: an arm is never filled by two versions or two checkpoints."""
        if isinstance(self.origin, Imported):
            return digest_of([self.checkpoint, self.origin.content()])
        if self.schema_version == 1:
            made_1 = {"configuration": self.origin.configuration, "versions": self.origin.versions or None}
            return digest_of({**made_1, "loaded": self.facts.get("loaded")})
        made = [self.origin.recipe, self.origin.configuration, self.origin.versions, self.facts.get("loaded")]
        return digest_of([self.checkpoint, self.variant_of, *made])


class Sidecar(Record):
    """What stands beside a data file of a shard, sealed and written last.

    Args:
        data_sha256, n_bytes: of the file.
        tokens_sha256: which tokens it scores.
        made_as: digest of how the arm is made; None for token tables.
    """

    data_sha256: str
    tokens_sha256: str
    n_rows: Count
    n_bytes: Count = 0
    seconds: Number | None = None
    router_dtypes: dict[str, str | None] | None = None
    n_rows_recomputed: Count | None = None
    n_recomputed_otherwise: Count | None = None
    made_as: str | None = None
    worker: str | None = None
    host: str | None = None

    def content(self) -> dict[str, Any]:
        """As JSON holds it: what is known."""
        return self.model_dump(mode="json", exclude_none=True)


R = TypeVar("R", bound=Record)


def write_record(path: Path, record: Record) -> None:
    """Write a record, sealed."""
    write_sealed(path, record.content())


def read_record(path: Path, kind: type[R]) -> R:
    """A sealed record.

    Raises:
        CorruptRunError: missing, changed since it was written, or values that make no sense.
    """
    content = read_sealed(path)
    content.pop("sha256")
    return as_record(content, kind, str(path))


def as_record(content: dict[str, Any], kind: type[R], where: str) -> R:
    """Plain JSON values as a record.

    Raises:
        CorruptRunError: names the file, and the value that is of another kind than expected.
    """
    try:
        return kind.model_validate_json(json.dumps(content))
    except ValidationError as error:
        raise CorruptRunError(f"{where}: {_first(error)}; restore the file or capture again") from None


def check_schema_version(content: dict[str, Any], path: Path, known: tuple[int, ...] = (SCHEMA_VERSION,)) -> int:
    """The schema version of a file.

    Raises:
        SchemaVersionError: none of those known.
    """
    found = content.get("schema_version")
    if type(found) is not int or found not in known:
        advice = "upgrade moediag" if isinstance(found, int) and found > max(known) else "capture the run again"
        expected = " and ".join(map(str, known))
        raise SchemaVersionError(f"{path} has schema_version {short(found)}, this moediag reads {expected}; {advice}")
    return found


def short(value: Any) -> str:
    """A value as messages show it."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _first(error: ValidationError) -> str:
    """The first of what a record lacks or has wrongly, in words."""
    found = error.errors()[0]
    place = ".".join(str(part) for part in found["loc"]) or "the content"
    if found["type"] == "missing":
        return f"lacks {place!r}"
    if found["type"] == "extra_forbidden":
        return f"has {place!r}, which this version does not know"
    if found["type"] == "value_error":
        return f"{place}: {found['ctx']['error']}"
    return f"{place} {found['msg'].replace('Input should', 'should')}, found {short(found['input'])}"
