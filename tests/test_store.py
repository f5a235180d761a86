"""Runs on an object store: a real S3 server of this machine (moto's), reached through s3fs."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import SEED
from records import arm_of, made_otherwise
from scripted_engine import Death, create_scripted_run, fill_scripted_run, make_scripted_run, write_scripted_shard
from test_run_sharing import captured

from moediag.cli.main import main
from moediag.engines.launch import Job
from moediag.engines.ray_workers import _placed, _taken, read_files
from moediag.errors import RunConflictError
from moediag.hygiene import check_run
from moediag.run.capture import Slice
from moediag.run.reader import Run, open_run
from moediag.run.store import MARK, Store, mark_of, mirror_of, store_of
from moediag.run.writer import RunWriter

LAYOUT: dict[str, Any] = {"n_prompts": 6, "shard_size": 1}


@pytest.fixture
def url(bucket: str, tmp_path: Path) -> str:
    return f"{bucket}/{tmp_path.name}/run"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_scripted_run(tmp_path_factory.mktemp("undisturbed") / "run", **LAYOUT).path


class Machines:
    """Machines that share nothing but the store: each has a cache folder of its own."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self._folder, self._patch, self._n = folder, patch, 0

    def another(self) -> Path:
        self._n += 1
        cache = self._folder / f"machine-{self._n}"
        self._patch.setenv("MOEDIAG_CACHE", str(cache))
        return cache

    def mirror(self, url: str, is_read: bool = True) -> Store:
        """What another machine finds on the store."""
        self.another()
        found = mirror_of(url)
        found.pull(is_read)
        return found


@pytest.fixture
def machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machines:
    made = Machines(tmp_path, monkeypatch)
    made.another()
    return made


def fill(url: str, env: dict[str, str], death: Death | None, worker: Slice) -> None:
    """A worker of a machine: what a command does, down to the engine's part."""
    os.environ.update(env)
    store = mirror_of(url)
    store.pull(is_read=False)
    fill_scripted_run(store.folder, LAYOUT, worker, death=death)
    store.push()


def start(url: str, death: Death | None = None, worker: Slice | None = None) -> Any:
    here = str(Path(__file__).parent)
    names = [name for name in os.environ if name.startswith(("AWS_", "MOEDIAG_CACHE"))]
    context = multiprocessing.get_context("spawn")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")])))
        env = {name: os.environ[name] for name in names}
        process = context.Process(target=fill, args=(url, env, death, worker or Slice()))
        process.start()
    return process


def upload(run: Path, url: str) -> None:
    """As a user does who has a run on a disk."""
    from s3fs import S3FileSystem

    S3FileSystem().put(f"{run}/", f"{url}/", recursive=True)


def on_store(url: str) -> dict[str, bytes]:
    from s3fs import S3FileSystem

    fs = S3FileSystem(use_listings_cache=False)
    root, found = url.removeprefix("s3://"), {}
    for path in fs.find(root):
        with contextlib.suppress(FileNotFoundError):  # a command is at work
            found[path[len(root) + 1 :]] = fs.cat_file(path)
    return found


def test_machines_killed_at_any_moment_are_followed_by_others_to_the_same_bytes(
    url: str, undisturbed: Path, machines: Machines
) -> None:
    """Each is killed somewhere in the middle, before and after files and uploads; the next knows the store alone."""
    rng = random.Random(SEED)
    n_done, deaths = 0, 0
    for _ in range(4):
        machines.another()
        process = start(url, Death(at_event=rng.randrange(20, 260)))
        process.join(120)
        deaths += process.exitcode == -9
        if not on_store(url):
            continue
        run = open_run(machines.mirror(url).folder)
        there = [(arm, shard) for arm in run.arms() for shard in run.shards if run.has_capture(arm, shard)]
        for arm, shard in there:
            run.capture(arm, shard)
        assert len(there) >= n_done, "a shard that was on the store is not there any more"
        n_done = len(there)
    assert deaths >= 2
    assert n_done > 0
    machines.another()
    last = start(url)
    last.join(120)
    assert last.exitcode == 0
    found = machines.mirror(url).folder
    assert captured(found) == captured(undisturbed)
    assert check_run(open_run(found)) == []
    assert not [name for name in on_store(url) if "/." in name or name.startswith((".", "logs/"))]


