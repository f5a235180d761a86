"""Reading a run directory: its records, tokens, captures and pairs.

Layout (schema 2)::

    RUN/run.json                        sealed: what was requested, where the tokens come from, the shard table
    RUN/prompts.parquet                 token ids of prompts and given completions; digest in run.json
    RUN/tokens/shard-00000.parquet      token table of the shard's whole sequences
    RUN/checkpoints/<digest>.json       sealed: a checkpoint that arms loaded; <digest>~<digest>.json: how two differ
    RUN/arms/<arm>/arm.json             sealed: the arm's record
    RUN/arms/<arm>/correction-bias.json sealed: the routers' correction bias, where the rule has one
    RUN/arms/<arm>/shard-00000.safetensors
    RUN/arms/<arm>/shard-00000.vocab.safetensors   whole next-token distributions of chosen sequences, on request
    RUN/arms/<arm>/probes/              what modules received and gave, for chosen sequences
    RUN/.../shard-00000.json            sealed sidecar: sha256, rows, what tokens were scored; written last
    RUN/partials/, RUN/diagnosis/       mergeable results by shard; ladder, findings, verdict
    RUN/analysis/, RUN/summary.json, RUN/figures/, RUN/report.*   derived: made again at any time

Invariants:
    - whatever comes out has been held against its digest and its declared type; damage and nonsense are errors of one
      line that name the file;
    - a shard exists once its sidecar does;
    - runs of schema 1 read the same (:mod:`moediag.run.schema1`);
    - nothing here writes, and nothing here imports an engine.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from moediag.errors import AlignmentError, CorruptRunError, IncompleteRunError, RunError
from moediag.notation import INFER, REFERENCE, TRAIN
from moediag.run import schema1
from moediag.run.align import Pair, PairBlock, align
from moediag.run.capture import Capture, Shard, TokenRows, decode_capture, decode_prompts, decode_tokens
from moediag.run.files import digest_of, read_checked, read_sealed, sha256_bytes
from moediag.run.records import (
    KIND,
    MANIFEST,
    PROMPTS,
    ArmRecord,
    CheckpointRecord,
    Imported,
    Router,
    RunRecord,
    Sidecar,
    WeightsComparison,
    as_record,
    check_schema_version,
    read_record,
    short,
)
from moediag.run.vocabulary import VocabLogps, chosen_in, decode_vocab

BIAS = "correction-bias.json"
"""Beside arm.json: the routers' correction bias as the arm's engine had it."""

DISTRIBUTIONS = "distributions"
"""Among an arm's arrays: whole next-token distributions of some sequences."""

_MINUEND_ORDER = (TRAIN, REFERENCE, INFER)


Result = TypeVar("Result")


