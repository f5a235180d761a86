"""Runs on an object store, by fsspec URL (``s3://bucket/run``, ``gs://``, ``az://``, ...).

    CACHE/store/KEY/NAME           the mirror: the plain folder that every other module sees
    CACHE/store/KEY/store.json     the URL that it mirrors
    CACHE/store/KEY/index.jsonl    a line for every file that is the same on both sides: tag there, size and time here

Invariants:
    - what is on the store decides: a mirror that is empty, or that another machine has overtaken, is brought up to date
      before a command reads it; all of the run is downloaded, what has not changed once only;
    - a shard is uploaded by the process that committed it, data first, sidecar last: data without a sidecar is not
      there, and is not downloaded. Nothing reaches the store before a shard does (before one is given to a node of
      Ray that does not see the mirror);
    - claims are locks of the mirror's machine. Machines share a run by ``--shard-index`` or Ray; what two of them
      captured otherwise is refused, never mixed;
    - hidden files and ``logs/`` stay on the machine that wrote them;
    - fsspec is imported only where a URL was given.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from moediag.errors import CorruptRunError, DependencyError, MoediagError, RunConflictError, RunError
from moediag.run import claims
from moediag.run.files import (
    cache_folder,
    canonical_json,
    make_folder,
    process_tag,
    read_sealed,
    sha256_bytes,
    write_atomic,
)
from moediag.run.records import MANIFEST, PROMPTS, ArmRecord, as_record
from moediag.run.series import SERIES

MARK: Final = "store.json"
_INDEX: Final = "index.jsonl"
_SUMMARY: Final = "summary.json"
_URL: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+(.+?)/*")  # a Path has made one slash of two
_SHARD: Final = re.compile(r"(?:.*/)?(?:tokens|arms/[^/]+)/shard-\d+[^/]*")
_RECORD: Final = re.compile(rf"{MANIFEST}|{PROMPTS}|checkpoints/[^/]+|arms/[^/]+/(?!shard-)[^/]+\.json")
_TAGS: Final = ("ETag", "etag", "md5Hash", "mtime", "LastModified", "last_modified", "created")
_AT_A_TIME: Final = 64  # files in flight
_FEW: Final = 8


def url_of(given: object) -> str | None:
    """The URL that was given in a path's place; None = it is a path.

    Example:
        >>> url_of(Path("s3://bucket/run/")), url_of("runs/moe")
        ('s3://bucket/run', None)
    """
    match = _URL.fullmatch(str(given))
    if match is None or Path(str(given)).exists():
        return None
    if {".", ".."} & {*match[2].split("/")}:
        raise RunError(f"{given}: a URL with . or .. in it names no folder of a store; give the whole one")
    return f"{match[1]}://{match[2]}"


def mirror_of(url: str) -> Store:
    """Where a URL is mirrored on this machine."""
    folder = cache_folder("store") / sha256_bytes(url.encode())[:16]
    if not (folder / MARK).exists():
        write_atomic(folder / MARK, mark_of(url))
    return Store(url, folder / url.rpartition("/")[2])


def mark_of(url: str) -> bytes:
    """Content of the file beside a folder that makes it the mirror of a URL."""
    return canonical_json({"url": url}).encode()


def store_of(folder: Path) -> Store | None:
    """The store that a folder is the mirror of; None for any other folder."""
    folder = folder.absolute()
    try:
        url = str(json.loads((folder.parent / MARK).read_bytes())["url"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return Store(url, folder) if folder.name == url.rpartition("/")[2] else None


def known_as(path: Path) -> str:
    """A path as the user knows it: of what is mirrored, its URL."""
    for folder in (path, *path.parents):
        if (store := store_of(folder)) is not None:
            return "/".join([store.url, *path.relative_to(folder).parts])
    return str(path)


def add_shard(run: Path, folder: str, stem: str) -> None:
    """Upload what is committed of a shard, where the run lies on a store; its tokens and records go before it.

    Raises:
        RunConflictError: the store holds another run, arm or shard by now.
        RunError: it cannot be written.
    """
    if (store := store_of(run)) is not None:
        patterns = (MANIFEST, PROMPTS, "checkpoints/*", f"{folder}/*.json", f"tokens/{stem}.*", f"{folder}/{stem}.*")
        names = {path.relative_to(run).as_posix() for pattern in patterns for path in run.glob(pattern)}
        store.push(name for name in names if _RECORD.fullmatch(name) or Path(name).name.startswith(f"{stem}."))


@dataclass(frozen=True)
class Store:
    """A folder of an object store and its mirror.

    Args:
        folder: the mirror.
    """

    url: str
    folder: Path

    def pull(self, is_read: bool = True) -> None:
        """Bring the mirror up to date.

        Args:
            is_read: a run has to be there; else there may be one, or nothing.

        Raises:
            DependencyError: fsspec, or its driver for the URL, is not installed.
            RunError: the store cannot be read, or holds no run.
            RunConflictError: another run began there meanwhile, or is being filled here.
        """
        make_folder(self.folder.parent)
        with claims.claim(self.folder.parent / ".pull", wait=True):
            theirs = self._listing()
            self._forget_other(theirs)
            if not any(name.rpartition("/")[2] in (MANIFEST, SERIES) for name in theirs):
                if is_read or (theirs and not self._index()):  # else it is being started anew, from here
                    found = f"{len(theirs)} files, no {MANIFEST}" if theirs else "nothing"
                    raise RunError(
                        f"{self.url} holds no moediag run (found {found}); give the URL of a run or a series of runs, "
                        "or make one with: moediag profile CKPT -o URL; what began a run anew there goes on where it "
                        "began"
                    )
                return
            self._download(theirs)

    def _forget_other(self, theirs: Mapping[str, str]) -> None:
        """Empty a mirror whose run is not the one on the store."""
        mine, before = self.folder / MANIFEST, self._index().get(MANIFEST)
        if before is None:
            if MANIFEST in theirs and mine.exists() and mine.read_bytes() != self._read(MANIFEST):
                raise RunConflictError(
                    f"{self.url} holds another run than {self.folder}, of which nothing was uploaded; remove "
                    f"{self.folder.parent}, or give another URL"
                )
        elif theirs.get(MANIFEST) != before[0] or not self._is_as(MANIFEST, before):
            with contextlib.suppress(FileNotFoundError), mine.open("rb") as file:
                if not claims.lock(file, mine):
                    raise RunConflictError(f"{self.url} was changed while a process of this machine fills its run")
                claims.release(file)
            shutil.rmtree(self.folder, ignore_errors=True)
            (self.folder.parent / _INDEX).unlink(missing_ok=True)

    def _download(self, theirs: Mapping[str, str]) -> None:
        index = self._index()
        for name, entry in index.items():
            if name not in theirs and self._is_as(name, entry):  # removed there
                (self.folder / name).unlink(missing_ok=True)
                self._note(name, None)
        new = [
            name
            for name, tag in theirs.items()
            if (name not in index or index[name][0] != tag or not (self.folder / name).exists())
            and (not _SHARD.fullmatch(name) or _sidecar_of(name) in theirs)
        ]
        for name in new:
            if name.endswith("/arm.json") and name in index:  # begun anew there: what it held here is of another
                for path in (self.folder / name).parent.glob("shard-*"):
                    if path.relative_to(self.folder).as_posix() not in theirs:
                        path.unlink(missing_ok=True)
        new.sort(key=lambda name: (name == MANIFEST, _rank(name)))
        for names in _batches(new):
            kept = [self.folder / name for name in names]
            parts = [path.with_name(f".{path.name}.{process_tag()}.tmp") for path in kept]
            for path in kept:
                make_folder(path.parent)
            with self._reaching("read"):
                self._fs.get([f"{self._root}/{name}" for name in names], [str(part) for part in parts])
            for name, part, path in zip(names, parts, kept, strict=True):
                part.replace(path)
                self._note(name, theirs[name])

    def push(self, names: Iterable[str] | None = None) -> tuple[int, int]:
        """Upload what the store has not got, and remove there what was replaced here.

        Args:
            names: of files; None = all.

        Returns:
            Files, and bytes, that were uploaded.

        Raises:
            RunConflictError: another machine put another run, arm or shard there meanwhile.
            RunError: the store cannot be written.
        """
        if not self.folder.is_dir():
            return 0, 0
        index, is_whole = self._index(), names is None
        names = self.here() if names is None else names
        names = sorted(names, key=_rank)
        new = [name for name in names if name not in index or not self._is_as(name, index[name])]
        if MANIFEST in new and MANIFEST in index:  # started anew: no reader may see the old run with new shards
            self._remove([MANIFEST])
            del index[MANIFEST]
        is_new_run = MANIFEST not in index
        if is_whole or is_new_run:
            replaced = {*index} - {*self.here()}
            captured = {name for name in replaced if _SHARD.fullmatch(name) or _RECORD.fullmatch(name)}
            self._remove(sorted(replaced if is_new_run else replaced - captured))
        held = {name for name in new if name not in index and self._holds(name)}
        data = (name for name in new if _SHARD.fullmatch(name) and _sidecar_of(name) in held)
        held |= {name for name in data if self._there(name) is not None}
        self._note_all(sorted(held))
        new = [name for name in new if name not in held]
        # no sidecar and no summary describes other data than the data beside it
        self._remove([name for name in new if name in index and (_is_sidecar(name) or name == _SUMMARY)])
        n_bytes = 0
        for batch in _batches(new):
            n_bytes += sum((self.folder / name).stat().st_size for name in batch)
            with self._reaching("write"):
                self._fs.put([str(self.folder / name) for name in batch], [f"{self._root}/{name}" for name in batch])
            self._note_all(batch)
        return len(new), n_bytes

    def refuse_unwritable(self) -> None:
        """Find out before anything is computed.

        Raises:
            RunError: the store cannot be written.
        """
        with self._reaching("write"):
            self._fs.pipe_file(f"{self._root}/.moediag", b"")
            with contextlib.suppress(FileNotFoundError):  # another process found out, too
                self._fs.rm_file(f"{self._root}/.moediag")

    def read(self, names: Iterable[str]) -> dict[str, bytes]:
        """Content of files by name."""
        return {name: data for name in names if (data := self._read(name)) is not None}

    def here(self) -> list[str]:
        """Names of the mirror's files that belong on the store."""
        paths = (path for path in self.folder.rglob("*") if path.is_file())
        return sorted(filter(_is_kept, (path.relative_to(self.folder).as_posix() for path in paths)))

    def _holds(self, name: str) -> bool:
        """Whether the store has, from elsewhere, what would be uploaded under this name.

        Raises:
            RunConflictError: it has something else.
        """
        is_vouched_for = name == PROMPTS or name.startswith("checkpoints/")  # by the manifest, by its own name
        if not (_RECORD.fullmatch(name) or (_SHARD.fullmatch(name) and _is_sidecar(name))):
            return False
        if is_vouched_for:
            return self._there(name) is not None
        theirs = self._read(name)
        if theirs is None:
            return False
        if theirs != (self.folder / name).read_bytes() and not _is_same(name, theirs, self.folder / name):
            what = "another run" if name == MANIFEST else f"another {name}"
            raise RunConflictError(
                f"{self.url} holds {what} by now, captured elsewhere; run the same command again to go on with it, or "
                "give another URL (machines that fill one run: --shard-index and --num-shards, or --ray)"
            )
        return True

    # The index

    def _index(self) -> dict[str, tuple[str, int, int]]:
        """Tag there, and size and time of change here, of every file that was the same on both sides."""
        found: dict[str, tuple[str, int, int]] = {}
        with contextlib.suppress(FileNotFoundError):
            for line in (self.folder.parent / _INDEX).read_text().splitlines():
                with contextlib.suppress(ValueError):  # the last line of a killed process
                    name, tag, n_bytes, time = json.loads(line)
                    found[name] = (tag, n_bytes, time)
        return {name: entry for name, entry in found.items() if entry[0] is not None}

    def _note(self, name: str, tag: str | None) -> None:
        stat = (self.folder / name).stat() if tag is not None else None
        line = json.dumps([name, tag, stat.st_size if stat else 0, stat.st_mtime_ns if stat else 0])
        with (self.folder.parent / _INDEX).open("a") as index:  # in one write: other processes do so, too
            index.write(f"\n{line}" if index.tell() else line)

    def _note_all(self, names: list[str]) -> None:
        tags = self._listing() if len(names) > _FEW else {name: tag for name in names if (tag := self._there(name))}
        for name in names:
            self._note(name, tags.get(name))

    def _is_as(self, name: str, entry: tuple[str, int, int]) -> bool:
        """Whether the mirror's file is the one that was the same on both sides."""
        try:
            stat = (self.folder / name).stat()
        except OSError:
            return False
        return (stat.st_size, stat.st_mtime_ns) == entry[1:]

    # The store

    @cached_property
    def _opened(self) -> tuple[Any, str]:
        if self.url.startswith(("file:", "local:")):
            raise RunError(f"{self.url} is a folder of this machine: give its path")
        try:
            import fsspec
        except ModuleNotFoundError:
            raise DependencyError(
                f"{self.url} needs fsspec, which is not installed; pip install 'moediag[store]' and the driver of the "
                "store (s3fs, gcsfs, adlfs)"
            ) from None
        with self._reaching("open"):
            fs, root = fsspec.core.url_to_fs(self.url, use_listings_cache=False)
            return fs, str(root).rstrip("/")

    @property
    def _fs(self) -> Any:
        return self._opened[0]

    @property
    def _root(self) -> str:
        return self._opened[1]

    @contextmanager
    def _reaching(self, verb: str) -> Iterator[None]:
        """Errors of the driver, which are of its own types, in one line."""
        try:
            yield
        except MoediagError:
            raise
        except ImportError as error:
            raise DependencyError(
                f"{self.url} needs a driver of fsspec that is not installed ({error}); pip install it (s3: s3fs, gs: "
                "gcsfs, az and abfs: adlfs)"
            ) from None
        except Exception as error:
            words = str(error) or type(error).__name__
            raise RunError(
                f"cannot {verb} {self.url}: {words}; check the URL, that its bucket exists, and that this machine has "
                "credentials and a network for it"
            ) from None

    def _listing(self) -> dict[str, str]:
        """Tag of every file there that is mirrored, by name."""
        with self._reaching("read"):
            try:
                found = self._fs.find(self._root, detail=True)
            except FileNotFoundError:
                return {}
            names = {path[len(self._root) + 1 :]: info for path, info in found.items() if info.get("type") == "file"}
        return {name: _tag(info) for name, info in names.items() if name and _is_kept(name)}

    def _there(self, name: str) -> str | None:
        with self._reaching("read"):
            try:
                return _tag(self._fs.info(f"{self._root}/{name}"))
            except FileNotFoundError:
                return None

    def _read(self, name: str) -> bytes | None:
        with self._reaching("read"):
            try:
                return bytes(self._fs.cat_file(f"{self._root}/{name}"))
            except FileNotFoundError:
                return None

    def _remove(self, names: list[str]) -> None:
        for name in sorted(names, key=_rank):
            with self._reaching("write"), contextlib.suppress(FileNotFoundError):
                self._fs.rm_file(f"{self._root}/{name}")
            self._note(name, None)


