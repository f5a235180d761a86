"""What a checkpoint folder says of itself, read without loading it: files, digests, routing.

Nothing here imports torch, but for the routing of a model that has experts. A checkpoint that an engine could not load,
or whose routing cannot be captured, is refused here in one line, before anything is started or written.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moediag.engines.redaction import redact
from moediag.engines.routers import ModelRouting, has_experts, text_config
from moediag.engines.weights import Facts, Progress, compare_facts, compare_weights, scale_block, tensor_facts
from moediag.errors import CheckpointError
from moediag.run.files import TOKENIZER_FILES, digest_of, tokenizer_digest
from moediag.run.records import CheckpointRecord, TensorRecord, WeightsComparison

if TYPE_CHECKING:
    from moediag.engines.proof import Proof

_DTYPES = {"half": "float16", "float": "float32"}  # vLLM's names
_COMMIT = re.compile("[0-9a-f]{40}")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder that looks loadable.

    Args:
        path: the folder.
        name: what the user called it (folder or hub id); only shown, never compared.
        config: config.json.
        trust_remote_code: code of the checkpoint may be run.
        is_observed: its routing is captured; else its routers are not looked at.
    """

    path: Path
    name: str
    revision: str | None
    config: dict[str, Any]
    weight_files: tuple[Path, ...]
    trust_remote_code: bool = False
    is_observed: bool = True

    @cached_property
    def routing(self) -> ModelRouting | None:
        """How its routers choose, as transformers' code shows it (seconds); None if dense, or not observed.

        Raises:
            CheckpointError: its routing cannot be captured.
        """
        return self.proof(self.stored_dtype).routing if self.is_observed and has_experts(self.config) else None

    def proof(self, dtype: str) -> Proof:
        """What its routers, loaded alone in a dtype, do with seeded probes.

        Raises:
            CheckpointError: its routing cannot be captured.
        """
        from moediag.engines.hf.routing import prove

        dtype = self.stored_dtype if dtype in ("auto", "None") else dtype
        dtype = _DTYPES.get(dtype, dtype)
        if dtype not in self._proofs:
            self._proofs[dtype] = prove(self.path, self.weight_files, self.config, dtype, self.trust_remote_code)
        return self._proofs[dtype]

    @cached_property
    def _proofs(self) -> dict[str, Proof]:
        return {}

    @property
    def architecture(self) -> str:
        """First entry of ``architectures``."""
        architectures: list[str] = self.config["architectures"]
        return str(architectures[0])

    @property
    def max_length(self) -> int | None:
        """Longest sequence the model was made for [tokens], if config.json says."""
        value = text_config(self.config).get("max_position_embeddings")
        return int(value) if value else None

    @property
    def stored_dtype(self) -> str:
        """Dtype the checkpoint says it is stored in; ``auto`` loads in it."""
        text = text_config(self.config)
        return str(text.get("dtype") or text.get("torch_dtype") or "float32")

    @cached_property
    def tensors(self) -> list[Facts]:
        """(name, dtype, shape, sha256) of every stored tensor; reads all of the weights once.

        Raises:
            CheckpointError: a weight file is not a whole safetensors file.
        """
        return tensor_facts(self.weight_files)

    @cached_property
    def digests(self) -> dict[str, str]:
        """sha256 of weights, tokenizer and config, independent of where the folder lies.

        The weights' is one of tensors, not of files: the same weights saved in other shards are the same.

        Raises:
            CheckpointError: a weight file is not a whole safetensors file.
        """
        # generation_config.json may change sampling, but moediag asks vLLM to leave it alone.
        config = {
            key: value for key, value in self.config.items() if key not in ("_name_or_path", "transformers_version")
        }
        return {
            "weights_sha256": digest_of(self.tensors),
            "tokenizer_sha256": tokenizer_digest(self.path),
            "config_sha256": digest_of(config),
        }

    @property
    def n_vocabulary(self) -> int:
        """V, as config.json has it; 0 where it does not say."""
        return int(text_config(self.config).get("vocab_size") or 0)

    def described(self) -> dict[str, Any]:
        """What is shown of it, without reading its weights; where it lies at home is nobody's business."""
        return {
            "source": redact(self.name),
            "revision": redact(self.revision),
            "architecture": self.architecture,
            "model_type": str(self.config.get("model_type")),
            "n_decoder_layers": int(text_config(self.config).get("num_hidden_layers", 0)),
            "n_vocabulary": self.n_vocabulary or None,
            "stored_dtype": self.stored_dtype,
            "quantization": self.config.get("quantization_config"),
        }

    @cached_property
    def record(self) -> CheckpointRecord:
        """As the run keeps it.

        Raises:
            CheckpointError: a weight file is not a whole safetensors file.
        """
        content: dict[str, Any] = {
            **self.described(),
            **self.digests,
            "routers": self.routing.routers() if self.routing else (),
            "tensors": {
                name: TensorRecord(dtype=dtype, shape=shape, sha256=digest)
                for name, dtype, shape, digest in self.tensors
            },
        }
        return CheckpointRecord(**content)