def test_two_machines_fill_one_run(url: str, undisturbed: Path, machines: Machines) -> None:
    """Each its slice, at the same time; what the arms and the run are is the same, so neither is refused."""
    workers = []
    for index in range(2):
        machines.another()
        workers.append(start(url, worker=Slice(index, 2)))
    for worker in workers:
        worker.join(120)
        assert worker.exitcode == 0
    assert captured(machines.mirror(url).folder) == captured(undisturbed)


def test_data_without_its_sidecar_is_not_there(url: str, undisturbed: Path, machines: Machines) -> None:
    """A shard is uploaded data first: killed in between, it is captured again, and its data is not downloaded."""
    from s3fs import S3FileSystem

    upload(undisturbed, url)
    S3FileSystem().rm_file(f"{url}/arms/train/shard-00003.json")
    run = open_run(machines.mirror(url).folder)
    assert [shard.index for shard in run.missing_shards("train")] == [3]
    assert not (run.path / "arms" / "train" / "shard-00003.safetensors").exists()
    write_scripted_shard(RunWriter(run), "train", run.shards[3])
    assert captured(machines.mirror(url).folder) == captured(undisturbed)


def begun(store: Store, **changes: Any) -> Run:
    run = create_scripted_run(store.folder, **{**LAYOUT, **changes})
    RunWriter(run).begin_arm(arm_of(run, "infer"))
    return run


def test_another_run_that_was_begun_there_meanwhile_is_never_mixed(url: str, machines: Machines) -> None:
    """Both machines found nothing there; the second to finish a shard is refused, and so is its next command."""
    first, second = begun(machines.mirror(url, False)), begun(machines.mirror(url, False), seed=1)
    write_scripted_shard(RunWriter(first), "infer", first.shards[0])
    before = on_store(url)
    with pytest.raises(RunConflictError, match="holds another run by now"):
        write_scripted_shard(RunWriter(second), "infer", second.shards[0])
    assert on_store(url) == before
    store = store_of(second.path)
    assert store is not None
    with pytest.raises(RunConflictError, match="of which nothing was uploaded"):
        store.pull(is_read=False)


def test_an_arm_made_otherwise_elsewhere_is_refused_and_a_shard_captured_twice_is_kept_once(
    url: str, machines: Machines
) -> None:
    ours, theirs, third = (begun(machines.mirror(url, False)) for _ in range(3))
    write_scripted_shard(RunWriter(ours), "infer", ours.shards[0])
    before = on_store(url)
    write_scripted_shard(RunWriter(theirs), "infer", theirs.shards[0])
    assert {name: data for name, data in on_store(url).items() if name in before} == before
    shutil.rmtree(third.arm_folder("infer"))
    writer = RunWriter(third)
    writer.begin_arm(made_otherwise(arm_of(third, "infer"), configuration={"dtype": "float32"}))
    with pytest.raises(RunConflictError, match="another arms/infer/arm.json by now"):
        write_scripted_shard(writer, "infer", third.shards[1])


def test_a_run_started_anew_takes_the_old_ones_place(url: str, machines: Machines) -> None:
    """With the first shard, not before; no file of the old one stays, and a mirror of the old one is made anew."""
    old = machines.mirror(url, False)
    fill_scripted_run(old.folder, LAYOUT)
    before = on_store(url)
    new = machines.mirror(url, False)
    run = begun(new, seed=1, force=True)
    assert on_store(url) == before
    write_scripted_shard(RunWriter(run), "infer", run.shards[0])
    names = {name for name in on_store(url) if "/shard-" in name}
    assert names == {
        "arms/infer/shard-00000.json", "arms/infer/shard-00000.safetensors",
        "tokens/shard-00000.json", "tokens/shard-00000.parquet",
    }  # fmt: skip
    old.pull()
    assert open_run(old.folder).record == run.record
    assert open_run(old.folder).arms() == ["infer"]


