"""Every page in a real browser: folding, contents, single tokens, nothing cut at any width, light, dark, on paper."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pandas as pd
import pytest
from browser import PROGRAMS, Browser, program

from moediag.cli.main import main
from moediag.report.token_view import BINS
from moediag.run.reader import open_run

pytestmark = pytest.mark.skipif(
    program() is None,
    reason=f"THE TESTS OF PAGES IN A BROWSER DID NOT RUN: no Chromium here (looked for {', '.join(PROGRAMS)})",
)

WIDTHS = (360, 800, 1400, 2200)
NAMES = ("moe", "compare", "simulate", "trend", "diagnose")

CUT = """
[...document.querySelectorAll("body *")].filter((e) => !e.closest(".box, pre, dialog, .skip, svg")).filter((e) => {
  const r = e.getBoundingClientRect();
  return r.width > 0 && (r.right > innerWidth + 1 || r.left < -1);
}).map((e) => `${e.tagName}.${e.className}: ${e.textContent.slice(0, 60)}`)
"""
"""What reaches beyond the window and lies in no box of its own that scrolls."""

CONTRAST = """
(() => {
  const rgb = (words) => words.match(/[\\d.]+/g).map((n, i) => n * (words.startsWith("color(") && i < 3 ? 255 : 1));
  const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (e) => {
    for (; e; e = e.parentElement) {
      const colour = rgb(getComputedStyle(e).backgroundColor);
      if (colour.length === 3 || colour[3] === 1) return colour;
    }
    return [255, 255, 255];
  };
  const found = [];
  const texts = "h1, h2, h3, p, li, dt, dd, td, th, a, code, .badge, .finding, figcaption, caption, .t";
  for (const e of document.querySelectorAll(texts)) {
    if (!e.textContent.trim() || !e.getClientRects().length) continue;
    const [a, b] = [light(rgb(getComputedStyle(e).color)), light(behind(e))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) found.push(`${e.tagName}.${e.className}: ${ratio.toFixed(2)}`);
  }
  return found;
})()
"""
"""Text whose contrast is below the 4.5 of WCAG AA."""


@pytest.fixture(scope="module")
def pages(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The pages that the demo leaves, and those of a trend and of a diagnosis."""
    folder = tmp_path_factory.mktemp("pages")
    steps = pd.DataFrame({"step": [0, 50, 100], "k3": [1e-3, 2e-3, 1e-3], "k3_se": 1e-4})
    steps.to_csv(folder / "steps.csv", index=False)
    assert main(["trend", str(folder / "steps.csv"), "-o", str(folder / "trend")]) == 0
    shutil.copytree(demo / "dense", folder / "dense")
    assert main(["diagnose", str(folder / "dense")]) == 0
    (simulated,) = (demo / "moe" / "simulate").iterdir()
    folders = (demo / "moe", demo / "compare", simulated, folder / "trend", folder / "dense")
    return {name: one / "report.html" for name, one in zip(NAMES, folders, strict=True)}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as browser:
        yield browser


def n_open(browser: Browser) -> int:
    return int(browser.js("document.querySelectorAll('main > section > details[open]').length"))


def open_all(browser: Browser) -> None:
    browser.js("document.querySelectorAll('details').forEach((fold) => { fold.open = true; })")