class Run:
    """A run directory that exists; :func:`open_run` gives one, :class:`~moediag.run.writer.RunWriter` fills it."""

    def __init__(self, path: Path, record: RunRecord, schema_version: int) -> None:
        self.path = path
        self.record = record
        self.schema_version = schema_version
        self._held: dict[tuple[str, Shard], Any] | None = None

    def __repr__(self) -> str:
        arms = ", ".join(self.arms()) or "no arm yet"
        return f"<moediag run {self.path}: {self.n_sequences} sequences in {len(self.shards)} shards; {arms}>"

    @property
    def shards(self) -> tuple[Shard, ...]:
        """The shard table, the same for every arm."""
        return self.record.shards

    @property
    def n_sequences(self) -> int:
        """S, the sequences of the run."""
        return self.shards[-1].first_sequence + self.shards[-1].n_sequences

    def arms(self) -> list[str]:
        """Names of the arms begun, the reference infer arm first."""
        found = sorted(path.parent.name for path in self.path.glob("arms/*/arm.json"))
        first = self._reference(INFER, found)
        return sorted(found, key=lambda name: (name != first, name))

    def arm(self, name: str) -> ArmRecord:
        """The arm's record.

        Raises:
            IncompleteRunError: the arm was never begun.
            CorruptRunError: changed since it was written, of another arm, or impossible values.
        """
        path = self.arm_folder(name) / "arm.json"
        if not path.exists():
            raise IncompleteRunError(
                f"{self.path} has no arm {name} (found: {', '.join(self.arms()) or 'none'}); "
                f"run: moediag capture {name} CKPT -o {self.path}"
            )
        record = read_record(path, ArmRecord) if self.schema_version > 1 else schema1.arm(self, name, read_sealed(path))
        if record.name != name:
            raise CorruptRunError(f"{path} is of arm {record.name!r}, expected {name!r}; restore it or capture again")
        return record

    def reference(self, role: str) -> str:
        """Name of the arm that a role's other arms repeat or change: the first of the role that is no variant.

        Where none has been begun it is called after its role.
        """
        return self._reference(role, sorted(path.parent.name for path in self.path.glob("arms/*/arm.json"))) or role

    def _reference(self, role: str, names: list[str]) -> str | None:
        if self.record.main_pair is not None:
            declared = self.record.main_pair[0 if role == TRAIN else 1]
            if declared in names and self._has_role(declared, role):
                return declared
        return next((name for name in names if self._has_role(name, role)), None)

    def _has_role(self, name: str, role: str) -> bool:
        try:
            record = self.arm(name)
        except RunError:  # damage is found by whoever reads the arm
            return name == role
        return record.role == role and record.variant_of is None

    @property
    def sampler(self) -> str:
        """The arm that sampled the run's tokens, or else the reference infer arm: what train is compared with."""
        return self.record.tokens.arm or self.reference(INFER)

    @property
    def is_sampled(self) -> bool:
        """Whether the subtrahend of the main pair, here or in the tool that was imported, sampled the run's tokens."""
        origin = self.record.tokens.origin
        return origin == "sampled" or (origin == "imported" and self.arm(self.main_arms[1]).captured is None)

    @property
    def notes(self) -> list[str]:
        """What imports noted of the run's tokens and arms, a sentence each."""
        if self.record.tokens.origin != "imported":
            return []
        origins = [self.arm(name).origin for name in self.arms()]
        noted = [note for origin in origins if isinstance(origin, Imported) for note in origin.notes]
        return list(dict.fromkeys([*self.record.tokens.notes, *noted]))

    @property
    def main_arms(self) -> tuple[str, str]:
        """(minuend, subtrahend) of the main pair: what is trained minus what sampled."""
        return self.record.main_pair or (self.reference(TRAIN), self.sampler)

    def is_routed(self, arm: str) -> bool:
        """True when the arm kept expert ids: a MoE model, observed."""
        return self.arm(arm).is_routed

    @property
    def routers(self) -> tuple[Router, ...]:
        """Routers of the model, as the reference arms or, before these, the run's checkpoint say; empty = dense."""
        names = self.arms()
        for role in (INFER, TRAIN):
            if (name := self.reference(role)) in names and (routers := self.arm(name).routers):
                return routers
        return self.checkpoint(self.record.checkpoint).routers if self.record.checkpoint else ()

    def checkpoint(self, digest: str) -> CheckpointRecord:
        """The record of a checkpoint.

        Raises:
            CorruptRunError: missing or changed.
        """
        if self.schema_version == 1:
            return schema1.checkpoint(self.manifest)
        return read_record(self.path / "checkpoints" / f"{digest}.json", CheckpointRecord)

    def weights_comparison(self, arm_a: str, arm_b: str) -> WeightsComparison | None:
        """How the weights that arm b loaded differ from arm a's.

        Returns:
            None where both loaded the same checkpoint, or nothing is known of how two differ.
        """
        a, b = self.arm(arm_a).checkpoint, self.arm(arm_b).checkpoint
        paths = [self.path / "checkpoints" / f"{x}~{y}.json" for x, y in ((a, b), (b, a))]
        found = next((path for path in paths if path.exists()), None)
        return None if a == b or found is None else read_record(found, WeightsComparison)

    def other_weights(self, minuend: str, subtrahend: str) -> str:
        """How the weights that two arms loaded differ, in words; empty where both loaded the same checkpoint."""
        trained, rolled_out = self.checkpoint_of(minuend), self.checkpoint_of(subtrahend)
        if trained is None or rolled_out is None or trained.digest == rolled_out.digest:
            return ""
        comparison = self.weights_comparison(minuend, subtrahend)
        how = "how they differ was not measured" if comparison is None else comparison.summary
        if comparison is not None and comparison.is_equal:
            how += ", and their config.json differ"
        theirs, ours = (
            one.source + (f", quantised by {one.scheme}" if one.scheme else "") for one in (rolled_out, trained)
        )
        return f"{subtrahend} loaded other weights ({theirs}) than {minuend} ({ours}): {how}"

    def has_comparison(self, a: str, b: str) -> bool:
        """True when it is kept how two checkpoints differ."""
        return any((self.path / "checkpoints" / f"{x}~{y}.json").exists() for x, y in ((a, b), (b, a)))

    def checkpoint_of(self, arm: str) -> CheckpointRecord | None:
        """The checkpoint that an arm loaded; None for an arm without one."""
        digest = self.arm(arm).checkpoint
        return None if digest is None else self.checkpoint(digest)

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """run.json as it lies there."""
        return read_sealed(self.path / MANIFEST)

    def has_tokens(self, shard: Shard) -> bool:
        """True when the shard's token table is committed."""
        return self._is_committed("tokens", shard, ".parquet")

    def has_capture(self, arm: str, shard: Shard) -> bool:
        """True when the arm's arrays for the shard, and its tokens, are committed."""
        folder = f"arms/{arm}"
        if not (self._is_committed(folder, shard, ".safetensors") and self.has_tokens(shard)):
            return False
        return not self.keeps_vocab(arm, shard) or self._is_committed(folder, shard, ".safetensors", ".vocab")

    def shards_of(self, arm: str) -> tuple[Shard, ...]:
        """The shards that the arm covers: the run's, or the first of them."""
        if not (self.arm_folder(arm) / "arm.json").exists():
            return self.shards
        try:
            return self.shards[: self.arm(arm).n_shards]
        except RunError:  # damage is found by whoever reads the arm
            return self.shards

    def missing_shards(self, arm: str) -> list[Shard]:
        """Shards the arm has still to capture, in order."""
        return [shard for shard in self.shards_of(arm) if not self.has_capture(arm, shard)]

    def is_complete(self, arm: str) -> bool:
        """True when every shard that the arm covers is committed."""
        return not self.missing_shards(arm)

    def prompts(self) -> bytes:
        """The tokenised prompts, as parquet.

        Raises:
            IncompleteRunError: the run has none: its tokens were imported.
            CorruptRunError: missing or changed.
        """
        if self.record.prompts is None:
            raise IncompleteRunError(f"{self.path} has no table of prompts: its tokens were imported")
        return read_checked(self.path / PROMPTS, self.record.prompts.data_sha256)

    def prompt_tokens(self) -> tuple[list[list[int]], list[list[int]] | None]:
        """Token ids of every prompt, and of every given completion (None where responses are sampled).

        Raises:
            CorruptRunError: missing, changed, or not a table of prompts.
        """
        return decode_prompts(self.prompts(), str(self.path / PROMPTS))

    def tokens(self, shard: Shard) -> TokenRows:
        """The shard's token table, checked.

        Raises:
            IncompleteRunError: not captured yet.
            CorruptRunError: damaged, or other sequences than the shard table says.
        """
        return self._once("tokens", shard, lambda: self._decoded_tokens(shard))

    def _decoded_tokens(self, shard: Shard) -> TokenRows:
        data, sidecar, path = self._read("tokens", shard, ".parquet", self.sampler)
        tokens = decode_tokens(data, str(path))
        # length first: a shard table may claim more sequences than any memory holds
        found = np.unique(tokens.seq_id_T)
        is_whole = len(found) == shard.n_sequences and np.array_equal(found, np.array(shard.seq_ids))
        if not is_whole or len(tokens) != sidecar.n_rows:
            raise CorruptRunError(f"{path} does not hold sequences {shard.seq_ids.start}..{shard.seq_ids.stop - 1}")
        return tokens

    def capture(self, arm: str, shard: Shard) -> Capture:
        """The arm's arrays for the shard, checked against its sidecar.

        Raises:
            IncompleteRunError: not captured yet.
            CorruptRunError: damaged.
        """

        def decoded() -> Capture:
            data, _, path = self._read(f"arms/{arm}", shard, ".safetensors", arm)
            capture = decode_capture(data, str(path))
            for array in capture.arrays().values():
                array.flags.writeable = self._held is None  # while it is held others read the same arrays
            return capture

        return self._once(f"arms/{arm}", shard, decoded)

    @contextmanager
    def holding(self) -> Iterator[None]:
        """Meanwhile a shard's tokens, and an arm's arrays for it, are read once for all who ask."""
        self._held = {}
        try:
            yield
        finally:
            self._held = None

    def _once(self, folder: str, shard: Shard, read: Callable[[], Result]) -> Result:
        if self._held is None:
            return read()
        if (folder, shard) not in self._held:
            self._held[folder, shard] = read()
        found: Result = self._held[folder, shard]
        return found

    def vocab_sequences(self, arm: str, shard: Shard) -> NDArray[np.int64]:
        """Sequences of the shard whose whole next-token distributions the arm keeps; most arms keep none."""
        n_chosen = self._n_chosen(arm)
        which = chosen_in(shard, n_chosen, self.n_sequences)
        return (np.array(which, dtype=np.int64) * self.n_sequences) // max(n_chosen, 1)

    def keeps_vocab(self, arm: str, shard: Shard) -> bool:
        """True when the arm keeps whole distributions of a sequence of the shard."""
        return len(chosen_in(shard, self._n_chosen(arm), self.n_sequences)) > 0

    def _n_chosen(self, arm: str) -> int:
        if not self.record.full_vocab or not (self.arm_folder(arm) / "arm.json").exists():
            return 0
        return min(self.record.full_vocab, self.n_sequences) if DISTRIBUTIONS in self.arm(arm).arrays else 0

    def load_vocab(self, arm: str, shard: Shard) -> VocabLogps | None:
        """Whole next-token distributions behind the response tokens of the shard's chosen sequences.

        Large: 4 bytes for every token of the vocabulary and row. Nothing loads them unless requested here.

        Returns:
            Rows of the shard's token table and their distributions; None where the arm keeps none in this shard.

        Raises:
            IncompleteRunError: not captured yet.
            CorruptRunError: damaged.
        """
        if not self.keeps_vocab(arm, shard):
            return None
        data, _, path = self._read(f"arms/{arm}", shard, ".safetensors", arm, ".vocab")
        return decode_vocab(data, str(path))

    def correction_bias(self, arm: str) -> NDArray[np.float32] | None:
        """The routers' correction bias by MoE layer and expert, (L, E), as the arm's engine had it.

        Returns:
            None where the rule has no bias, or the arm was captured before biases were kept.

        Raises:
            CorruptRunError: missing, changed, or not (L, E) numbers.
        """
        record = self.arm(arm)
        if record.correction_bias_sha256 is None:
            return None
        path = self.arm_folder(arm) / BIAS
        rows = read_sealed(path).get("bias_LE")
        if digest_of(rows) != record.correction_bias_sha256:
            raise CorruptRunError(f"{path} is not the bias that arm.json tells of; restore it or capture {arm} again")
        try:
            bias_LE = np.array(rows, dtype=np.float32)
        except (TypeError, ValueError):
            bias_LE = np.zeros(0, dtype=np.float32)
        if bias_LE.shape != (len(record.routers), record.n_experts) or not np.isfinite(bias_LE).all():
            raise CorruptRunError(f"{path} does not hold (MoE layers, experts) finite numbers; capture {arm} again")
        return bias_LE

    def capture_sidecar(self, arm: str, shard: Shard) -> Sidecar:
        """Sidecar of the arm's shard: digest, rows, tokens scored, bytes, seconds."""
        return read_record(self.sidecar_path(f"arms/{arm}", shard), Sidecar)

    def router_dtypes(self, arm: str) -> dict[str, str | None] | None:
        """Dtypes of the routers' stages; vLLM's are known once a step has run: they stand beside the first shard."""
        dtypes: dict[str, str | None] | None = self.arm(arm).facts.get("router_dtypes")
        if dtypes or not self.has_capture(arm, self.shards[0]):
            return dtypes
        return self.capture_sidecar(arm, self.shards[0]).router_dtypes

    def tokens_digest(self, shard: Shard) -> str:
        """Digest of which tokens the shard holds (content, not file bytes)."""
        return read_record(self.sidecar_path("tokens", shard), Sidecar).tokens_sha256

    def arm_folder(self, arm: str) -> Path:
        """Where an arm's files are."""
        return self.path / "arms" / arm

    def sidecar_path(self, folder: str, shard: Shard, part: str = "") -> Path:
        """Where a shard's sidecar is; its data lies beside it."""
        return self.path / folder / f"{shard.stem}{part}.json"

    def _is_committed(self, folder: str, shard: Shard, suffix: str, part: str = "") -> bool:
        sidecar = self.sidecar_path(folder, shard, part)
        return sidecar.exists() and sidecar.with_suffix(suffix).exists()

    def _read(self, folder: str, shard: Shard, suffix: str, arm: str, part: str = "") -> tuple[bytes, Sidecar, Path]:
        sidecar = self.sidecar_path(folder, shard, part)
        path = sidecar.with_suffix(suffix)
        if not sidecar.exists():
            raise IncompleteRunError(f"{path} has not been captured; run: moediag capture {arm} CKPT -o {self.path}")
        facts = read_record(sidecar, Sidecar)
        return read_checked(path, facts.data_sha256), facts, path

    # Pairs

    def minuend_first(self, arm_a: str, arm_b: str) -> tuple[str, str]:
        """(minuend, subtrahend) of ``logp_diff``: train minus infer where roles say so, else a minus b."""
        a, b = (_MINUEND_ORDER.index(self.arm(arm).role) for arm in (arm_a, arm_b))
        return (arm_b, arm_a) if b < a else (arm_a, arm_b)

    def pair_name(self, arm_a: str, arm_b: str) -> str:
        """Name of the pair of two arms: ``subtrahend~minuend``, as in ``infer~train``."""
        minuend, subtrahend = self.minuend_first(arm_a, arm_b)
        return f"{subtrahend}~{minuend}"

    def pair(
        self,
        arm_a: str,
        arm_b: str,
        with_logits: bool = False,
        seq_ids: Collection[int] | None = None,
        shards: Collection[Shard] | None = None,
    ) -> Pair:
        """Two arms as a pair on the shards that both cover; train minus infer where roles say so, else a minus b.

        Args:
            with_logits: let the blocks hold router logits, where both arms kept them.
            seq_ids: read only the shards that hold one of these sequences; None = all.
            shards: read only these; None = all.

        Raises:
            IncompleteRunError: an arm is missing or has missing shards.
        """
        minuend, subtrahend = self.minuend_first(arm_a, arm_b)
        for arm in (minuend, subtrahend):
            missing = self.missing_shards(arm)
            if missing:
                raise IncompleteRunError(
                    f"{self.path}: arm {arm} lacks {len(missing)} of {len(self.shards_of(arm))} shards (first: "
                    f"{missing[0].stem}); run the same capture again to complete it"
                )
        routing = _CommonRouting.of(self.arm(minuend), self.arm(self.routes_of(minuend, subtrahend)))
        read = min(self.shards_of(minuend), self.shards_of(subtrahend), key=len)
        if seq_ids is not None:
            read = tuple(shard for shard in read if not set(seq_ids).isdisjoint(shard.seq_ids))
        if shards is not None:
            read = tuple(shard for shard in read if shard in shards)

        def read_blocks() -> Iterator[PairBlock]:
            return (self._block(minuend, subtrahend, routing, shard, with_logits) for shard in read)

        return Pair(
            name=f"{subtrahend}~{minuend}",
            minuend=minuend,
            subtrahend=subtrahend,
            decoder_layer_L=routing.decoder_layers,
            n_experts=routing.n_experts,
            top_k=routing.top_k,
            read_blocks=read_blocks,
            left_out=routing.left_out,
        )

    def routes_of(self, minuend: str, subtrahend: str) -> str:
        """The arm whose routes stand for the subtrahend's.

        Where the sampler, unobserved, stands beside a train arm these are the observed arm's, which decoded the very
        tokens that the sampler drew. It is the nearest that can be known of the sampler's routes; the
        log-probabilities stay the sampler's own.
        """
        record = self.arm(subtrahend)
        observed = record.variant_of
        if record.change != "observation" or observed is None or self.arm(minuend).role != TRAIN:
            return subtrahend
        is_there = observed in self.arms() and self.is_routed(observed) and self.is_complete(observed)
        return observed if is_there and not record.is_routed and self.is_routed(minuend) else subtrahend

    def _block(
        self, minuend: str, subtrahend: str, routing: _CommonRouting, shard: Shard, with_logits: bool
    ) -> PairBlock:
        """Align one shard of two arms; router logits only on request.

        Raises:
            AlignmentError: an arm scored other tokens than the run's token table holds.
        """
        where = f"{self.path} {subtrahend}~{minuend} {shard.stem}"
        for arm in (minuend, subtrahend):
            if self.capture_sidecar(arm, shard).tokens_sha256 != self.tokens_digest(shard):
                raise AlignmentError(
                    f"{where}: arm {arm} scored other tokens than {MANIFEST}'s token table holds; "
                    f"delete arms/{arm} and capture it again"
                )
        ours, theirs = (self.readable(arm, shard) for arm in (minuend, subtrahend))
        routes = self.routes_of(minuend, subtrahend)
        if routes != subtrahend:
            theirs = replace(self.readable(routes, shard), logp_T=theirs.logp_T, entropy_T=theirs.entropy_T)
        ours, theirs = routing.select(ours, 0), routing.select(theirs, 1)
        return align(self.tokens(shard), ours, theirs, where, with_logits)

    def readable(self, arm: str, shard: Shard) -> Capture:
        """A capture whose arrays are of the arm's layers and experts; what no ``--force`` gets past.

        Raises:
            AlignmentError: they are not.
        """
        record, capture = self.arm(arm), self.capture(arm, shard)
        sizes = {"L": len(record.routers), "K": record.top_k, "E": record.n_experts}
        where = f"{self.path} {arm} {shard.stem}"
        for name, array in capture.arrays().items():
            expected = tuple(sizes[letter] for letter in name.rpartition("_")[2][1:])
            if array.shape[1:] != expected:
                raise AlignmentError(
                    f"{where}: {name} is {array.shape[1:]} per token, arm.json says {expected}; capture it again"
                )
        ids_TLK = capture.expert_ids_TLK
        if (ids_TLK is not None) != record.is_routed or (
            ids_TLK is not None and ids_TLK.max(initial=-1) >= record.n_experts
        ):
            raise AlignmentError(f"{where}: its expert ids are not those of arm.json's routers; capture it again")
        return capture