def test_a_sidecar_of_another_process_is_not_uploaded_before_its_data(
    url: str, undisturbed: Path, machines: Machines
) -> None:
    """Bug: whoever finished a shard took along the sidecars of others on its machine, whose data were on their way."""
    run = begun(machines.mirror(url, False))
    for name in ("tokens/shard-00001.parquet", "tokens/shard-00001.json",
                 "arms/infer/shard-00001.safetensors", "arms/infer/shard-00001.json"):  # fmt: skip
        (run.path / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(undisturbed / name, run.path / name)
    write_scripted_shard(RunWriter(run), "infer", run.shards[0])
    assert [name for name in on_store(url) if "shard-00001" in name] == []
    store = store_of(run.path)
    assert store is not None
    store.push()
    assert open_run(machines.mirror(url).folder).has_capture("infer", run.shards[1])


def test_a_run_killed_while_it_was_started_anew_goes_on_where_it_began(
    url: str, machines: Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: the old run's manifest had gone, the new one was not there yet: the same command was refused for ever."""
    store = machines.mirror(url, False)
    fill_scripted_run(store.folder, LAYOUT)
    run, remove = begun(store, seed=1, force=True), Store._remove

    def only_the_manifest(self: Store, names: list[str]) -> None:
        if names != ["run.json"]:
            raise KeyboardInterrupt
        remove(self, names)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "_remove", only_the_manifest)
        with pytest.raises(KeyboardInterrupt):
            write_scripted_shard(RunWriter(run), "infer", run.shards[0])
    assert "run.json" not in on_store(url)
    store.pull(is_read=False)
    write_scripted_shard(RunWriter(run), "infer", run.shards[0])
    names = {name for name in on_store(url) if "/shard-" in name}
    assert {name.rpartition("/")[2].partition(".")[0] for name in names} == {"shard-00000"}
    assert open_run(machines.mirror(url).folder).record == run.record


def test_a_run_started_anew_that_captured_nothing_leaves_the_store_as_it_was(url: str, machines: Machines) -> None:
    """The next command goes on with the run that is there."""
    store = machines.mirror(url, False)
    fill_scripted_run(store.folder, LAYOUT)
    before, record = on_store(url), open_run(store.folder).record
    begun(store, seed=1, force=True)
    store.pull()
    assert open_run(store.folder).record == record
    assert open_run(store.folder).is_complete("train")
    assert on_store(url) == before


def test_every_command_that_reads_a_run_takes_its_url(
    url: str, undisturbed: Path, machines: Machines, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What one machine analysed is there for the next, with the same bytes as of a run on a disk."""
    local = tmp_path / "local" / "run"
    shutil.copytree(undisturbed, local)
    upload(undisturbed, url)
    assert main(["analyze", str(local)]) == 0
    assert main(["analyze", url]) == 0
    assert f"Wrote {url}/summary.json" in capsys.readouterr().out
    there = on_store(url)
    assert there["summary.json"] == (local / "summary.json").read_bytes()
    assert main(["simulate", url]) == 0
    assert main(["analyze", url]) == 0  # of which the simulation is a part
    assert main(["report", url]) == 0
    assert main(["diagnose", url]) == 0
    machines.another()
    capsys.readouterr()
    assert main(["analyze", url]) == 0
    out = capsys.readouterr().out
    assert f"Unchanged since the last analysis: {url}/summary.json" in out
    before = on_store(url)
    assert {"report.md", "report.html"} < before.keys()
    assert any(name.startswith("simulate/") for name in before)
    pages = [data.decode() for name, data in before.items() if name.endswith((".md", ".html"))]
    assert f"moediag analyze {url}" in before["report.md"].decode()
    assert not [page for page in pages if "/machine-" in page], "a page names a mirror, which no reader has"
    for words in (
        ["validate", url],
        ["compare", url, str(local), "-o", str(tmp_path / "compare"), "--label", "a", "--label", "b"],
        ["export", url, "-o", str(tmp_path / "tokens.parquet")],
        ["trend", url],
        ["trend", f"a={url}", f"b={local}"],
        ["gate", url, "--require", "n_tokens>0"],
    ):
        assert main(words) == 0, (words, capsys.readouterr().err)
    assert "/machine-" not in (tmp_path / "compare" / "report.md").read_text()
    assert "/machine-" not in capsys.readouterr().out, "a mirror is named, which no user knows"
    assert on_store(url) == before, "a command that only reads has written to the store"


def test_what_an_analysis_replaces_goes_from_the_store(url: str, undisturbed: Path, machines: Machines) -> None:
    """A file that the last analysis had and this one has not; a capture that is lost here stays there."""
    upload(undisturbed, url)
    store = machines.mirror(url)
    (store.folder / "analysis").mkdir()
    (store.folder / "analysis" / "old.parquet").write_bytes(b"old")
    store.push()
    assert "analysis/old.parquet" in on_store(url)
    (store.folder / "analysis" / "old.parquet").unlink()
    (store.folder / "arms" / "train" / "shard-00000.safetensors").unlink()
    store.push()
    assert "analysis/old.parquet" not in on_store(url)
    assert "arms/train/shard-00000.safetensors" in on_store(url)
    store.pull()
    assert captured(store.folder) == captured(undisturbed)


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ("s3://bucket/nothing", "holds no moediag run (found nothing)"),
        ("s3://bucket/foreign", "holds no moediag run (found 1 files, no run.json)"),
        ("odd://bucket/run", "Protocol not known: odd"),
        ("gs://bucket/run", "gs: gcsfs"),
        ("file:///tmp/run", "give its path"),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_line(
    bucket: str, machines: Machines, capsys: pytest.CaptureFixture[str], given: str, complaint: str
) -> None:
    from s3fs import S3FileSystem

    S3FileSystem().pipe_file("bucket/foreign/a.txt", b"a")
    assert main(["analyze", given]) == 1
    err = capsys.readouterr().err
    assert complaint in err
    assert err.count("\n") == 1


def test_a_store_that_refuses_is_one_line(
    url: str, undisturbed: Path, machines: Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bucket that does not exist takes no run; found out by a file written and removed, before any engine starts."""
    from moediag.errors import RunError

    store = machines.mirror("s3://no-such-bucket/run", False)
    with pytest.raises(RunError, match="cannot write s3://no-such-bucket/run: The specified bucket does not exist"):
        store.refuse_unwritable()
    there = mirror_of(url)
    there.refuse_unwritable()
    assert on_store(url) == {}


@pytest.mark.parametrize("words", [["compare", "{run}", "{run}", "-o"], ["trend", "{run}", "-o"], ["demo", "-o"]])
def test_results_are_not_written_to_a_url(
    words: list[str], undisturbed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bug: -o s3://bucket/x made a folder called s3: here."""
    assert main([*(word.format(run=undisturbed) for word in words), "s3://bucket/x"]) == 1
    assert "of profile, capture and diagnose alone it may be a URL" in capsys.readouterr().err
    assert not Path("s3:").exists()


def test_a_node_that_does_not_see_the_run_uploads_its_shard_itself(
    url: str, undisturbed: Path, machines: Machines
) -> None:
    """What goes back to the driver is the sidecars; the driver commits what the store has, and uploads nothing."""
    old = machines.mirror(url, is_read=False)
    fill_scripted_run(old.folder, LAYOUT)
    ours = machines.mirror(url)
    run = begun(ours, seed=1, force=True)
    ours.push(["run.json"])
    files = read_files(ours.folder, "run.json", "prompts.parquet", "checkpoints/*.json", "arms/*/arm.json")
    options = {"request": {"arm": "infer"}}
    log = str(ours.folder / "logs" / "infer.log")
    job = Job("engine", "task", str(ours.folder), {}, options, log)
    here = _placed(job, {**files, MARK: mark_of(url)})
    there, shard = open_run(here.run), run.shards[2]
    write_scripted_shard(RunWriter(there), "infer", shard)
    taken = _taken(here, job, shard.stem)
    assert [name for name, data in taken.items() if not data] == [
        f"arms/infer/{shard.stem}.safetensors", f"tokens/{shard.stem}.parquet"
    ]  # fmt: skip
    shutil.rmtree(Path(here.run).parent)
    before = on_store(url)
    assert {name for name in taken if "/shard-" in name} < before.keys()
    ours.pull()
    assert run.has_capture("infer", shard)
    assert before.items() == on_store(url).items()


def test_a_missing_fsspec_is_one_line(
    machines: Machines, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "fsspec", None)
    assert main(["analyze", "s3://bucket/run"]) == 1
    err = capsys.readouterr().err
    assert "pip install 'moediag[store]'" in err
    assert err.count("\n") == 1
