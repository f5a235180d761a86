"""Tokens as text: from the run's token table and a tokenizer that is the run's; nothing where nothing is wanted."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
from test_results import make_run

from moediag.cli import jobs
from moediag.cli.main import main
from moediag.errors import RunError
from moediag.report.decode import WITHHELD, token_texts
from moediag.results import analyze_run, load_frames, load_summary, report, report_run
from moediag.run.files import digest_of, sha256_bytes, write_sealed
from moediag.run.reader import Run, open_run


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run whose checkpoint folder holds a tokenizer of one word per id."""
    monkeypatch.setattr(report, "draw_run_figures", lambda *_, **__: [])
    path = make_run(tmp_path / "run").path
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    save_tokenizer(folder / "tokenizer.json")
    digest = digest_of({"tokenizer.json": sha256_bytes((folder / "tokenizer.json").read_bytes())})
    manifest = json.loads((path / "run.json").read_text())
    write_sealed(path / "run.json", {**manifest, "tokenizer": {"files_sha256": digest}})
    record = path / "checkpoints" / f"{manifest['checkpoint']}.json"
    write_sealed(record, {**json.loads(record.read_text()), "source": str(folder)})
    return open_run(path)


def checkpoint_folder(run: Run) -> Path:
    record = run.checkpoint_of("train")
    assert record is not None
    return Path(record.source)


def save_tokenizer(path: Path, word: str = "secret") -> None:
    from tokenizers import Tokenizer, models

    vocabulary = {f"{word}{i}": i for i in range(1000)}
    Tokenizer(models.WordLevel(vocabulary, unk_token=f"{word}0")).save(str(path))


def worst_of(run: Run) -> pd.DataFrame:
    return pd.DataFrame({"seq_id": [0, 11], "position": [0, 3]})


def ids_before(run: Run, seq_id: int, position: int) -> list[int]:
    shard = next(shard for shard in run.shards if seq_id in shard.seq_ids)
    rows = run.tokens(shard)
    ids = rows.token_id_T[rows.seq_id_T == seq_id].tolist()
    return ids[: 2 + position + 1]  # prompts of make_run are two tokens long


def test_a_token_and_what_is_before_it_come_from_the_token_table(run: Run) -> None:
    texts = token_texts(run, worst_of(run))
    for seq_id, position in ((0, 0), (11, 3)):
        *before, token = ids_before(run, seq_id, position)
        found = texts.of(seq_id, position)
        assert found is not None
        assert found.before.split() == [f"secret{i}" for i in before]
        assert found.token.strip() == f"secret{token}"
    assert texts.of(1, 0) is None
    assert "checkpoint's tokenizer" in texts.note


def test_another_tokenizer_at_the_checkpoints_place_gives_ids(run: Run) -> None:
    """Text of another vocabulary would be made up."""
    save_tokenizer(checkpoint_folder(run) / "tokenizer.json", "other")
    texts = token_texts(run, worst_of(run))
    found = texts.of(11, 3)
    assert found is not None
    *before, token = ids_before(run, 11, 3)
    assert (found.before, found.token) == (" ".join(map(str, before)), f"id {token}")
    assert "not the run's any more" in texts.note


def test_without_a_checkpoint_there_are_ids(run: Run) -> None:
    (checkpoint_folder(run) / "tokenizer.json").unlink()
    texts = token_texts(run, worst_of(run))
    assert texts.of(0, 0) is not None
    assert "give --tokenizer PATH" in texts.note


def test_a_tokenizer_that_is_named_is_used_and_doubted_where_it_is_another(run: Run, tmp_path: Path) -> None:
    save_tokenizer(tmp_path / "mine.json", "other")
    texts = token_texts(run, worst_of(run), tmp_path / "mine.json")
    found = texts.of(0, 0)
    assert found is not None
    assert found.token.strip().startswith("other")
    assert "not the run's tokenizer" in texts.note
    assert "digest differs" not in token_texts(run, worst_of(run), checkpoint_folder(run)).note


def test_a_tokenizer_that_cannot_be_read_is_refused(run: Run, tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text("{")
    for path in (tmp_path / "bad.json", tmp_path / "absent.json", tmp_path):
        with pytest.raises(RunError, match=r"is not a tokenizer\.json"):
            token_texts(run, worst_of(run), path)


def test_nothing_is_read_where_no_text_is_wanted(run: Run) -> None:
    assert token_texts(run, worst_of(run), no_text=True) is WITHHELD


def test_report_writes_both_pages_with_text_or_without(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    analyze_run(run)
    pages = [run.path / "report.md", run.path / "report.html"]
    assert main(["report", str(run.path)]) == 0
    assert capsys.readouterr().out.splitlines() == [f"Wrote {page}" for page in pages]
    assert all("secret" in page.read_text() for page in pages)
    assert main(["report", str(run.path), "--no-text"]) == 0
    for page in pages:
        text = page.read_text()
        assert "secret" not in text
        assert "--no-text" in text.split("make this page again")[-1], "the command makes this page, not another"


def test_the_same_run_gives_the_same_bytes(run: Run) -> None:
    analyze_run(run)
    first = [report_run(run).with_suffix(suffix).read_bytes() for suffix in (".md", ".html")]
    assert [report_run(run).with_suffix(suffix).read_bytes() for suffix in (".md", ".html")] == first


def test_text_and_no_text_are_not_asked_for_at_once(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(run.path), "--tokenizer", "x", "--no-text"]) == 2
    assert "give one of the two" in capsys.readouterr().err


def test_an_analysis_without_text_makes_pages_without_text(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["analyze", str(run.path), "--no-text"]) == 0
    for name in ("tokens", "worst_tokens"):
        assert (load_frames(run)[name]["token_id"] == -1).all()
    assert main(["report", str(run.path)]) == 0
    for page in (run.path / "report.md", run.path / "report.html"):
        assert "secret" not in page.read_text()
        assert f"moediag analyze {run.path} --no-text\n" in page.read_text()
    assert main(["report", str(run.path), "--tokenizer", "x"]) == 1
    assert "was analysed without text" in capsys.readouterr().err
    analyze_run(run)
    assert (load_frames(run)["tokens"]["token_id"] >= 0).all()
    assert "secret" in report_run(run).read_text()


def test_profile_and_demo_keep_text_out_from_the_start(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """Both end in ``finish``, which hands the wish to the analysis and to the pages."""
    jobs.finish(run, no_text=True)
    assert load_summary(run)["provenance"]["no_text"]
    assert "secret" not in (run.path / "report.html").read_text()
    for command in ("profile", "demo", "analyze", "report"):
        assert main([command, "--help"]) == 0
        assert "--no-text" in capsys.readouterr().out