@pytest.mark.parametrize("is_dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_cut(browser: Browser, pages: dict[str, Path], name: str, width: int, is_dark: bool) -> None:
    """Bug: two tables of a run's page were cut at the right, and the page was 24,500 pixels high."""
    browser.open(pages[name], width, is_dark=is_dark)
    assert browser.js("document.documentElement.scrollHeight") < 9000, "folded, a page is a few screens"
    open_all(browser)
    assert browser.js("document.documentElement.scrollWidth") <= width
    assert browser.js(CUT) == []


@pytest.mark.parametrize("is_dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("name", NAMES)
def test_text_can_be_read(browser: Browser, pages: dict[str, Path], name: str, is_dark: bool) -> None:
    browser.open(pages[name], is_dark=is_dark)
    background = browser.js("getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(20, 23, 26)" if is_dark else "rgb(255, 255, 255)")
    open_all(browser)
    assert browser.js(CONTRAST) == []
    images = browser.js(
        "[...document.querySelectorAll('figure img')].map((i) => [i.alt.length, i.naturalWidth > 0, "
        "getComputedStyle(i).backgroundColor])"
    )
    assert images
    assert all(alt > 20 and is_drawn and card == "rgb(255, 255, 255)" for alt, is_drawn, card in images)


@pytest.mark.parametrize("name", NAMES)
def test_sections_are_folded_with_a_finding_each(browser: Browser, pages: dict[str, Path], name: str) -> None:
    browser.open(pages[name])
    assert n_open(browser) == 0
    bare = browser.js(
        "[...document.querySelectorAll('main > section')].filter((s) => !s.querySelector('summary > .finding'))"
        ".map((s) => s.id)"
    )
    assert bare == []
    levels = browser.js("[...document.querySelectorAll('h1, h2, h3')].map((h) => Number(h.tagName[1]))")
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    assert browser.errors == []
    assert browser.js("performance.getEntriesByType('resource').filter((e) => !e.name.startsWith('data:')).length") == 0


@pytest.mark.parametrize("name", NAMES)
def test_the_first_screen_holds_diagnosis_numbers_and_picture(
    browser: Browser, pages: dict[str, Path], name: str
) -> None:
    browser.open(pages[name], 1400, 900)
    ends = browser.js(
        "[...document.querySelectorAll('header .lead > :first-child, header figure img')]"
        ".map((e) => e.getBoundingClientRect().bottom)"
    )
    assert len(ends) == 2
    assert max(ends) <= 900
    if name in ("moe", "diagnose"):
        words = browser.js("document.querySelector('.verdict').innerText")
        assert [line for line in ("Is something wrong?", "Where?", "What next?") if line not in words] == []
        assert browser.js("document.querySelector('.verdict .command').innerText").startswith("moediag ")
        assert browser.js("document.querySelectorAll('header .lead tbody tr').length") == 5


def test_a_link_opens_what_it_leads_to(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["moe"], anchor="floors")
    assert browser.js("document.querySelector('#floors details').open")
    assert n_open(browser) == 1
    assert 0 <= browser.js("document.querySelector('#floors').getBoundingClientRect().top") < 100
    browser.js("document.querySelector('nav a[href=\"#depth\"]').click()")
    browser.js("new Promise((done) => setTimeout(done, 200))")
    assert browser.js("document.querySelector('#depth details').open")
    browser.js("document.querySelector('#depth details').open = false")
    browser.js("document.querySelector('nav a[href=\"#depth\"]').click()")
    assert browser.js("document.querySelector('#depth details').open"), "a second time, too"
    assert not browser.js("document.querySelector('#tokens details').open")
    browser.js("document.querySelector('#worst-sequences a[href^=\"#seq-\"]').click()")
    browser.js("new Promise((done) => setTimeout(done, 200))")
    assert browser.js("document.querySelector('#tokens details').open"), "the fold around what it leads to"


def test_a_section_opens_by_the_keyboard_and_all_at_once(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["moe"])
    browser.js("document.querySelector('#tail summary').focus()")
    browser.key("Enter")
    assert browser.js("document.querySelector('#tail details').open")
    n = browser.js("document.querySelectorAll('main > section > details').length")
    browser.js("document.querySelector('nav button').click()")
    assert n_open(browser) == n > 15
    browser.js("new Promise((done) => setTimeout(done, 200))")
    assert browser.js("document.querySelector('nav button').textContent") == "Fold all"
    browser.js("document.querySelector('nav button').click()")
    assert n_open(browser) == 0


@pytest.mark.parametrize("name", NAMES)
def test_contents_stand_beside_the_page_or_folded_above_it(browser: Browser, pages: dict[str, Path], name: str) -> None:
    browser.open(pages[name], 1400)
    lost = browser.js(
        "[...document.querySelectorAll('nav a')].filter((a) => !document.querySelector(a.hash)).map((a) => a.hash)"
    )
    assert lost == []
    assert browser.js("document.querySelectorAll('nav a').length") == browser.js(
        "document.querySelectorAll('main > section').length"
    )
    assert browser.js("document.querySelector('nav > details').open")
    open_all(browser)
    browser.js("scrollTo(0, document.documentElement.scrollHeight / 2)")
    top, right = browser.js("(() => { const r = document.querySelector('nav').getBoundingClientRect(); "
                            "return [r.top, r.right]; })()")  # fmt: skip
    assert 0 <= top < 50, "it stays in sight"
    assert right <= browser.js("document.querySelector('main').getBoundingClientRect().left")
    browser.open(pages[name], 800)
    assert not browser.js("document.querySelector('nav > details').open")


def test_on_paper_everything_is_open(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["moe"])
    hidden = (
        "[...document.querySelectorAll('main table, main figure, main p')].filter((e) => !e.checkVisibility("
        "{contentVisibilityAuto: true})).length"
    )
    assert browser.js(hidden) > 20, "folded on the screen"
    browser.print_media()
    assert browser.js(hidden) == 0
    assert browser.js("getComputedStyle(document.querySelector('nav')).display") == "none"
    browser.open(pages["moe"], 794)
    browser.print_media()
    assert browser.js("document.documentElement.scrollWidth") <= 794, "A4 holds it"


def test_tokens_are_those_of_the_frames(browser: Browser, pages: dict[str, Path]) -> None:
    """Colours, ticks and numbers of every shown token, against the run's own arrays."""
    run = open_run(pages["moe"].parent)
    worst = pd.read_parquet(run.path / "analysis" / "infer~train" / "sequences.parquet").query("n_tokens > 0")
    worst = worst.sort_values("abs_logp_diff_mean", ascending=False)["seq_id"].tolist()
    browser.open(pages["moe"], anchor="tokens")
    shown = browser.js("[...document.querySelectorAll('.response')].map((r) => Number(r.id.slice(4)))")
    assert shown == worst[:8]
    tokens = browser.js(
        f"[...document.querySelectorAll('#seq-{shown[0]} [data-v]')].map((t) => [t.className, t.dataset.v.split('|'), "
        "t.querySelector('path') ? t.querySelector('path').getAttribute('d').split('M').length - 1 : 0])"
    )
    block = next(b for b in run.pair(*run.main_arms).blocks() if shown[0] in b.seq_id_T)
    rows = block.seq_id_T == shown[0]
    train_T, infer_T = block.logp_train_T[rows].astype(float), block.logp_infer_T[rows].astype(float)
    ids = (block.expert_ids_train_TLK[rows], block.expert_ids_infer_TLK[rows])
    assert len(tokens) == len(train_T)
    for t, (tone, facts, n_ticks) in enumerate(tokens):
        diff = train_T[t] - infer_T[t]
        n = sum(abs(diff) >= bound for bound in BINS)
        assert tone == f"t {'z' if not n else ('p' if diff > 0 else 'n') + str(n)}"
        n_flips = sum(set(a) != set(b) for a, b in zip(ids[0][t].tolist(), ids[1][t].tolist(), strict=True))
        assert n_ticks == n_flips
        assert float(facts[3].replace("−", "-")) == pytest.approx(diff, rel=0.01, abs=1e-6)
        assert float(facts[4]) == pytest.approx(math.exp(diff), rel=1e-3)


def test_a_token_gives_its_numbers_to_the_mouse_and_to_the_keyboard(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["moe"], anchor="tokens")
    words = "document.querySelector('.readout').innerText"
    browser.point(".response [data-v]:nth-of-type(5)")
    first = browser.js(words)
    for label in ("p train", "p infer", "logp_diff", "smallest margin", "flipped MoE layers", "IcePop 0.5 to 5"):
        assert label in first
    assert browser.js("document.querySelectorAll('[data-v][aria-selected=true]').length") == 1
    browser.js("document.querySelector('[data-v][aria-selected=true]').focus()")
    browser.key("ArrowRight")
    assert browser.js(words) != first
    assert "position\n5" in browser.js(words)
    browser.key("ArrowLeft")
    assert browser.js(words) == first
    box = browser.js("(() => { const r = document.querySelector('.readout').getBoundingClientRect(); "
                     "return [r.top, r.bottom, innerHeight]; })()")  # fmt: skip
    assert 0 <= box[0] < box[1] <= box[2], "in sight while the tokens are"
