"""Work in pieces: the same pieces in the same order whoever makes them, and nothing left of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from test_results import make_run

from moediag.run import pieces
from moediag.run.capture import Shard
from moediag.run.pieces import Here, Pool, Processes, Work, each, groups_of, in_pieces
from moediag.run.reader import Run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return make_run(tmp_path_factory.mktemp("pieces") / "run", ("infer",))


def first_sequences(run: Run, shards: tuple[Shard, ...], folder: Path) -> int:
    """A piece in a file of its own, and how long it is."""
    data = ",".join(str(shard.first_sequence) for shard in shards)
    (folder / "sequences").write_text(data)
    return len(data)


def all_sequences(run: Run, read: Iterator[int]) -> list[int]:
    return list(read)


def nothing_read(run: Run, read: Iterator[Any]) -> list[Any]:
    return [run.n_sequences, *read]


def fails(run: Run, shards: tuple[Shard, ...], folder: Path) -> None:
    raise ValueError("no such shard")


@pytest.mark.parametrize("least_rows", [1, 40, 1 << 17])
def test_groups_are_whole_shards_in_order(run: Run, least_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "LEAST_ROWS", least_rows)
    groups = groups_of(run)
    assert [shard for group in groups for shard in group] == list(run.shards)
    assert all(groups)
    for group in groups:
        assert len(group) == 1 or sum(len(run.tokens(shard)) for shard in group) <= least_rows


@pytest.mark.parametrize("workers", [1, 2])
def test_the_number_of_processes_changes_nothing(
    run: Run, workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "LEAST_ROWS", 1)
    steps: list[tuple[int, int]] = []
    works = [Work(first_sequences, all_sequences), Work(None, nothing_read)]
    results = dict(in_pieces(run, works, workers, tmp_path, lambda *step: steps.append(step)))
    assert results == {0: [len(str(shard.first_sequence)) for shard in run.shards], 1: [run.n_sequences]}
    total = len(run.shards) + 2
    assert steps == [(n, total) for n in range(total + 1)]
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("workers", [1, 2])
def test_what_fails_is_raised_and_leaves_nothing(run: Run, workers: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such shard"):
        list(in_pieces(run, [Work(fails, all_sequences)], workers, tmp_path))
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("pool", [Here, partial(Processes, 2)])
def test_every_case_is_done_once_and_counted(pool: Callable[[], Pool]) -> None:
    steps: list[tuple[int, int]] = []
    found = dict(each([9, 4, 16], math.isqrt, pool(), lambda *step: steps.append(step)))
    assert found == {9: 3, 4: 2, 16: 4}
    assert steps == [(n, 3) for n in range(4)]
    with pytest.raises(ValueError, match="nonneg"):
        list(each([9, -1], math.isqrt, pool()))
    assert list(each([], math.isqrt, pool())) == []


def test_what_is_closed_is_not_done(run: Run, tmp_path: Path) -> None:
    """Errors that checks find keep the analyses from being made."""
    results = in_pieces(run, [Work(None, nothing_read), Work(fails, all_sequences)], 1, tmp_path)
    assert next(results)[0] == 0
    results.close()
    assert not any(tmp_path.iterdir())
