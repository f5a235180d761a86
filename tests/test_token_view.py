"""The token view: which responses, what of them, what corrections make of a token, and how large it can get."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd
import pytest
from test_report_decode import run as run
from test_run_directory import LAYERS

from moediag.cli.main import main
from moediag.corrections import weights
from moediag.corrections.presets import PRESETS
from moediag.errors import MoediagError
from moediag.report import TokenTexts, html_page, token_texts
from moediag.report.blocks import Page, section
from moediag.report.token_view import (
    CORRECTIONS,
    LONGEST,
    N_RESPONSES,
    ReadResponse,
    Response,
    TokenView,
    ViewedToken,
    choose_responses,
    read_responses,
    shown_positions,
    token_view,
)
from moediag.results import analyze_run, load_frames
from moediag.run.align import PairBlock
from moediag.run.reader import Run

SEQUENCES = pd.DataFrame({"seq_id": range(20), "n_tokens": [0, *[9] * 19], "abs_logp_diff_mean": np.arange(20.0)})


def html_of(view: TokenView) -> str:
    part = section("tokens", "Token by token", view)
    assert part is not None
    return html_page(Page("one", (), None, (), (part,)))


def block_of(n: int, n_layers: int, seed: int = 0) -> PairBlock:
    rng = np.random.default_rng(seed)
    infer_T = -rng.exponential(1.0, n).astype(np.float32)
    return PairBlock(
        seq_id_T=np.full(n, seed), prompt_id_T=np.full(n, seed), sample_index_T=np.zeros(n, np.int32),
        position_T=np.arange(n, dtype=np.int32), token_id_T=rng.integers(0, 1000, n),
        logp_train_T=infer_T + rng.normal(0, 0.3, n).astype(np.float32), logp_infer_T=infer_T,
        entropy_train_T=np.ones(n, np.float32), entropy_infer_T=np.ones(n, np.float32),
        margin_infer_TL=rng.exponential(1.0, (n, n_layers)).astype(np.float32),
    )  # fmt: skip


def test_the_worst_come_after_those_requested() -> None:
    assert choose_responses(SEQUENCES) == [19, 18, 17, 16, 15, 14, 13, 12]
    assert choose_responses(SEQUENCES, [3, 18]) == [3, 18, 19, 17, 16, 15, 14, 13]
    assert choose_responses(None) == []
    with pytest.raises(MoediagError, match="no sequence 20 with a response: expected one of 20 between 0 and 19"):
        choose_responses(SEQUENCES, [20])
    with pytest.raises(MoediagError, match="shows 8 responses at most, found 9 of --sequence"):
        choose_responses(SEQUENCES, range(9))


def test_weights_are_those_of_the_corrections_on_the_whole_response() -> None:
    """A sequence's weight must not be that of the part of it which is shown."""
    block = block_of(LONGEST + 400, 0)
    read = ReadResponse.of(block, np.zeros((len(block), 0), bool))
    for nth, preset in enumerate(CORRECTIONS.values()):
        expected = weights(PRESETS[preset].words, block.logp_train_T, block.logp_infer_T, block.seq_id_T)
        np.testing.assert_array_equal(read.weights_CT[nth], expected)
    assert not [name for name in CORRECTIONS.values() if PRESETS[name].correction.needs_advantage]


def test_a_long_response_is_shown_around_its_worst_token() -> None:
    block = block_of(3 * LONGEST, 2)
    block.logp_train_T[LONGEST + 700] = -30.0
    view = token_view([ReadResponse.of(block, np.zeros((len(block), 2), bool))], (1, 3), TokenTexts())
    assert view is not None
    (response,) = view.responses
    assert len(response.tokens) == LONGEST
    assert response.left_out == "Shown: tokens 1,200 to 2,199 of 3,000, around the worst."
    assert response.tokens[500].tone == "n4"


@pytest.mark.parametrize(("n_layers", "flip_rate", "most"), [(48, 0.1, 4e6), (94, 0.5, 12e6)])
def test_a_page_is_bounded(n_layers: int, flip_rate: float, most: float) -> None:
    """As much as a page takes, 8 responses of 1,000 tokens: of a usual model, and of the worst there could be."""
    rng = np.random.default_rng(0)
    reads = [
        ReadResponse.of(block_of(LONGEST + 9, n_layers, seed), rng.random((LONGEST + 9, n_layers)) < flip_rate)
        for seed in range(N_RESPONSES)
    ]
    view = token_view(reads, range(n_layers), TokenTexts())
    assert view is not None
    assert sum(len(one.tokens) for one in view.responses) == N_RESPONSES * LONGEST
    assert most / 4 < len(html_of(view).encode()) < most


def test_the_view_of_a_run_is_of_its_tokens_and_its_text(run: Run) -> None:
    analyze_run(run)
    chosen = choose_responses(load_frames(run)["sequences"], [5])
    read = read_responses(run, chosen)
    assert [int(one.block.seq_id_T[0]) for one in read] == chosen
    view = token_view(read, LAYERS, token_texts(run, shown_positions(read)))
    assert view is not None
    assert view.responses[0].seq_id == 5
    page = html_of(view)
    shard = next(shard for shard in run.shards if 5 in shard.seq_ids)
    rows = run.tokens(shard)
    ids = rows.token_id_T[(rows.seq_id_T == 5) & rows.is_response_T]
    part = page.split('id="seq-5"')[1].split("</section>")[0]
    assert re.findall(r">\s*secret(\d+)", part.split('role="listbox"')[1]) == [str(one) for one in ids]
    hidden = token_view(read, LAYERS, token_texts(run, shown_positions(read), no_text=True))
    assert hidden is not None
    assert "secret" not in html_of(hidden)
    assert {token.text for one in hidden.responses for token in one.tokens} == {""}


def test_report_shows_the_sequence_requested_and_refuses_one_that_is_not_there(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    analyze_run(run)
    assert main(["report", str(run.path), "--sequence", "7", "--sequence", "3"]) == 0
    page = (run.path / "report.html").read_text()
    assert re.findall(r'id="seq-(\d+)"', page)[:2] == ["7", "3"]
    assert "--sequence 7 --sequence 3" in page, "how to make this page again"
    capsys.readouterr()
    assert main(["report", str(run.path), "--sequence", "99"]) == 1
    assert "there is no sequence 99 with a response: expected one of 12 between 0 and 11" in capsys.readouterr().err


def test_without_text_the_page_holds_no_token(run: Run) -> None:
    """The text of a page that was asked to hold none must not come back by the token view."""
    analyze_run(run)
    assert main(["report", str(run.path), "--no-text"]) == 0
    page = (run.path / "report.html").read_text()
    assert 'id="seq-' in page
    assert "secret" not in page


def test_hostile_text_of_a_token_is_text() -> None:
    token = ViewedToken("<script>alert(1)</script>\"'", False, "p1", (0,), ("0", "<b>", '"x"'))
    view = TokenView((Response(1, "<i>", "<u>", (token,), ""),), 1, "note")
    page = html_of(view)
    assert page.count("<script>") == 1
    assert "<b>" not in page.split("<main")[1]
    assert "&lt;script&gt;alert(1)" in page