def open_checkpoint(
    name: str, revision: str | None = None, trust_remote_code: bool = False, is_at_hand: bool = False
) -> Checkpoint:
    """Look at a checkpoint folder, or at a hub snapshot that is at hand or can be downloaded.

    Args:
        is_at_hand: download nothing.

    Raises:
        CheckpointError: no such folder, no config, no weights, no tokenizer, or an unsupported router.
    """
    path = Path(name)
    if trust_remote_code and not path.exists() and not _COMMIT.fullmatch(revision or ""):
        raise CheckpointError(
            f"--trust-remote-code runs what {name} holds at that moment: pin it with --revision and the full commit "
            "hash, or give a local folder you have read"
        )
    if not path.exists():
        path = _hub_snapshot(name, revision, is_at_hand)
    config = _read_config(path)
    try:
        checkpoint = Checkpoint(path, name, revision, config, _weight_files(path), trust_remote_code)
        checkpoint.described()
        has_experts(config)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{path / 'config.json'} lacks a value or holds one of another kind than expected "
            f"({type(error).__name__}: {error}); it is not a causal language model's"
        ) from None
    if not any((path / file).exists() for file in TOKENIZER_FILES):
        raise CheckpointError(f"{path} has no tokenizer (expected one of {', '.join(TOKENIZER_FILES)}); save it there")
    return checkpoint


def compare_checkpoints(a: Checkpoint, b: Checkpoint, progress: Progress | None = None) -> WeightsComparison:
    """How the weights of b differ from those of a, tensor by tensor.

    Raises:
        CheckpointError: as :func:`~moediag.engines.weights.compare_weights`.
    """
    blocks = {"a_block": scale_block(a.config), "b_block": scale_block(b.config)}
    found = compare_weights(a.weight_files, b.weight_files, **blocks, progress=progress)
    return found.model_copy(update={"a": a.record.digest, "b": b.record.digest})


def compare_records(a: CheckpointRecord, b: CheckpointRecord) -> WeightsComparison | None:
    """The same where only records are at hand: which tensors are equal; None where a record holds no tensors."""
    if a.tensors is None or b.tensors is None:
        return None
    ours, theirs = ([(name, t.dtype, t.shape, t.sha256) for name, t in x.items()] for x in (a.tensors, b.tensors))
    return compare_facts(ours, theirs).model_copy(update={"a": a.digest, "b": b.digest, "measured_from": "digests"})


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads((path / "config.json").read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{path} is not a checkpoint folder: it has no config.json") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path / 'config.json'} is not readable JSON ({error})") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path / 'config.json'} should hold a JSON object")
    return config


def _weight_files(path: Path) -> tuple[Path, ...]:
    """The safetensors files the engines would load; an index must not name absent files."""
    index = path / "model.safetensors.index.json"
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index} is not a weight index ({error})") from None
        missing = [name for name in names if not (path / name).exists()]
        if missing:
            raise CheckpointError(f"{path} lacks {len(missing)} of {len(names)} weight files, first: {missing[0]}")
        return tuple(path / name for name in names)
    single = path / "model.safetensors"
    if not single.exists():
        pickles = [*path.glob("*.bin"), *path.glob("*.pt")]
        advice = "only pickled weights were found, convert them to safetensors" if pickles else "need it or its index"
        raise CheckpointError(f"{path} has no weights (model.safetensors): {advice}")
    return (single,)


def _hub_snapshot(name: str, revision: str | None, is_at_hand: bool) -> Path:
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise CheckpointError(f"checkpoint {name} does not exist; give a checkpoint folder or a hub id (owner/name)")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise CheckpointError(f"checkpoint {name} is no folder, and the hub client is not installed") from None

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken"]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns, local_files_only=is_at_hand))
    except Exception as error:  # the hub client raises a dozen unrelated types; all mean: no such checkpoint
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"checkpoint {name} is neither a folder nor to be had from the hub ({type(error).__name__}: {reason})"
        ) from None
