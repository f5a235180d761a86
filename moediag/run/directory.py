"""The run directory: one model, one prompt set, one token table, several arms.

    RUN/run.json                        sealed: what was asked for, the model, the shard table
    RUN/prompts.parquet                 token ids of prompts and given completions; digest in run.json
    RUN/tokens/shard-00000.parquet      token table of the shard's whole sequences
    RUN/arms/<arm>/arm.json             sealed: engine, versions, dtypes, options
    RUN/arms/<arm>/correction-bias.json sealed: the routers' correction bias, where the rule has one
    RUN/arms/<arm>/shard-00000.safetensors
    RUN/arms/<arm>/shard-00000.vocab.safetensors   whole next-token distributions of chosen sequences, on request
    RUN/.../shard-00000.json            sealed sidecar: sha256, rows, what tokens were scored; written last

Invariants:
    - a shard exists once its sidecar does, and the sidecar is written after the data, so a kill leaves
      whole shards only. Sidecars, and not a table in arm.json, hold the digests: workers never write the
      same file, and merging two partial runs is a plain copy;
    - arms and analyses are added, never rewritten in place; another configuration is an error;
    - nothing here imports an engine.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from moediag.errors import AlignmentError, CorruptRunError, IncompleteRunError, RunConflictError
from moediag.notation import INFER, TRAIN, engine_side, minuend_first, pair_name
from moediag.run import claims, codec
from moediag.run.align import Pair, PairBlock, align
from moediag.run.capture import Capture, TokenRows
from moediag.run.files import (
    digest_of,
    host_tag,
    make_folder,
    remove_leftovers,
    sha256_bytes,
    write_atomic,
    write_sealed,
)
from moediag.run.layout import BIAS, RunFiles
from moediag.run.manifest import (
    KIND,
    MANIFEST,
    PROMPTS,
    check_schema_version,
    read_manifest,
    read_sidecar,
    refuse_other_configuration,
)
from moediag.run.shards import WHOLE, Shard, Slice
from moediag.run.vocabulary import VocabLogps, encode_vocab

__all__ = [
    "KIND",
    "MANIFEST",
    "PROMPTS",
    "Run",
    "Shard",
    "check_schema_version",
    "make_folder",
    "open_run",
    "refuse_other_configuration",
    "tokens_sha256",
]

CLAIMS = ".claims"
"""Folder of the claim files, empty or absent when nobody captures."""

_MADE_AS = ("configuration", "versions", "loaded")
"""What of arm.json is the same for every shard of an arm."""


class Run(RunFiles):
    """A run directory that exists; :func:`open_run` gives one."""

    def block(self, minuend: str, subtrahend: str, shard: Shard, with_logits: bool = False) -> PairBlock:
        """Align one shard of two arms; router logits only on request.

        Raises:
            AlignmentError: an arm scored other tokens than the run's token table holds.
        """
        where = f"{self.path} {pair_name(minuend, subtrahend)} {shard.stem}"
        for arm in (minuend, subtrahend):
            if self.capture_sidecar(arm, shard)["tokens_sha256"] != self.tokens_digest(shard):
                raise AlignmentError(
                    f"{where}: arm {arm} scored other tokens than {MANIFEST}'s token table holds; "
                    f"delete arms/{arm} and capture it again"
                )
        minuend_capture, subtrahend_capture = (
            self._readable(arm, shard, self.capture(arm, shard)) for arm in (minuend, subtrahend)
        )
        if self._borrows_routes(minuend, subtrahend):
            observed = self._readable(INFER, shard, self.capture(INFER, shard))
            own = subtrahend_capture
            subtrahend_capture = replace(observed, logp_T=own.logp_T, entropy_T=own.entropy_T)
        if minuend_capture.is_routed != subtrahend_capture.is_routed:  # one arm was not observed
            minuend_capture, subtrahend_capture = minuend_capture.unrouted(), subtrahend_capture.unrouted()
        return align(self.tokens(shard), minuend_capture, subtrahend_capture, where, with_logits)

    def _borrows_routes(self, minuend: str, subtrahend: str) -> bool:
        """Whether the sampler, unobserved, stands beside a train arm: its routes are those of infer.

        Infer decoded the very tokens that the sampler drew, under observation. It is the nearest that can be known of
        the sampler's routes; the log-probabilities stay the sampler's own.
        """
        is_unobserved = subtrahend == self.sampler != INFER and not self.is_routed(subtrahend)
        return is_unobserved and self.is_routed(minuend) and engine_side(minuend) == TRAIN and self.is_complete(INFER)

    def _readable(self, arm: str, shard: Shard, capture: Capture) -> Capture:
        """The capture, when its arrays are of the model's layers and experts; what no ``--force`` gets past.

        Raises:
            AlignmentError: they are not.
        """
        n_layers, top_k = len(self.decoder_layers), int((self.model["routing"] or {}).get("top_k", 0))
        wanted = {
            "expert_ids_TLK": (n_layers, top_k),
            "gate_weights_TLK": (n_layers, top_k),
            "margin_TL": (n_layers,),
            "logit_margin_TL": (n_layers,),
            "router_logits_TLE": (n_layers, self.n_experts),
        }
        where = f"{self.path} {arm} {shard.stem}"
        for name, array in capture.arrays().items():
            if name in wanted and array.shape[1:] != wanted[name]:
                raise AlignmentError(
                    f"{where}: {name} is {array.shape[1:]} per token, {MANIFEST} says {wanted[name]}; capture it again"
                )
        ids_TLK = capture.expert_ids_TLK
        if (ids_TLK is not None) != self.is_routed(arm) or (
            ids_TLK is not None and ids_TLK.max(initial=-1) >= self.n_experts
        ):
            raise AlignmentError(f"{where}: its expert ids are not those of {MANIFEST}'s model; capture it again")
        return capture

    def pair(self, arm_a: str, arm_b: str, with_logits: bool = False) -> Pair:
        """Two arms as a pair; the order does not matter, the sign is train minus infer.

        Args:
            with_logits: let the blocks hold router logits, where both arms kept them.

        Raises:
            IncompleteRunError: an arm is missing or has missing shards.
        """
        minuend, subtrahend = minuend_first(arm_a, arm_b)
        for arm in (minuend, subtrahend):
            self.arm(arm)
            missing = self.missing_shards(arm)
            if missing:
                raise IncompleteRunError(
                    f"{self.path}: arm {arm} lacks {len(missing)} of {len(self.shards)} shards (first: "
                    f"{missing[0].stem}); run the same capture again to complete it"
                )

        def read_blocks() -> Iterator[PairBlock]:
            return (self.block(minuend, subtrahend, shard, with_logits) for shard in self.shards)

        is_routed = self.is_routed(minuend) and (
            self.is_routed(subtrahend) or self._borrows_routes(minuend, subtrahend)
        )
        routing = (self.model["routing"] or {}) if is_routed else {}
        return Pair(
            name=pair_name(minuend, subtrahend),
            minuend=minuend,
            subtrahend=subtrahend,
            decoder_layer_L=self.decoder_layers if is_routed else (),
            n_experts=self.n_experts if is_routed else 0,
            top_k=int(routing.get("top_k", 0)),
            read_blocks=read_blocks,
        )

    def begin_arm(self, name: str, record: dict[str, Any], bias_LE: list[list[float]] | None = None) -> None:
        """Write arm.json, or check that the arm begun before was made the same way.

        Workers that begin an arm at the same instant take turns: one writes, the others compare.

        Args:
            record: ``configuration``, and what the engine says of itself (versions, dtypes, kernels) where one has
                been started: an arm is never filled by two versions.
            bias_LE: the routers' correction bias as the engine has it (float32); written before arm.json, which
                holds its digest.

        Raises:
            RunConflictError: it was made another way.
        """
        folder = self._arm_folder(name)
        if not (folder / "arm.json").exists():
            with claims.claim(self._claim_file(name, "arm"), wait=True):
                make_folder(folder)
                remove_leftovers(folder, "arm.json")
                remove_leftovers(folder, BIAS)
                if not (folder / "arm.json").exists():
                    if bias_LE is not None:
                        write_sealed(folder / BIAS, {"kind": "moediag correction bias", "bias_LE": bias_LE})
                        record = {**record, "correction_bias_sha256": digest_of(bias_LE)}
                    write_sealed(folder / "arm.json", {"kind": "moediag arm", "arm": name, **record})
                    return
        there = self.arm(name)
        for part in _MADE_AS:
            if part in record:
                refuse_other_configuration(there.get(part) or {}, record[part], f"arm {name} of {self.path}")

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Keep ``--force`` of another process from removing the run while this one writes to it.

        Raises:
            RunConflictError: the run was replaced since it was opened.
        """
        path = self.path / MANIFEST
        try:
            file = path.open("rb")
        except OSError as error:
            raise RunConflictError(f"{path} has gone ({error.strerror}); was the run started anew?") from None
        try:
            claims.lock(file, path, exclusive=False, wait=True)
            if not claims.is_at(file, path) or read_manifest(self.path) != self.manifest:
                raise RunConflictError(f"{self.path} was started anew by another process; run the same command again")
            yield
        finally:
            claims.release(file)

    @contextmanager
    def claim(self, arm: str, shard: Shard) -> Iterator[bool]:
        """Hold one shard of an arm while it is captured; gives False when another process holds it.

        What a killed holder left of this shard is removed: nobody else writes files of that name.
        """
        with claims.claim(self._claim_file(arm, shard.stem)) as is_mine:
            if is_mine:
                remove_leftovers(self._arm_folder(arm), shard.stem)
                if arm == INFER:  # only the infer arm writes tokens
                    remove_leftovers(self.path / "tokens", shard.stem)
            yield is_mine

    def is_claimed(self, arm: str, shard: Shard) -> bool:
        """True while a living process of this file system captures the shard."""
        return claims.is_claimed(self._claim_file(arm, shard.stem))

    def remove_dead_claims(self, arm: str) -> None:
        """Remove claim files that killed workers left of shards that are committed by now: nobody wants those."""
        for path in (self.path / CLAIMS).glob(f"{arm}.*"):
            if path.name not in {f"{arm}.{shard.stem}" for shard in self.missing_shards(arm)}:
                with claims.claim(path):
                    pass

    def write_tokens(self, shard: Shard, tokens: TokenRows) -> None:
        """Commit the shard's token table; the same table again changes nothing, so that readers are not disturbed."""
        data = codec.encode_tokens(tokens.check(shard.stem))
        facts = {"n_rows": len(tokens), "tokens_sha256": tokens_sha256(tokens)}
        with claims.claim(self._claim_file("tokens", shard.stem), wait=True):
            if not self._holds("tokens", shard, ".parquet", data):
                self._commit("tokens", shard, ".parquet", data, facts)

    def write_capture(
        self,
        arm: str,
        shard: Shard,
        tokens: TokenRows,
        capture: Capture,
        facts: dict[str, Any],
        dtypes: dict[str, str],
        vocab: VocabLogps | None = None,
    ) -> None:
        """Commit an arm's arrays for a shard, saying which tokens they score and who made them.

        Args:
            vocab: distributions of the shard's chosen sequences; committed first, so that a shard that is there has
                them.
        """
        data = codec.encode_capture(capture, self.n_experts, dtypes)
        facts = {**facts, "n_rows": len(tokens), "tokens_sha256": tokens_sha256(tokens)}
        made = {"made_as": self.made_as(arm), "worker": str(self.worker), "host": host_tag()}
        if vocab is not None:
            of_vocab = {"n_rows": len(vocab), "tokens_sha256": facts["tokens_sha256"], **made}
            self._commit(f"arms/{arm}", shard, ".safetensors", encode_vocab(vocab), of_vocab, ".vocab")
        self._commit(f"arms/{arm}", shard, ".safetensors", data, {**facts, **made})

    def made_as(self, arm: str) -> str:
        """Digest of how the arm is made; merged from two machines, every shard must say the same as arm.json."""
        record = self.arm(arm)
        return digest_of({part: record.get(part) for part in _MADE_AS})

    def _claim_file(self, arm: str, what: str) -> Path:
        return self.path / CLAIMS / f"{arm}.{what}"

    def _holds(self, folder: str, shard: Shard, suffix: str, data: bytes) -> bool:
        """True when exactly these bytes are committed."""
        sidecar = self._sidecar(folder, shard)
        if not self._is_committed(folder, shard, suffix) or sidecar.with_suffix(suffix).read_bytes() != data:
            return False
        try:
            return bool(read_sidecar(sidecar)["data_sha256"] == sha256_bytes(data))
        except CorruptRunError:
            return False

    def _commit(
        self, folder: str, shard: Shard, suffix: str, data: bytes, facts: dict[str, Any], part: str = ""
    ) -> None:
        sidecar = self._sidecar(folder, shard, part)
        sidecar.unlink(missing_ok=True)  # a sidecar never describes data other than the data beside it
        write_atomic(sidecar.with_suffix(suffix), data)
        write_sealed(sidecar, {**facts, "data_sha256": sha256_bytes(data), "n_bytes": len(data)})


def open_run(path: str | Path, worker: Slice = WHOLE) -> Run:
    """Open a run directory for reading or adding arms.

    Args:
        worker: the slice of the run that this process fills, when it fills one.

    Raises:
        RunError: not a run directory.
        CorruptRunError: its manifest was changed, or makes no sense.
        SchemaVersionError: written by another schema version.
    """
    folder = Path(path)
    return Run(folder, read_manifest(folder), worker)


def tokens_sha256(tokens: TokenRows) -> str:
    """Digest of which tokens stand where; file format and compression do not enter."""
    columns = [tokens.seq_id_T, tokens.position_T, tokens.token_id_T, tokens.is_response_T]
    return sha256_bytes(b"".join(np.ascontiguousarray(column, dtype="<i8").tobytes() for column in columns))
