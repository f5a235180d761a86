"""What a run will do, worked out before any engine starts: tokens, shards, limits, bytes.

Prompts are tokenised once, here, with the checkpoint's own tokenizer; both engines then receive token ids,
so a difference in tokenisation can never enter a pair.
"""

from __future__ import annotations

import math
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import repeat
from pathlib import Path
from typing import Any, Final

from moediag import __version__
from moediag.engines.arms import ArmRequest
from moediag.engines.assemble import token_rows
from moediag.engines.checkpoint import Checkpoint
from moediag.engines.redaction import redact
from moediag.engines.routers import refuse_ambiguous_rule
from moediag.engines.tokenised import check_lengths, map_digest, token_map, tokenise
from moediag.engines.versions import VLLM_CPU, installed
from moediag.errors import CheckpointError, CorruptRunError, EngineError, RunError
from moediag.notation import INFER, NO_TOKEN
from moediag.prompts import read_prompts
from moediag.run.capture import Shard, bytes_per_token, encode_prompts, split_into_shards
from moediag.run.create import bring_back, create_run
from moediag.run.files import digest_of, sha256_bytes
from moediag.run.reader import Run
from moediag.run.records import MANIFEST, Prompts, RunRecord, Sampling, Tokenizer, TokensFrom
from moediag.run.vocabulary import chosen_in
from moediag.run.writer import RunWriter

_SCORE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

VOCABULARY_BYTES_BY_DEFAULT = 64e6
"""Whole distributions are kept unasked where every sequence's fit in so many bytes per arm.

Reading and reducing both arms' then takes seconds (2 x 20 MB: 1.6 s on a busy core), and they are no larger than the
routing of 40,000 tokens of a 48-layer, top-8 model. Byte vocabularies pass with up to 62,000 response tokens; a
vocabulary of 152k would fill the room with 105, so that real models keep distributions only on request.
"""

SequenceTokens = tuple[int, int, list[int], list[int] | None]
"""(prompt_id, sample_index, prompt token ids, given completion token ids or None)."""


@dataclass(frozen=True)
class SamplingOptions:
    """Sampling parameters by vLLM's own names and defaults (temperature 1, no truncation)."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_tokens: int = 256
    n: int = 1
    seed: int = 0
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()

    def check(self) -> SamplingOptions:
        """Return self when vLLM would take the values.

        Raises:
            EngineError: names the value that it would not take.
        """
        allowed = {
            "temperature": ("a finite number >= 0", math.isfinite(self.temperature) and self.temperature >= 0),
            "top_p": ("in (0, 1]", 0 < self.top_p <= 1),
            "top_k": ("-1, 0 (off) or positive", self.top_k >= -1),
            "min_p": ("in [0, 1]", 0 <= self.min_p <= 1),
            "seed": ("in [0, 2^63)", 0 <= self.seed < 2**63),
            "stop_token_ids": ("token ids >= 0", all(token >= 0 for token in self.stop_token_ids)),
        }
        for name, (expected, is_allowed) in allowed.items():
            if not is_allowed:
                raise EngineError(f"sampling parameter {name} = {getattr(self, name)}: expected {expected}")
        return self

    def record(self) -> Sampling:
        """As run.json holds it."""
        return Sampling(**{**asdict(self), "stop_token_ids": self.stop_token_ids or None})

    @property
    def is_neutral(self) -> bool:
        """True when tokens are drawn from the model's own distribution, as KL estimators need."""
        return (self.temperature, self.top_p, self.top_k, self.min_p) in ((1.0, 1.0, 0, 0.0), (1.0, 1.0, -1, 0.0))


