"""The run directory: one model, one prompt set, one token table, several arms.

    RUN/run.json                        sealed: what was asked for, the model, the shard table
    RUN/prompts.parquet                 token ids of prompts and given completions; digest in run.json
    RUN/tokens/shard-00000.parquet      token table of the shard's whole sequences
    RUN/arms/<arm>/arm.json             sealed: engine, versions, dtypes, options
    RUN/arms/<arm>/shard-00000.safetensors
    RUN/.../shard-00000.json            sealed sidecar: sha256, rows, what tokens were scored; written last

Invariants:
    - a shard exists once its sidecar does, and the sidecar is written after the data, so a kill leaves
      whole shards only. Sidecars, and not a table in arm.json, hold the digests: workers never write the
      same file, and merging two partial runs is a plain copy;
    - arms and analyses are added, never rewritten in place; another configuration is an error;
    - nothing here imports an engine.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from moediag.errors import (
    AlignmentError,
    CorruptRunError,
    IncompleteRunError,
    RunConflictError,
    RunError,
    SchemaVersionError,
)
from moediag.notation import INFER, SCHEMA_VERSION, minuend_first, pair_name
from moediag.run import codec
from moediag.run.align import Pair, PairBlock, align
from moediag.run.capture import Capture, TokenRows
from moediag.run.files import (
    digest_of,
    read_checked,
    read_sealed,
    remove_leftovers,
    sha256_bytes,
    write_atomic,
    write_error,
    write_sealed,
)

MANIFEST = "run.json"
PROMPTS = "prompts.parquet"
KIND = "moediag run"


@dataclass(frozen=True)
class Shard:
    """A range of whole sequences; every arm has the same shards."""

    index: int
    first_sequence: int
    n_sequences: int

    @property
    def stem(self) -> str:
        """File name without suffix."""
        return f"shard-{self.index:05d}"

    @property
    def seq_ids(self) -> range:
        """Sequence ids of the shard."""
        return range(self.first_sequence, self.first_sequence + self.n_sequences)


class Run:
    """A run directory that exists; :func:`open_run` gives one."""

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        self.manifest = manifest

    @cached_property
    def shards(self) -> tuple[Shard, ...]:
        """The shard table, the same for every arm."""
        try:
            return tuple(Shard(**entry) for entry in self.manifest["shards"])
        except (KeyError, TypeError) as error:
            raise CorruptRunError(f"{self.path / MANIFEST}: unusable shard table ({error})") from None

    @property
    def configuration(self) -> dict[str, Any]:
        """What was asked for; the same configuration resumes, another one is refused."""
        return dict(self.manifest["configuration"])

    @property
    def model(self) -> dict[str, Any]:
        """Path, digests, architecture, routing and layer map of the model."""
        return dict(self.manifest["model"])

    @property
    def n_experts(self) -> int:
        """E; 0 for a dense model."""
        return int((self.model["routing"] or {}).get("n_experts", 0))

    @property
    def decoder_layers(self) -> tuple[int, ...]:
        """Decoder layer of every MoE layer; empty for a dense model."""
        return tuple((self.model["routing"] or {}).get("decoder_layers", ()))

    def arms(self) -> list[str]:
        """Names of the arms begun, infer first."""
        found = {path.parent.name for path in self.path.glob("arms/*/arm.json")}
        return sorted(found, key=lambda name: (name != "infer", name))

    def arm(self, name: str) -> dict[str, Any]:
        """The arm's record (engine, versions, dtypes, options).

        Raises:
            IncompleteRunError: the arm was never begun.
        """
        if not self._arm_folder(name).joinpath("arm.json").exists():
            raise IncompleteRunError(
                f"{self.path} has no arm {name} (found: {', '.join(self.arms()) or 'none'}); "
                f"run: moediag capture {name} CKPT -o {self.path}"
            )
        return read_sealed(self._arm_folder(name) / "arm.json")

    def has_tokens(self, shard: Shard) -> bool:
        """True when the shard's token table is committed."""
        return self._is_committed("tokens", shard, ".parquet")

    def has_capture(self, arm: str, shard: Shard) -> bool:
        """True when the arm's arrays for the shard, and its tokens, are committed."""
        return self._is_committed(f"arms/{arm}", shard, ".safetensors") and self.has_tokens(shard)

    def missing_shards(self, arm: str) -> list[Shard]:
        """Shards the arm has still to capture, in order."""
        return [shard for shard in self.shards if not self.has_capture(arm, shard)]

    def is_complete(self, arm: str) -> bool:
        """True when every shard of the arm is committed."""
        return not self.missing_shards(arm)

    def prompts(self) -> bytes:
        """The tokenised prompts, as parquet.

        Raises:
            CorruptRunError: missing or changed.
        """
        return read_checked(self.path / PROMPTS, str(self.manifest["prompts"]["data_sha256"]))

    def tokens(self, shard: Shard) -> TokenRows:
        """The shard's token table, checked.

        Raises:
            IncompleteRunError: not captured yet.
            CorruptRunError: damaged, or other sequences than the shard table says.
        """
        data, sidecar, path = self._read("tokens", shard, ".parquet", "infer")
        tokens = codec.decode_tokens(data, str(path))
        if sorted(set(tokens.seq_id_T.tolist())) != list(shard.seq_ids) or len(tokens) != sidecar.get("n_rows"):
            raise CorruptRunError(f"{path} does not hold sequences {shard.seq_ids.start}..{shard.seq_ids.stop - 1}")
        return tokens

    def capture(self, arm: str, shard: Shard) -> Capture:
        """The arm's arrays for the shard, checked against its sidecar.

        Raises:
            IncompleteRunError: not captured yet.
            CorruptRunError: damaged.
        """
        data, _, path = self._read(f"arms/{arm}", shard, ".safetensors", arm)
        return codec.decode_capture(data, str(path))

    def capture_sidecar(self, arm: str, shard: Shard) -> dict[str, Any]:
        """Sidecar of the arm's shard: digest, rows, tokens scored, bytes, seconds."""
        return read_sealed(self._sidecar(f"arms/{arm}", shard))

    def tokens_digest(self, shard: Shard) -> str:
        """Digest of which tokens the shard holds (content, not file bytes)."""
        return str(read_sealed(self._sidecar("tokens", shard))["tokens_sha256"])

    def block(self, minuend: str, subtrahend: str, shard: Shard) -> PairBlock:
        """Align one shard of two arms.

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
        return align(self.tokens(shard), self.capture(minuend, shard), self.capture(subtrahend, shard), where)

    def pair(self, arm_a: str, arm_b: str) -> Pair:
        """Two arms as a pair; the order does not matter, the sign is train minus infer.

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
            return (self.block(minuend, subtrahend, shard) for shard in self.shards)

        routing = self.model["routing"] or {}
        return Pair(
            name=pair_name(minuend, subtrahend),
            minuend=minuend,
            subtrahend=subtrahend,
            decoder_layer_L=self.decoder_layers,
            n_experts=self.n_experts,
            top_k=int(routing.get("top_k", 0)),
            read_blocks=read_blocks,
        )

    def begin_arm(self, name: str, record: dict[str, Any]) -> None:
        """Write arm.json, or check that the arm begun before was made the same way.

        Args:
            record: ``configuration``, and what the engine says of itself (versions, dtypes, kernels) where one has
                been started: an arm is never filled by two versions.

        Raises:
            RunConflictError: it was made another way.
        """
        folder = self._arm_folder(name)
        if (folder / "arm.json").exists():
            there = self.arm(name)
            for part in ("configuration", "versions", "loaded"):
                if part in record:
                    refuse_other_configuration(there[part], record[part], f"arm {name} of {self.path}")
            return
        make_folder(folder)
        write_sealed(folder / "arm.json", {"kind": "moediag arm", "arm": name, **record})

    def write_tokens(self, shard: Shard, tokens: TokenRows) -> None:
        """Commit the shard's token table."""
        data = codec.encode_tokens(tokens.check(shard.stem))
        facts = {"n_rows": len(tokens), "tokens_sha256": tokens_sha256(tokens)}
        self._commit("tokens", shard, ".parquet", data, facts)

    def write_capture(
        self, arm: str, shard: Shard, tokens: TokenRows, capture: Capture, facts: dict[str, Any], dtypes: dict[str, str]
    ) -> None:
        """Commit an arm's arrays for a shard, saying which tokens they score."""
        data = codec.encode_capture(capture, self.n_experts, dtypes)
        facts = {**facts, "n_rows": len(tokens), "tokens_sha256": tokens_sha256(tokens)}
        self._commit(f"arms/{arm}", shard, ".safetensors", data, facts)

    @contextmanager
    def writing(self, arm: str) -> Iterator[None]:
        """Hold the arm's lock, so that two processes never fill one arm at the same time.

        Raises:
            RunError: another process holds it. A kill releases it.
        """
        folder = self._arm_folder(arm)
        make_folder(folder)
        with (folder / ".lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RunError(f"another process is capturing arm {arm} of {self.path}; wait for it") from None
            remove_leftovers(folder)
            if arm == INFER:  # only the infer arm writes tokens: another arm must not touch what it is writing
                remove_leftovers(self.path / "tokens")
            yield

    def _arm_folder(self, arm: str) -> Path:
        return self.path / "arms" / arm

    def _is_committed(self, folder: str, shard: Shard, suffix: str) -> bool:
        sidecar = self._sidecar(folder, shard)
        return sidecar.exists() and sidecar.with_suffix(suffix).exists()

    def _sidecar(self, folder: str, shard: Shard) -> Path:
        return self.path / folder / f"{shard.stem}.json"

    def _commit(self, folder: str, shard: Shard, suffix: str, data: bytes, facts: dict[str, Any]) -> None:
        sidecar = self._sidecar(folder, shard)
        sidecar.unlink(missing_ok=True)  # a sidecar never describes data other than the data beside it
        write_atomic(sidecar.with_suffix(suffix), data)
        write_sealed(sidecar, {**facts, "data_sha256": sha256_bytes(data), "n_bytes": len(data)})

    def _read(self, folder: str, shard: Shard, suffix: str, arm: str) -> tuple[bytes, dict[str, Any], Path]:
        sidecar = self._sidecar(folder, shard)
        path = sidecar.with_suffix(suffix)
        if not sidecar.exists():
            raise IncompleteRunError(f"{path} has not been captured; run: moediag capture {arm} CKPT -o {self.path}")
        facts = read_sealed(sidecar)
        return read_checked(path, str(facts.get("data_sha256"))), facts, path


def open_run(path: str | Path) -> Run:
    """Open a run directory for reading or adding arms.

    Raises:
        RunError: not a run directory.
        CorruptRunError: its manifest was changed.
        SchemaVersionError: written by another schema version.
    """
    folder = Path(path)
    if not (folder / MANIFEST).is_file():
        raise RunError(f"{folder} is not a moediag run directory (no {MANIFEST}); make one with: moediag profile")
    manifest = read_sealed(folder / MANIFEST)
    if manifest.get("kind") != KIND:
        raise RunError(f"{folder / MANIFEST} is of kind {manifest.get('kind')!r}, wanted {KIND!r}")
    check_schema_version(manifest, folder / MANIFEST)
    for key in ("configuration", "model", "shards", "sampling", "prompts"):
        if key not in manifest:
            raise CorruptRunError(f"{folder / MANIFEST} lacks {key!r}; capture the run again")
    return Run(folder, manifest)


def refuse_other_configuration(there: dict[str, Any], asked: dict[str, Any], where: str) -> None:
    """Raise unless the two configurations are the same.

    Raises:
        RunConflictError: names what differs.
    """
    if digest_of(there) == digest_of(asked):
        return
    keys = sorted(key for key in {*there, *asked} if there.get(key) != asked.get(key))
    differences = "; ".join(f"{key}: {there.get(key)!r} there, {asked.get(key)!r} asked" for key in keys)
    raise RunConflictError(f"{where} was made with another configuration ({differences}); use another -o or --force")


def check_schema_version(content: dict[str, Any], path: Path) -> None:
    """Refuse a file of another schema version.

    Raises:
        SchemaVersionError: newer, older or absent.
    """
    found = content.get("schema_version")
    if found != SCHEMA_VERSION:
        advice = "upgrade moediag" if isinstance(found, int) and found > SCHEMA_VERSION else "capture the run again"
        raise SchemaVersionError(f"{path} has schema_version {found}, this moediag reads {SCHEMA_VERSION}; {advice}")


def tokens_sha256(tokens: TokenRows) -> str:
    """Digest of which tokens stand where; file format and compression do not enter."""
    columns = [tokens.seq_id_T, tokens.position_T, tokens.token_id_T, tokens.is_response_T]
    return sha256_bytes(b"".join(np.ascontiguousarray(column, dtype="<i8").tobytes() for column in columns))


def make_folder(path: Path) -> None:
    """Make a folder and its parents.

    Raises:
        MoediagError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(error, path) from error
