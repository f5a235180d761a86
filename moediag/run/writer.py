"""Filling a run directory: arms begun, shards committed, claims held. The layout is in :mod:`moediag.run.reader`.

Invariants:
    - a shard exists once its sidecar does, and the sidecar is written after the data, so a kill leaves
      whole shards only. Sidecars, and not a table in arm.json, hold the digests: workers never write the
      same file, and merging two partial runs is a plain copy;
    - arms and analyses are added, never rewritten in place, unless nothing was captured yet; another configuration is
      an error;
    - a run of schema 1 is never continued.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from moediag.errors import CorruptRunError, RunConflictError, SchemaVersionError
from moediag.notation import SCHEMA_VERSION
from moediag.run import claims, store
from moediag.run.capture import WHOLE, Capture, Shard, Slice, TokenRows, encode_capture, encode_tokens
from moediag.run.files import (
    digest_of,
    host_tag,
    make_folder,
    read_checked,
    read_sealed,
    remove_leftovers,
    sha256_bytes,
    write_atomic,
    write_sealed,
)
from moediag.run.reader import BIAS, DISTRIBUTIONS, Run, open_run, tokens_sha256
from moediag.run.records import (
    MANIFEST,
    ArmRecord,
    Captured,
    CheckpointRecord,
    Sidecar,
    WeightsComparison,
    read_record,
    write_record,
)
from moediag.run.vocabulary import VocabLogps, encode_vocab

CLAIMS = ".claims"
"""Folder of the claim files, empty or absent when nobody captures."""


class RunWriter:
    """Fills a run.

    Args:
        run: the run; of today's schema.
        worker: the slice of it that this process fills.
    """

    def __init__(self, run: Run, worker: Slice = WHOLE) -> None:
        self.run = run
        self.worker = worker
        self._made_as: dict[str, str] = {}
        self.seconds: defaultdict[str, float] = defaultdict(float)
        """What filling took until now, by stage [s]."""

    def refuse_earlier_schema(self) -> None:
        """Refuse a run that can be read and analysed, but not continued.

        Raises:
            SchemaVersionError: it is one.
        """
        if self.run.schema_version != SCHEMA_VERSION:
            raise SchemaVersionError(
                f"{self.run.path} was made by an earlier moediag (schema_version {self.run.schema_version}): it can be "
                "analysed, but no arm can be added to it; capture into another folder with -o"
            )

    def own_missing_shards(self, arm: str) -> list[Shard]:
        """Those of the arm's missing shards that are this worker's to take."""
        return [shard for shard in self.run.missing_shards(arm) if self.worker.has(shard)]

    def add_checkpoint(self, record: CheckpointRecord) -> None:
        """Keep a checkpoint's record; the same again changes nothing."""
        path = self.run.path / "checkpoints" / f"{record.digest}.json"
        if not path.exists():
            write_record(path, record)

    def add_comparison(self, comparison: WeightsComparison) -> None:
        """Keep how two checkpoints differ."""
        write_record(self.run.path / "checkpoints" / f"{comparison.a}~{comparison.b}.json", comparison)

    def begin_arm(self, record: ArmRecord, bias_LE: list[list[float]] | None = None) -> ArmRecord:
        """Write arm.json, or check that the arm begun before was made the same way.

        Workers that begin an arm at the same instant take turns: one writes, the others compare. An arm begun another
        way that holds no shard, and that nobody fills, is begun anew.

        Args:
            bias_LE: the routers' correction bias as the engine has it (float32); written before arm.json, which
                holds its digest.

        Raises:
            RunConflictError: it was made another way.
            SchemaVersionError: the run is of an earlier schema.
        """
        self.refuse_earlier_schema()
        run, name = self.run, record.name
        folder = run.arm_folder(name)
        if bias_LE is not None:
            record = record.model_copy(update={"correction_bias_sha256": digest_of(bias_LE)})
        with claims.claim(self._claim_file(name, "arm"), wait=True):
            make_folder(folder)
            path = folder / "arm.json"
            if path.exists():
                there = run.arm(name)
                if there.made_as() == record.made_as():
                    self._made_as[name] = there.made_as()
                    return there
                if any(folder.glob("shard-*.json")) or self._is_being_filled(name):
                    self.refuse_other(there, record)
            remove_leftovers(folder, "arm.json")
            remove_leftovers(folder, BIAS)
            if bias_LE is not None:
                write_sealed(folder / BIAS, {"kind": "moediag correction bias", "bias_LE": bias_LE})
            write_record(path, record)
            self._made_as[name] = record.made_as()
        return record

    def widen_arm(self, arm: str, n_shards: int | None) -> None:
        """Have an arm that was begun for the run's first shards cover more of them.

        Args:
            n_shards: so many at least; None = all.
        """
        with claims.claim(self._claim_file(arm, "arm"), wait=True):
            there = self.run.arm(arm)
            if there.n_shards is not None and (n_shards is None or n_shards > there.n_shards):
                write_record(self.run.arm_folder(arm) / "arm.json", there.model_copy(update={"n_shards": n_shards}))

    def refuse_other_request(
        self,
        arm: str,
        recipe: str,
        variant_of: str | None,
        checkpoint: CheckpointRecord,
        configuration: dict[str, Any],
    ) -> None:
        """Refuse what is requested of an arm that is there, where it was made of something else and holds a shard.

        Raises:
            RunConflictError: names what differs.
        """
        there = self.run.arm(arm)
        if not any(self.run.arm_folder(arm).glob("shard-*.json")):
            return
        given = there.model_copy(
            update={
                "checkpoint": checkpoint.digest,
                "variant_of": variant_of,
                "origin": (there.captured or Captured(recipe=recipe, configuration={})).model_copy(
                    update={"recipe": recipe, "configuration": configuration}
                ),
            }
        )
        if given.made_as() != there.made_as():
            self.add_checkpoint(checkpoint)
            self.refuse_other(there, given)

    def refuse_other(self, there: ArmRecord, given: ArmRecord) -> None:
        """Raise, naming what of an arm differs from what is requested.

        Raises:
            RunConflictError: always.
        """
        differences = []
        if there.checkpoint != given.checkpoint:
            names = [self._model_words(digest) for digest in (there.checkpoint, given.checkpoint)]
            differences.append(f"checkpoint: {names[0]} there, {names[1]} given")
        for part in ("recipe", "configuration", "versions", "loaded"):
            differences += differing(_part(there, part), _part(given, part), part)
        raise RunConflictError(
            f"arm {there.name} of {self.run.path} was made with another configuration ({'; '.join(differences)}); "
            "use another -o or --force"
        )

    def _model_words(self, digest: str | None) -> str:
        if digest is None:
            return "none"
        try:
            return self.run.checkpoint(digest).words
        except CorruptRunError:
            return digest

    def _is_being_filled(self, arm: str) -> bool:
        return any(self.is_claimed(arm, shard) for shard in self.run.shards)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Keep ``--force`` of another process from removing the run while this one writes to it.

        Raises:
            RunConflictError: the run was replaced since it was opened.
        """
        path = self.run.path / MANIFEST
        try:
            file = path.open("rb")
        except OSError as error:
            raise RunConflictError(f"{path} has gone ({error.strerror}); was the run started anew?") from None
        try:
            claims.lock(file, path, exclusive=False, wait=True)
            if not claims.is_at(file, path) or open_run(self.run.path).record != self.run.record:
                raise RunConflictError(
                    f"{self.run.path} was started anew by another process; run the same command again"
                )
            yield
        finally:
            claims.release(file)

    @contextmanager
    def claim(self, arm: str, shard: Shard) -> Iterator[bool]:
        """Hold one shard of an arm while it is captured; gives False when another process holds it.

        What a killed holder left of this shard is removed: nobody else writes files of that name.

        Raises:
            RunConflictError: the arm that this writer began was begun anew, otherwise, by another process.
        """
        with claims.claim(self._claim_file(arm, shard.stem)) as is_mine:
            if is_mine:
                # Whoever begins the arm anew may have looked for claims just before this one was taken: wait for it.
                with claims.claim(self._claim_file(arm, "arm"), wait=True):
                    self._refuse_begun_anew(arm)
                remove_leftovers(self.run.arm_folder(arm), shard.stem)
                if arm == self.run.record.tokens.arm:  # only the arm that samples writes tokens
                    remove_leftovers(self.run.path / "tokens", shard.stem)
            yield is_mine

    def is_claimed(self, arm: str, shard: Shard) -> bool:
        """True while a living process of this file system captures the shard."""
        return claims.is_claimed(self._claim_file(arm, shard.stem))

    def remove_dead_claims(self, arm: str) -> None:
        """Remove claim files that killed workers left of shards that are committed by now: nobody needs those."""
        for path in (self.run.path / CLAIMS).glob(f"{arm}.*"):
            if path.name not in {f"{arm}.{shard.stem}" for shard in self.run.missing_shards(arm)}:
                with claims.claim(path):
                    pass

    def write_tokens(self, shard: Shard, tokens: TokenRows) -> None:
        """Commit the shard's token table; the same table again changes nothing, so that readers are not disturbed."""
        started = time.monotonic()
        data = encode_tokens(tokens.check(shard.stem))
        facts = {"n_rows": len(tokens), "tokens_sha256": tokens_sha256(tokens)}
        with claims.claim(self._claim_file("tokens", shard.stem), wait=True):
            if not self._holds("tokens", shard, ".parquet", data):
                self._commit("tokens", shard, ".parquet", data, facts)
        self.seconds["writing"] += time.monotonic() - started

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

        Raises:
            ValueError: the capture has other arrays than the arm's record says.
            RunConflictError: the arm that this writer began was begun anew, otherwise, by another process.
        """
        started = time.monotonic()
        self._refuse_begun_anew(arm)
        record = self.run.arm(arm)
        expected = {*record.arrays} - {DISTRIBUTIONS}
        if {*capture.arrays()} != expected:
            raise ValueError(f"arm {arm} has {sorted(capture.arrays())}, arm.json says {sorted(expected)}")
        data = encode_capture(capture, record.n_experts, dtypes)
        facts = {**facts, "n_rows": len(tokens), "tokens_sha256": tokens_sha256(tokens)}
        made = {"made_as": record.made_as(), "worker": str(self.worker), "host": host_tag()}
        if vocab is not None:
            of_vocab = {"n_rows": len(vocab), "tokens_sha256": facts["tokens_sha256"], **made}
            self._commit(f"arms/{arm}", shard, ".safetensors", encode_vocab(vocab), of_vocab, ".vocab")
        self._commit(f"arms/{arm}", shard, ".safetensors", data, {**facts, **made})
        self.seconds["writing"] += time.monotonic() - started

    def adopt(self, copy: Run, arm: str, shard: Shard) -> None:
        """Commit what was captured of an arm's shard in a copy of this run on another machine, byte for byte.

        Call it under the claim to the shard.

        Raises:
            CorruptRunError: a file is not what its sidecar says.
            RunConflictError: the arm was made another way there than here.
        """
        record, bias = copy.arm(arm), copy.arm_folder(arm) / BIAS
        self.begin_arm(record, read_sealed(bias)["bias_LE"] if bias.exists() else None)
        if arm == self.run.record.tokens.arm:
            with claims.claim(self._claim_file("tokens", shard.stem), wait=True):
                self._copy(copy, "tokens", shard, ".parquet")
        if copy.keeps_vocab(arm, shard):
            self._copy(copy, f"arms/{arm}", shard, ".safetensors", ".vocab")
        self._copy(copy, f"arms/{arm}", shard, ".safetensors")

    def _copy(self, copy: Run, folder: str, shard: Shard, suffix: str, part: str = "") -> None:
        sidecar = copy.sidecar_path(folder, shard, part)
        record = read_record(sidecar, Sidecar)
        data = read_checked(sidecar.with_suffix(suffix), record.data_sha256)
        if not (folder == "tokens" and self._holds(folder, shard, suffix, data)):  # readers are not disturbed
            facts = record.model_dump(exclude_none=True, exclude={"data_sha256", "n_bytes"})
            self._commit(folder, shard, suffix, data, facts, part)

    def _refuse_begun_anew(self, arm: str) -> None:
        begun = self._made_as.get(arm)
        if begun is not None and self.run.arm(arm).made_as() != begun:
            raise RunConflictError(
                f"arm {arm} of {self.run.path} was begun anew by another process, otherwise made; use another -o"
            )

    def _claim_file(self, arm: str, what: str) -> Any:
        return self.run.path / CLAIMS / f"{arm}.{what}"

    def _holds(self, folder: str, shard: Shard, suffix: str, data: bytes) -> bool:
        """True when exactly these bytes are committed."""
        sidecar = self.run.sidecar_path(folder, shard)
        path = sidecar.with_suffix(suffix)
        if not (sidecar.exists() and path.exists()) or path.read_bytes() != data:
            return False
        try:
            return read_record(sidecar, Sidecar).data_sha256 == sha256_bytes(data)
        except CorruptRunError:
            return False

    def _commit(
        self, folder: str, shard: Shard, suffix: str, data: bytes, facts: dict[str, Any], part: str = ""
    ) -> None:
        sidecar = self.run.sidecar_path(folder, shard, part)
        sidecar.unlink(missing_ok=True)  # a sidecar never describes data other than the data beside it
        write_atomic(sidecar.with_suffix(suffix), data)
        write_record(sidecar, Sidecar(**facts, data_sha256=sha256_bytes(data), n_bytes=len(data)))
        store.add_shard(self.run.path, folder, shard.stem)


def differing(there: Mapping[str, Any], given: Mapping[str, Any], prefix: str = "") -> list[str]:
    """What two plain records hold differently, a phrase each."""
    keys = sorted(key for key in {*there, *given} if digest_of(there.get(key)) != digest_of(given.get(key)))
    named = f"{prefix}." if prefix not in ("", "configuration") else ""
    return [f"{named}{key}: {there.get(key)!r} there, {given.get(key)!r} given" for key in keys]


def _part(record: ArmRecord, part: str) -> dict[str, Any]:
    if not isinstance(record.origin, Captured):
        return {}
    if part == "recipe":
        return {"recipe": record.origin.recipe, "variant_of": record.variant_of}
    return dict(record.facts.get("loaded") or {}) if part == "loaded" else dict(getattr(record.origin, part))
