"""The files of a run directory: where they are, which are there, and reading them checked.

Invariant: whatever comes out has been held against its digest and its declared shape; damage and nonsense are
errors of one line that name the file.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moediag.errors import CorruptRunError, IncompleteRunError
from moediag.notation import INFER
from moediag.run import codec
from moediag.run.capture import Capture, TokenRows
from moediag.run.files import digest_of, read_checked, read_sealed
from moediag.run.manifest import MANIFEST, PROMPTS, read_arm, read_sidecar, shard_table
from moediag.run.shards import WHOLE, Shard, Slice
from moediag.run.vocabulary import VOCABULARY_ARMS, VocabLogps, chosen_in, decode_vocab

BIAS = "correction-bias.json"
"""Beside arm.json: the routers' correction bias as the arm's engine had it."""


class RunFiles:
    """The files of a run directory, read and checked; :class:`~moediag.run.directory.Run` adds pairs and writing.

    Args:
        manifest: run.json, as :func:`~moediag.run.manifest.read_manifest` gives it.
        worker: the slice of the run that this process fills.
    """

    def __init__(self, path: Path, manifest: dict[str, Any], worker: Slice = WHOLE) -> None:
        self.path = path
        self.manifest = manifest
        self.worker = worker

    @cached_property
    def shards(self) -> tuple[Shard, ...]:
        """The shard table, the same for every arm."""
        return shard_table(self.manifest, self.path / MANIFEST)

    @property
    def n_sequences(self) -> int:
        """S, the sequences of the run."""
        return self.shards[-1].first_sequence + self.shards[-1].n_sequences

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
        return read_arm(self._arm_folder(name) / "arm.json", name)

    @property
    def sampler(self) -> str:
        """The arm that sampled the run's tokens; every other arm scores them."""
        return str(self.manifest.get("sampled_by", INFER))

    def is_routed(self, arm: str) -> bool:
        """True when the arm kept expert ids: a MoE model, observed."""
        return bool(self.decoder_layers) and bool(self.arm(arm).get("is_routed", True))

    def has_tokens(self, shard: Shard) -> bool:
        """True when the shard's token table is committed."""
        return self._is_committed("tokens", shard, ".parquet")

    def has_capture(self, arm: str, shard: Shard) -> bool:
        """True when the arm's arrays for the shard, and its tokens, are committed."""
        folder = f"arms/{arm}"
        if self.keeps_vocab(arm, shard) and not self._is_committed(folder, shard, ".safetensors", ".vocab"):
            return False
        return self._is_committed(folder, shard, ".safetensors") and self.has_tokens(shard)

    def missing_shards(self, arm: str) -> list[Shard]:
        """Shards the arm has still to capture, in order."""
        return [shard for shard in self.shards if not self.has_capture(arm, shard)]

    def own_missing_shards(self, arm: str) -> list[Shard]:
        """Those of the missing shards that are this worker's to take."""
        return [shard for shard in self.missing_shards(arm) if self.worker.has(shard)]

    def is_complete(self, arm: str) -> bool:
        """True when every shard of the arm is committed."""
        return not self.missing_shards(arm)

    def prompts(self) -> bytes:
        """The tokenised prompts, as parquet.

        Raises:
            CorruptRunError: missing or changed.
        """
        return read_checked(self.path / PROMPTS, str(self.manifest["prompts"]["data_sha256"]))

    def prompt_tokens(self) -> tuple[list[list[int]], list[list[int]] | None]:
        """Token ids of every prompt, and of every given completion (None where responses are sampled).

        Raises:
            CorruptRunError: missing, changed, or not a table of prompts.
        """
        return codec.decode_prompts(self.prompts(), str(self.path / PROMPTS))

    def tokens(self, shard: Shard) -> TokenRows:
        """The shard's token table, checked.

        Raises:
            IncompleteRunError: not captured yet.
            CorruptRunError: damaged, or other sequences than the shard table says.
        """
        data, sidecar, path = self._read("tokens", shard, ".parquet", "infer")
        tokens = codec.decode_tokens(data, str(path))
        # length first: a shard table may claim more sequences than any memory holds
        found = np.unique(tokens.seq_id_T)
        is_whole = len(found) == shard.n_sequences and np.array_equal(found, np.array(shard.seq_ids))
        if not is_whole or len(tokens) != sidecar["n_rows"]:
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

    def vocab_sequences(self, arm: str, shard: Shard) -> NDArray[np.int64]:
        """Sequences of the shard whose whole next-token distributions the arm keeps; most arms keep none."""
        which, n_chosen = self._chosen(arm, shard)
        return (np.array(which, dtype=np.int64) * self.n_sequences) // max(n_chosen, 1)

    def keeps_vocab(self, arm: str, shard: Shard) -> bool:
        """True when the arm keeps whole distributions of a sequence of the shard."""
        return len(self._chosen(arm, shard)[0]) > 0

    def _chosen(self, arm: str, shard: Shard) -> tuple[range, int]:
        n_chosen = int(self.manifest["configuration"].get("full_vocab", 0)) if arm in VOCABULARY_ARMS else 0
        n_chosen = min(n_chosen, self.n_sequences)
        return chosen_in(shard, n_chosen, self.n_sequences), n_chosen

    def load_vocab(self, arm: str, shard: Shard) -> VocabLogps | None:
        """Whole next-token distributions behind the response tokens of the shard's chosen sequences.

        Large: 4 bytes for every token of the vocabulary and row. Nothing loads them unless asked for them here.

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
        digest = self.arm(arm).get("correction_bias_sha256")
        if digest is None:
            return None
        path = self._arm_folder(arm) / BIAS
        rows = read_sealed(path).get("bias_LE")
        if digest_of(rows) != digest:
            raise CorruptRunError(f"{path} is not the bias that arm.json tells of; restore it or capture {arm} again")
        try:
            bias_LE = np.array(rows, dtype=np.float32)
        except (TypeError, ValueError):
            bias_LE = np.zeros(0, dtype=np.float32)
        if bias_LE.shape != (len(self.decoder_layers), self.n_experts) or not np.isfinite(bias_LE).all():
            raise CorruptRunError(f"{path} does not hold (MoE layers, experts) finite numbers; capture {arm} again")
        return bias_LE

    def capture_sidecar(self, arm: str, shard: Shard) -> dict[str, Any]:
        """Sidecar of the arm's shard: digest, rows, tokens scored, bytes, seconds."""
        return read_sidecar(self._sidecar(f"arms/{arm}", shard))

    def tokens_digest(self, shard: Shard) -> str:
        """Digest of which tokens the shard holds (content, not file bytes)."""
        return str(read_sidecar(self._sidecar("tokens", shard))["tokens_sha256"])

    def _arm_folder(self, arm: str) -> Path:
        return self.path / "arms" / arm

    def _is_committed(self, folder: str, shard: Shard, suffix: str, part: str = "") -> bool:
        sidecar = self._sidecar(folder, shard, part)
        return sidecar.exists() and sidecar.with_suffix(suffix).exists()

    def _sidecar(self, folder: str, shard: Shard, part: str = "") -> Path:
        return self.path / folder / f"{shard.stem}{part}.json"

    def _read(
        self, folder: str, shard: Shard, suffix: str, arm: str, part: str = ""
    ) -> tuple[bytes, dict[str, Any], Path]:
        sidecar = self._sidecar(folder, shard, part)
        path = sidecar.with_suffix(suffix)
        if not sidecar.exists():
            raise IncompleteRunError(f"{path} has not been captured; run: moediag capture {arm} CKPT -o {self.path}")
        facts = read_sidecar(sidecar)
        return read_checked(path, facts["data_sha256"]), facts, path