@dataclass(frozen=True)
class Plan:
    """A run that could be made: tokenised prompts and what they will cost."""

    checkpoint: Checkpoint
    prompts_path: Path
    prompt_ids: list[list[int]]
    completion_ids: list[list[int]] | None
    sampling: SamplingOptions
    router_logits: str
    shard_size: int
    max_model_len: int
    source_sha256: str
    ignored_keys: tuple[str, ...] = ()
    ids_only: bool = False
    sampled_by: str = INFER
    full_vocab: int = 0
    map_sha256: str | None = None

    @property
    def n_sequences(self) -> int:
        """S: prompts times samples, or one per given completion."""
        return len(self.prompt_ids) * (1 if self.completion_ids else self.sampling.n)

    @property
    def max_token_rows(self) -> int:
        """Largest number of token rows the run can get."""
        return sum(self._longest())

    def _longest(self) -> list[int]:
        """Most token rows of every sequence."""
        if self.completion_ids:
            return [len(p) + len(c) for p, c in zip(self.prompt_ids, self.completion_ids, strict=True)]
        longest = (min(len(p) + self.sampling.max_tokens, self.max_model_len) for p in self.prompt_ids)
        return [length for length in longest for _ in range(self.sampling.n)]

    @property
    def n_vocabulary(self) -> int:
        """V, as config.json has it; 0 where it does not say."""
        return self.checkpoint.n_vocabulary

    def vocabulary_bytes(self, n_chosen: int) -> int:
        """Largest number of bytes that the whole distributions of so many sequences take in one arm."""
        if self.completion_ids:
            lengths = [len(completion) for completion in self.completion_ids]
        else:
            room = (min(self.sampling.max_tokens, self.max_model_len - len(prompt)) for prompt in self.prompt_ids)
            lengths = [length for length in room for _ in range(self.sampling.n)]
        whole = Shard(0, 0, len(lengths))
        chosen = (i * len(lengths) // n_chosen for i in chosen_in(whole, n_chosen, len(lengths)))
        return 4 * self.n_vocabulary * sum(lengths[sequence] for sequence in chosen)

    def max_bytes(self, arms: Sequence[ArmRequest], dtype: str) -> int:
        """Largest number of bytes the arms will write.

        Args:
            arms: only reference arms keep whole distributions.
            dtype: model dtype as requested; routers that score in float32 whatever it is are counted so.
        """
        longest = self._longest()
        n_keeping = sum(request.variant_of is None for request in arms)
        rows = 0
        for arm in arms:
            own = str(arm.options.get("dtype", "auto"))  # float32 arms keep logits twice as wide
            n_rows = sum(longest[: arm.n_shards * self.shard_size if arm.n_shards else None])
            rows += n_rows * self._row_bytes(dtype if own == "auto" else own)
        return rows + 8 * sum(longest) + n_keeping * self.vocabulary_bytes(self.full_vocab)

    def _row_bytes(self, dtype: str) -> int:
        """Bytes of a token row of an arm whose model has a dtype."""
        routing = self.checkpoint.routing
        used = self.checkpoint.stored_dtype if dtype == "auto" else dtype
        in_float32 = routing is not None and routing.scores_in_float32
        keeps_logits = self.router_logits != "none" or (routing is not None and not routing.has_rule)
        logits = 0 if not keeps_logits else 4 if in_float32 else _SCORE_BYTES.get(used, 4)
        layers, k, e = (routing.n_layers, routing.top_k, routing.n_experts) if routing else (0, 0, 0)
        sizes = bytes_per_token(layers, k, e, weight_bytes=4, logits_bytes=logits)
        if self.ids_only:
            sizes = {name: sizes[name] for name in sizes if name in ("logp_T", "entropy_T", "expert_ids_TLK")}
        return sum(sizes.values())

    def configuration(self) -> dict[str, Any]:
        """What makes two runs the same; digests and not paths."""
        return {
            **self.checkpoint.digests,
            "prompts_sha256": digest_of([self.prompt_ids, self.completion_ids]),
            "n_prompts": len(self.prompt_ids),
            **({} if self.completion_ids else self.sampling.record().content()),
            "router_logits": self.router_logits,
            **({"ids_only": True} if self.ids_only else {}),
            **({} if self.sampled_by == INFER else {"sampled_by": self.sampled_by}),
            **({"full_vocab": self.full_vocab} if self.full_vocab else {}),
            "shard_size": self.shard_size,
        }

    def create(self, path: Path, force: bool) -> Run:
        """Create the run directory, or open the one of the same configuration."""
        prompts = encode_prompts(self.prompt_ids, self.completion_ids)
        record = RunRecord(
            moediag_version=__version__,
            configuration=self.configuration(),
            checkpoint=self.checkpoint.record.digest,
            tokenizer=Tokenizer(
                source=redact(self.checkpoint.name),
                files_sha256=self.checkpoint.digests["tokenizer_sha256"],
                map_sha256=self.map_sha256,
            ),
            tokens=TokensFrom(origin="given")
            if self.completion_ids
            else TokensFrom(origin="sampled", arm=self.sampled_by),
            prompts=Prompts(
                n=len(self.prompt_ids),
                data_sha256=sha256_bytes(prompts),
                source=redact(self.prompts_path.name),
                source_sha256=self.source_sha256,
            ),
            sampling=self.sampling.record(),
            level="ids" if self.ids_only else "full" if self.router_logits == "full" else "margins",
            full_vocab=self.full_vocab,
            shards=tuple(split_into_shards(self.n_sequences, self.shard_size)),
        )
        run = create_run(path, record, prompts, self.checkpoint.record, force=force)
        if self.completion_ids:
            try:
                _write_given_tokens(run)
            except BaseException:
                bring_back(path)
                raise
        return run


def make_plan(
    checkpoint: Checkpoint,
    prompts_path: Path,
    sampling: SamplingOptions,
    *,
    limit: int | None = None,
    router_logits: str = "none",
    shard_size: int = 32,
    max_model_len: int | None = None,
    trust_remote_code: bool = False,
    ids_only: bool = False,
    sampled_by: str = INFER,
    full_vocab: int | None = 0,
) -> Plan:
    """Read and tokenise the prompts and check every length.

    Args:
        full_vocab: sequences whose whole next-token distributions infer and train keep; more than there are = all;
            None = all where that is small (:data:`VOCABULARY_BYTES_BY_DEFAULT`), else none.

    Raises:
        PromptsError: unusable file, or a prompt that the model has no room for.
        CheckpointError: the tokenizer does not load, or distributions of a vocabulary of unknown size are requested.
    """
    sampling.check()
    if ids_only and router_logits == "full":
        raise EngineError("--ids-only keeps no router logits: leave --router-logits full out, or --ids-only")
    prompts = read_prompts(prompts_path, limit)
    check_loadable(checkpoint, trust_remote_code)
    prompt_ids = tokenise(checkpoint, prompts, trust_remote_code)
    has_completions = prompts[0].completion_token_ids is not None
    completions = [list(p.completion_token_ids or ()) for p in prompts] if has_completions else None
    room = min(filter(None, (max_model_len, checkpoint.max_length)), default=None)
    check_lengths(prompts, prompt_ids, completions, room)
    needed = max(len(p) for p in prompt_ids) + sampling.max_tokens
    if completions:
        needed = max(len(p) + len(c) for p, c in zip(prompt_ids, completions, strict=True)) + 1
    length = max_model_len or _room(checkpoint, needed)
    # Of the prompts as written, so that runs of models with different tokenizers can be recognised as comparable.
    source = digest_of([prompt.content() for prompt in prompts])
    plan = Plan(
        checkpoint,
        prompts_path,
        prompt_ids,
        completions,
        sampling,
        router_logits,
        shard_size,
        length,
        source,
        tuple(sorted({key for prompt in prompts for key in prompt.ignored_keys})),
        ids_only,
        INFER if has_completions else sampled_by,
        map_sha256=map_digest(token_map(checkpoint, trust_remote_code)),
    )
    return replace(plan, full_vocab=_sequences_with_vocabulary(plan, full_vocab))


def _sequences_with_vocabulary(plan: Plan, n_chosen: int | None) -> int:
    if n_chosen is None:
        n_bytes = plan.vocabulary_bytes(plan.n_sequences)
        return plan.n_sequences if 0 < n_bytes <= VOCABULARY_BYTES_BY_DEFAULT else 0
    if n_chosen and not plan.n_vocabulary:
        raise CheckpointError(
            f"{plan.checkpoint.path}/config.json does not say vocab_size; capture with --full-vocab 0"
        )
    return min(n_chosen, plan.n_sequences)


def needed_length(run: Run, checkpoint: Checkpoint) -> int:
    """Longest sequence of the run that vLLM must have room for [tokens]."""
    sequences = load_prompt_tokens(run)
    if run.record.tokens.origin != "sampled":
        return _room(checkpoint, max(len(p) + len(c or []) for _, _, p, c in sequences) + 1)
    return _room(checkpoint, max(len(p) for _, _, p, _ in sequences) + int(known_sampling(run)["max_tokens"]))


_FLOAT32_ROOM: Final = 1.25
"""Memory that a model in float32 takes over its weights: activations and the KV cache of a few sequences. Ours."""


def why_no_float32(
    checkpoint: Checkpoint, dtype: str, tensor_parallel_size: int = 1, given_room: float | None = None
) -> str:
    """Why both engines cannot, or need not, run the checkpoint once more in float32; empty where they can.

    Args:
        dtype: of the model, as requested.
        given_room: memory that it may take on each device [byte]; None = what is there.
    """
    if (checkpoint.stored_dtype if dtype == "auto" else dtype) == "float32":
        return "both engines run in float32 as it is"
    if checkpoint.record.quantization:
        return "the weights are quantised"
    n_parameters = sum(math.prod(shape) for _, _, shape, _ in checkpoint.tensors)
    return why_too_large(n_parameters, tensor_parallel_size, given_room)


def why_too_large(n_parameters: int, tensor_parallel_size: int = 1, given_room: float | None = None) -> str:
    """Why so many parameters do not fit in float32; empty where they do. Arguments as of :func:`why_no_float32`."""
    needed, (room, where) = _FLOAT32_ROOM * 4 * n_parameters, _memory()
    if given_room is not None:
        room, where = int(given_room), "--float32-memory"
    if room is None:
        return f"how much memory {where} has could not be read"
    if needed > room * tensor_parallel_size:
        return (
            f"{n_parameters / 1e9:,.3g} billion parameters need about {needed / 2**30:,.3g} GiB in float32, {where} "
            f"has {room * tensor_parallel_size / 2**30:,.3g} GiB"
        )
    return ""


def _memory() -> tuple[int | None, str]:
    """Memory for a model [byte] and whose it is: the smallest accelerator's, else what the machine has free."""
    if installed(VLLM_CPU.package) is None and (smi := shutil.which("nvidia-smi")) is not None:
        query = [smi, "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
        found = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split()
        sizes = [int(size) for size in found if size.isdecimal()]
        return (min(sizes) * 2**20 if sizes else None), "the accelerator"
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024, "this machine"
    except (OSError, KeyError, ValueError):
        return None, "this machine"


def known_sampling(run: Run) -> dict[str, Any]:
    """How the run's sequences are sampled; of an imported run what is known, and room for its longest response.

    Raises:
        CorruptRunError: run.json does not say.
    """
    sampling = run.record.sampling.content() if run.record.sampling else {}
    if run.record.tokens.origin == "imported":  # every token is given: nothing is drawn
        longest = max(len(response or []) for _, _, _, response in load_prompt_tokens(run))
        return {"max_tokens": longest, "n": 1, "seed": 0, **sampling}
    lacking = [key for key in ("max_tokens", "n", "seed") if key not in sampling]
    if lacking:
        raise CorruptRunError(
            f"{run.path / MANIFEST} does not say sampling {lacking}, so no arm can join it; restore it"
        )
    return sampling


def load_prompt_tokens(run: Run) -> list[SequenceTokens]:
    """Token ids of every sequence's prompt and given completion, by sequence id; samples of a prompt together.

    Raises:
        CorruptRunError: the prompts file was changed.
        RunError: the run was imported without what an engine needs to score its tokens.
    """
    if run.record.tokens.origin == "imported":
        return [one for shard in run.shards for one in _imported_tokens(run, shard)]
    prompts, completions = run.prompt_tokens()
    n_samples = 1 if completions else int(known_sampling(run)["n"])
    pairs = zip(prompts, completions or repeat(None, len(prompts)), strict=True)
    return [(i, sample, p, c) for i, (p, c) in enumerate(pairs) for sample in range(n_samples)]


def _imported_tokens(run: Run, shard: Shard) -> Iterator[SequenceTokens]:
    """The sequences of an imported run's token table; what a tool wrote in the response is given like the rest."""
    tokens = run.tokens(shard)
    for start, end in tokens.sequence_bounds():
        ids, is_response_T = tokens.token_id_T[start:end], tokens.is_response_T[start:end]
        n_prompt, name = int((~is_response_T).sum()), int(tokens.seq_id_T[start])
        if not n_prompt or (ids == NO_TOKEN).any():
            lacks = "prompt" if not n_prompt else "token ids"
            raise RunError(
                f"{run.path}: sequence {name} lacks its {lacks}, so no engine can score it; import a dump that has them"
            )
        ids_of = (ids[:n_prompt].tolist(), ids[n_prompt:].tolist())
        yield int(tokens.prompt_id_T[start]), int(tokens.sample_index_T[start]), *ids_of


def _room(checkpoint: Checkpoint, needed: int) -> int:
    return min(needed, checkpoint.max_length or needed)


def _write_given_tokens(run: Run) -> None:
    """Given completions: the token table is known before any engine runs."""
    sequences, writer = load_prompt_tokens(run), RunWriter(run)
    for shard in run.shards:
        if not run.has_tokens(shard):
            samples = [
                (p, s, prompt, completion or [])
                for p, s, prompt, completion in (sequences[seq_id] for seq_id in shard.seq_ids)
            ]
            writer.write_tokens(shard, token_rows(shard.seq_ids, samples))


def check_loadable(checkpoint: Checkpoint, trust_remote_code: bool) -> None:
    """Refuse what transformers would not load, and routing that cannot be captured.

    Raises:
        CheckpointError: an unknown architecture, code of the checkpoint unless trusted, entries that vLLM needs, or a
            router that no rule and no taps fit.
    """
    refuse_ambiguous_rule(checkpoint.config, str(checkpoint.path))
    from transformers import CONFIG_MAPPING

    from moediag.engines import bailing_config

    bailing_config.register()
    model_type = str(checkpoint.config.get("model_type"))
    if model_type in CONFIG_MAPPING or (trust_remote_code and "auto_map" in checkpoint.config):
        _ = checkpoint.routing
        return
    if "auto_map" in checkpoint.config:
        raise CheckpointError(
            f"{checkpoint.path}: {model_type} brings code of its own, which is run only with --trust-remote-code"
        )
    raise CheckpointError(
        f"{checkpoint.path}: the installed transformers does not know the architecture {model_type!r} "
        f"({checkpoint.architecture}); check config.json or upgrade transformers"
    )