def _tag(info: Mapping[str, Any]) -> str:
    """What changes with a file's content, as far as the store says."""
    return f"{info.get('size')} {next((str(info[key]) for key in _TAGS if info.get(key)), '')}".replace('"', "")


def _is_kept(name: str) -> bool:
    """Whether a file belongs on the store, and cannot lie outside of the folder."""
    parts = name.split("/")
    return all(part and not part.startswith(".") for part in parts) and "logs" not in parts[:-1]


def _is_sidecar(name: str) -> bool:
    return bool(_SHARD.fullmatch(name)) and name.endswith(".json")


def _sidecar_of(name: str) -> str:
    return f"{name.rpartition('.')[0]}.json"


def _rank(name: str) -> tuple[int, str]:
    """The order of uploading; of downloading, too, but for the manifest, which comes last.

    Example:
        >>> sorted(["summary.json", "tokens/shard-00000.json", "tokens/shard-00000.parquet", "run.json"], key=_rank)
        ['run.json', 'tokens/shard-00000.parquet', 'tokens/shard-00000.json', 'summary.json']
    """
    if _SHARD.fullmatch(name):
        return 4 if name.endswith(".json") else 3, name
    if _RECORD.fullmatch(name):
        return 0 if name == MANIFEST else 2 if name.endswith("/arm.json") else 1, name
    return 6 if name == _SUMMARY else 5, name


def _batches(names: list[str]) -> Iterator[list[str]]:
    """Names that may go at the same time: of one rank, and not too many."""
    batch: list[str] = []
    for name in names:
        if batch and (len(batch) == _AT_A_TIME or _rank(batch[0])[0] != _rank(name)[0]):
            yield batch
            batch = []
        batch.append(name)
    if batch:
        yield batch


def _is_same(name: str, theirs: bytes, path: Path) -> bool:
    """Whether two records or sidecars describe the same, whoever made it, and wherever."""
    mine = read_sealed(path)
    try:
        other = json.loads(theirs)
        for content in (mine, other):
            content.pop("sha256")
        if name.endswith("/arm.json"):
            return as_record(other, ArmRecord, name).made_as() == as_record(mine, ArmRecord, name).made_as()
        return bool(_SHARD.fullmatch(name)) and other["data_sha256"] == mine["data_sha256"]
    except (ValueError, KeyError, TypeError, CorruptRunError):
        return False
