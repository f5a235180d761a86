"""Work in pieces: the same pieces in the same order whoever makes them, and nothing left of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from test_results import make_run

from moediag.errors import RunError
from moediag.run import pieces
from moediag.run.capture import Capture, Shard
from moediag.run.pieces import Here, Pool, Processes, Work, each, groups_of, in_pieces
from moediag.run.reader import Run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return make_run(tmp_path_factory.mktemp("pieces") / "run", ("infer",))


Reading = Generator[None, None, Any]

DECODED: list[Capture] = []


def first_sequences(run: Run, shards: tuple[Shard, ...], folder: Path) -> Reading:
    """A piece in a file of its own, and how long it is."""
    data = ""
    for shard in shards:
        DECODED.append(run.capture("infer", shard))
        data += f",{shard.first_sequence}"
        yield
    (folder / "sequences").write_text(data[1:])
    return len(data[1:])


def all_sequences(run: Run, read: Iterator[int], *sections: int) -> list[int]:
    return [*read, *sections]


def total(run: Run, read: Iterator[int]) -> int:
    return sum(read)


def nothing_read(run: Run, read: Iterator[Any]) -> list[Any]:
    return [run.n_sequences, *read]


def fails(run: Run, shards: tuple[Shard, ...], folder: Path) -> Reading:
    yield
    raise ValueError("no such shard")


def cannot_be_read(run: Run, shards: tuple[Shard, ...], folder: Path) -> Reading:
    yield
    raise RunError("not a shard")


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
    works = [
        Work(first_sequences, all_sequences),
        Work(None, nothing_read),
        Work(first_sequences, all_sequences, (total, total), ("infer",)),
    ]
    results = dict(in_pieces(run, works, workers, tmp_path, lambda *step: steps.append(step)))
    lengths = [len(str(shard.first_sequence)) for shard in run.shards]
    assert results == {0: lengths, 1: [run.n_sequences], 2: [*lengths, sum(lengths), sum(lengths)]}
    n_steps = 2 * len(run.shards) + 2 + 3
    assert steps == [(n, n_steps) for n in range(n_steps + 1)]
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("workers", [1, 2])
def test_what_fails_is_raised_and_leaves_nothing(run: Run, workers: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such shard"):
        list(in_pieces(run, [Work(fails, all_sequences)], workers, tmp_path))
    assert not any(tmp_path.iterdir())


def test_a_shard_is_decoded_once_for_works_of_the_same_arms(run: Run, tmp_path: Path) -> None:
    """Rules and analysis of two arms decoded every capture twice."""
    DECODED.clear()
    work = Work(first_sequences, all_sequences, arms=("infer",))
    dict(in_pieces(run, [work, work], 1, tmp_path))
    assert len(DECODED) == 2 * len(run.shards)
    assert all(one is other for one, other in zip(DECODED[::2], DECODED[1::2], strict=True))
    assert not any(array.flags.writeable for one in DECODED for array in one.arrays().values())
    DECODED.clear()


@pytest.mark.parametrize("workers", [1, 2])
def test_what_an_earlier_work_says_of_a_shard_comes_first(run: Run, workers: int, tmp_path: Path) -> None:
    """Findings of rules name a damaged shard better than the analysis that cannot read it."""
    works = [Work(first_sequences, all_sequences), Work(cannot_be_read, all_sequences)]
    results = in_pieces(run, works, workers, tmp_path)
    assert next(results)[0] == 0
    with pytest.raises(RunError, match="not a shard"):
        next(results)
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