@dataclass(frozen=True)
class _CommonRouting:
    """The MoE layers that two arms are compared in.

    Args:
        decoder_layers: their decoder layers.
        places: where they stand in the arrays of the minuend, and of the subtrahend.
        left_out: why nothing, or not all, is compared.
    """

    decoder_layers: tuple[int, ...] = ()
    places: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
    n_experts: int = 0
    top_k: int = 0
    left_out: dict[str, str] = field(default_factory=dict)

    @staticmethod
    def of(ours: ArmRecord, theirs: ArmRecord) -> _CommonRouting:
        """Layers of the same decoder layer, E and K on both sides."""
        unseen = [side.name for side in (ours, theirs) if not side.is_routed]
        if unseen:
            if len(unseen) == 1:
                return _CommonRouting(left_out={"routing": f"{unseen[0]} kept no expert ids"})
            if None in (ours.captured, theirs.captured):  # nothing shows that the model is dense
                return _CommonRouting(left_out={"routing": f"neither {ours.name} nor {theirs.name} kept expert ids"})
            return _CommonRouting()
        found = [
            {(side.routers[i].decoder_layer, side.routers[i].n_experts, side.routers[i].top_k): i
             for i in side.comparable_layers}
            for side in (ours, theirs)
        ]  # fmt: skip
        common = sorted(found[0].keys() & found[1].keys())
        every = {*ours.decoder_layers, *theirs.decoder_layers}
        left_out = {}
        if unlike := sorted(every - {layer for layer, _, _ in common}):
            left_out["routing"] = (
                f"{len(unlike)} of {len(every)} MoE layers are not compared: {ours.name} and {theirs.name} differ in "
                "E, in K or in having them, or their K is not that of the other layers (first: decoder layer "
                f"{unlike[0]})"
            )
        return _CommonRouting(
            tuple(layer for layer, _, _ in common),
            (tuple(found[0][key] for key in common), tuple(found[1][key] for key in common)),
            max((n_experts for _, n_experts, _ in common), default=0),
            max((top_k for _, _, top_k in common), default=0),
            left_out,
        )

    def select(self, capture: Capture, side: int) -> Capture:
        """A capture of the minuend (0) or the subtrahend (1) in the common layers."""
        if not self.decoder_layers:
            return capture.unrouted()
        return capture.of_layers(self.places[side], self.top_k, self.n_experts)


def open_run(path: str | Path) -> Run:
    """Open a run directory for reading.

    Raises:
        RunError: not a run directory.
        CorruptRunError: its manifest was changed, or makes no sense.
        SchemaVersionError: written by a newer schema version.
    """
    folder = Path(path)
    manifest = folder / MANIFEST
    if not manifest.is_file():
        raise RunError(f"{folder} is not a moediag run directory (no {MANIFEST}); make one with: moediag profile")
    content = read_sealed(manifest)
    if content.get("kind") != KIND:
        raise RunError(
            f"{manifest} is of kind {short(content.get('kind'))}, expected {KIND!r}; point to a run directory"
        )
    version = check_schema_version(content, manifest, (1, 2))
    content.pop("sha256")
    if version == 1:
        return Run(folder, schema1.run(content, str(manifest)), 1)
    return Run(folder, as_record(content, RunRecord, str(manifest)), version)


def tokens_sha256(tokens: TokenRows) -> str:
    """Digest of which tokens stand where; file format and compression do not enter."""
    columns = [tokens.seq_id_T, tokens.position_T, tokens.token_id_T, tokens.is_response_T]
    return sha256_bytes(b"".join(np.ascontiguousarray(column, dtype="<i8").tobytes() for column in columns))
