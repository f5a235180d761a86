"""Files that are either whole or absent: atomic writes, sealed JSON, checksums.

Invariants:
    - a name in a run directory is only ever the result of a rename of a complete, flushed file;
    - a sealed JSON file is the canonical text of its content, which holds the sha256 of the rest, so any
      changed byte is found, white space included;
    - running out of space removes the temporary file and leaves what was committed before.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

from moediag.errors import CorruptRunError, DiskFullError, MoediagError, RunError

_SEAL = "sha256"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json", "tiktoken.model")
"""Names under which a folder may hold a tokenizer; one of them at least."""
_BESIDE_TOKENIZER = ("merges.txt", "tokenizer_config.json", "chat_template.jinja")
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def atomic(path: Path, n_bytes: int = 0) -> Iterator[IO[bytes]]:
    """A file to write that takes the place of ``path`` when the body ends, whole or not at all.

    Args:
        n_bytes: what will be written, for messages; 0 = not known.

    Raises:
        DiskFullError: no space; the temporary file is removed.
        RunError: the folder cannot be written for another reason.
    """
    temporary = path.with_name(f".{path.name}.{process_tag()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise write_error(error, path, n_bytes) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_atomic(path: Path, data: bytes) -> None:
    """Write ``data`` under ``path``, in a folder that is made if missing; raises like :func:`atomic`."""
    make_folder(path.parent)
    with atomic(path, len(data)) as file:
        file.write(data)


def write_error(error: OSError, path: Path, n_bytes: int = 0) -> MoediagError:
    """The moediag error for a failed write to ``path``."""
    if error.errno in _NO_SPACE:
        size = f" ({n_bytes:,} bytes)" if n_bytes else ""
        return DiskFullError(
            f"no space to write {path}{size}: {error.strerror}; what was captured before is kept: "
            "free some space and run the same command again (captures resume, all else starts over)"
        )
    return RunError(f"cannot write {path}: {error.strerror or error}; make it writable, or choose another folder")


def make_folder(path: Path) -> None:
    """Make a folder and its parents.

    Raises:
        MoediagError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(error, path) from error


def cache_folder(name: str) -> Path:
    """Where what can be made or fetched again is kept: ``MOEDIAG_CACHE``, else the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("MOEDIAG_CACHE") or Path(base) / "moediag") / name


def rows_prefix(stem: str) -> str:
    """Start of the name of a folder for an engine's raw rows of a shard, beside the shard's files."""
    return f".rows-{stem}-"


def remove_leftovers(folder: Path, stem: str) -> None:
    """Remove what a killed writer of the files called ``stem`` left; call it only under the claim to them."""
    for leftover in folder.glob(f".{stem}.*.tmp"):
        leftover.unlink(missing_ok=True)
    for leftover in folder.glob(f"{rows_prefix(stem)}*"):
        shutil.rmtree(leftover, ignore_errors=True)


def host_tag() -> str:
    """This machine's name, hashed: tells workers apart without giving names away."""
    return sha256_bytes(socket.gethostname().encode())[:12]


def process_tag(pid: int | None = None) -> str:
    """Names a process on every machine that shares the file system."""
    return f"{host_tag()}-{os.getpid() if pid is None else pid}"


def sha256_bytes(data: bytes) -> str:
    """Hexadecimal sha256."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Hexadecimal sha256 of a file of any size."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def canonical_json(content: Any) -> str:
    """The one text form of ``content``; NaN is not JSON and raises ValueError."""
    return json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def tokenizer_digest(folder: Path) -> str:
    """sha256 of the tokenizer in a folder: of every file that makes one, by name; ``tokenizer_sha256`` of run.json.

    Raises:
        OSError: a file is there and cannot be read.
    """
    files = [folder / name for name in (*TOKENIZER_FILES, *_BESIDE_TOKENIZER)]
    return digest_of({path.name: sha256_bytes(path.read_bytes()) for path in files if path.exists()})


def digest_of(content: Any) -> str:
    """sha256 of the canonical JSON text of ``content``."""
    return sha256_bytes(canonical_json(content).encode())


def write_sealed(path: Path, content: dict[str, Any]) -> None:
    """Write ``content`` as canonical JSON with the digest of the rest inside."""
    body = {key: value for key, value in content.items() if key != _SEAL}
    write_atomic(path, canonical_json({**body, _SEAL: digest_of(body)}).encode())


def read_sealed(path: Path) -> dict[str, Any]:
    """Read a sealed JSON file.

    Raises:
        CorruptRunError: missing, unreadable, or changed since it was written.
    """
    try:
        text = path.read_bytes().decode()
        content = json.loads(text)
    except FileNotFoundError:
        raise CorruptRunError(f"{path} is missing; capture it again or point to a moediag run directory") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CorruptRunError(f"{path} is not readable JSON ({error}); restore it or capture again") from None
    if not isinstance(content, dict):
        raise CorruptRunError(f"{path} should hold a JSON object, found {type(content).__name__}; restore it")
    if not _is_sealed(text):
        raise CorruptRunError(f"{path} was changed after it was written (sha256 differs); restore it or capture again")
    return content


@lru_cache(maxsize=64)
def _is_sealed(text: str) -> bool:
    """Remembered: the same few records are read for every shard and arm, and a changed file is another text."""
    content = json.loads(text)
    body = {key: value for key, value in content.items() if key != _SEAL}
    try:
        return content.get(_SEAL) == digest_of(body) and text == canonical_json(content)
    except ValueError:  # NaN or a lone surrogate: nothing that was ever written
        return False


def read_checked(path: Path, sha256: str) -> bytes:
    """Bytes of a file whose digest is known.

    Raises:
        CorruptRunError: missing, or the digest differs.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CorruptRunError(f"{path} cannot be read ({error.strerror}); capture that shard again") from None
    if sha256_bytes(data) != sha256:
        raise CorruptRunError(
            f"{path} is damaged: its sha256 is not the one recorded when it was written; "
            "delete it and run the same capture again, only that shard is redone"
        )
    return data
