"""The report of a study: its files, and the page as a browser shows it."""

import csv
import json
import os
import socket
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
from eval.chromium import Browser, find_chromium, running
from eval.studies import save_tiny_model, small_study

import kvframe
import kvframe.eval
from kvframe.errors import ConfigError
from kvframe.eval.engine import make_engine
from kvframe.eval.figures import figure
from kvframe.eval.outcome import Outcome
from kvframe.eval.report import check_report_packages, write_report
from kvframe.eval.report.effects import changes
from kvframe.eval.report.markdown import markdown_page
from kvframe.eval.report.paired import paired
from kvframe.eval.report.table import Row, summarise
from kvframe.eval.running import Results, run_study

pytest.importorskip("matplotlib", reason="a report needs pip install 'kvframe[eval]'")
pytest.importorskip("jinja2")
pytest.importorskip("scipy")

METRICS = ("score", "score_full", "kl", "attended_total", "bytes_per_token", "retrieval_rate")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """A study of three variants on two tasks with two seeds, and one cell of it that has failed."""
    folder = tmp_path_factory.mktemp("study")
    tasks = [kvframe.eval.task("copy", copy_tokens=number, cue_tokens=4) for number in (6, 10)]
    study = small_study(save_tiny_model(folder / "model"), tasks=tasks, seeds=range(2), metrics=METRICS,
                        vary={"trigger": [kvframe.EveryStep()]},
                        title="Tiny & <small>")  # fmt: skip
    found = run_study(study, folder / "results.sqlite", engine=make_engine("inline"))
    failed = Outcome(key=found.cells[-4].key, error="Traceback ...\nValueError: a <b>bad</b> thing", seconds=0.0)
    return attrs.evolve(found, outcomes=found.outcomes | {failed.key: failed})


@pytest.fixture(scope="module")
def report(results: Results, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its directory."""
    folder = tmp_path_factory.mktemp("report")
    assert write_report(results, folder) == folder / "index.html"
    return folder


# ---- files ----------------------------------------------------------------------------------------------------------


def test_the_page_needs_nothing_else(report: Path, results: Results) -> None:
    """No picture, style or script from elsewhere, and nothing of this machine but what it is."""
    page = (report / "index.html").read_text(encoding="utf-8")

    for outside in ("<link", "<img", "src=", "url(http", "@import", "https://"):
        assert outside not in page.replace("http://www.w3.org", "")
    # A name of a few letters may stand in any text.
    assert len(socket.gethostname()) < 5 or socket.gethostname() not in page
    assert str(Path(results.study.model).parent) not in page
    assert os.path.expanduser("~") + "/" not in page
    assert "Tiny &amp; &lt;small&gt;" in page and "a &lt;b&gt;bad&lt;/b&gt; thing" in page
    assert len(page) < 3_000_000


def test_pictures_are_files_too(report: Path) -> None:
    """Every picture twice, each a whole file of its kind."""
    pictures = list((report / "pictures").iterdir())

    assert {path.stem for path in pictures} >= {
        "score-against-attended", "kl-against-attended", "score-against-bytes", "kl-against-bytes", "heat-map-kl",
        "heat-map-score", "captured-mass-by-layer", "retrieval-rate-by-layer", "retrieval-rates", "segment-lengths",
        "timeline-0", "timeline-1",
    }  # fmt: skip
    for path in pictures:
        if path.suffix == ".svg":
            text = path.read_text(encoding="utf-8")
            assert ElementTree.fromstring(text).tag.endswith("svg") and "var(--" not in text
            assert path.with_suffix(".png") in pictures
        else:
            assert path.read_bytes().startswith(b"\x89PNG")


def test_numbers_are_files_too(report: Path, results: Results) -> None:
    """Every figure of every cell, in CSV and in Parquet."""
    with (report / "results.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))

    by_key = {row["key"]: row for row in rows}
    for cell, outcome in results.done():
        row = by_key[cell.key]
        assert (row["label"], int(row["seed"]), row["task"]) == (cell.label, cell.seed, results.task_title(cell))
        assert {name: float(row[name]) for name in METRICS if row[name]} == {
            name: value for name, value in (outcome.figures or {}).items() if value is not None
        }
        assert json.loads(row["policy"])["trigger"]["stage"] == cell.policy.trigger.name
    parquet = pytest.importorskip("pyarrow.parquet").read_table(report / "results.parquet").to_pylist()
    assert [row["key"] for row in parquet] == [row["key"] for row in rows]
    assert [row["kl"] for row in parquet] == [float(row["kl"]) if row["kl"] else None for row in rows]


def test_a_report_that_cannot_be_written(results: Results, tmp_path: Path) -> None:
    """Is a clear error."""
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write the report"):
        write_report(results, tmp_path / "file")


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """The way out is said."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"a report needs jinja2 and matplotlib and scipy; pip install"):
        check_report_packages()


def test_a_study_with_nothing_done(results: Results, tmp_path: Path) -> None:
    """Is a page all the same."""
    page = write_report(attrs.evolve(results, outcomes={}), tmp_path / "empty")

    assert "All figures" in page.read_text(encoding="utf-8")


def test_what_each_change_does() -> None:
    """Means over the tasks, contexts and budgets that both have."""

    def row(label: str, budget: int | None, **figures: float) -> Row:
        spreads = {name: kvframe.eval.figures.Spread(value, None, 1) for name, value in figures.items()}
        return Row(label=label, slot=None, task="copy", context=100, budget=budget, num_seeds=1, figures=spreads)

    rows = [
        row("base", 16, score=0.5, kl=0.4, attended_total=40.0, bytes_per_token=100.0, retrieval_rate=0.1),
        row("base", 32, score=0.6, kl=0.2, attended_total=60.0, bytes_per_token=200.0, retrieval_rate=0.3),
        row("other", 16, score=0.7, kl=0.8, attended_total=40.0, bytes_per_token=50.0, retrieval_rate=1.0),
        row("other", 32, score=0.8, kl=0.4, attended_total=60.0, bytes_per_token=100.0, retrieval_rate=1.0),
        row("whole", None, score=0.6, kl=0.0),
    ]
    other, whole = changes(rows, "base")

    assert [(cell.text, cell.kind) for cell in other.cells] == [
        ("+20.0 points", "good"), ("× 2.00", "bad"), ("× 1.00", ""), ("× 0.50", ""), ("20.0% → 100.0%", "")
    ]  # fmt: skip
    assert [(cell.text, cell.kind) for cell in whole.cells[:3]] == [("+0.0 points", ""), ("× 0.00", "good"), ("–", "")]


# ---- as Markdown ----------------------------------------------------------------------------------------------------


def cells_of(page: str, title: str) -> dict[str, dict[str, str]]:
    """The table under a heading: a dict of columns for every variant and budget."""
    body = page.partition(f"{title}\n\n")[2].partition("\n\n")[0]
    heads, _, *lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in body.splitlines()]
    return {" ".join(line[:2]): dict(zip(heads, line, strict=True)) for line in lines}


def test_markdown_has_the_figures(results: Results) -> None:
    """Means with their intervals; what has failed and what was not run."""
    first = results.cells[0]
    page = markdown_page(
        attrs.evolve(results, outcomes={key: end for key, end in results.outcomes.items() if key != first.key})
    )
    rows = {f"{row.label} {row.budget or '-'}": row for row in summarise(results) if row.task == "copy copy_tokens=10"}
    found = cells_of(page, "## copy copy_tokens=10")

    assert list(found) == list(rows)
    for place, row in rows.items():
        kl = row.figures["kl"]
        assert found[place]["KL"] == (f"{kl.mean:.4f}" if kl.reach is None else f"{kl.mean:.4f} ± {kl.reach:.4f}")
        assert found[place]["seeds"] == str(row.num_seeds)
    assert "ValueError: a <b>bad</b> thing" in page.partition("## Failed")[2].partition("## Not run")[0]
    assert first.title in page.partition("## Not run")[2].partition("## Policies")[0]
    assert str(Path(results.study.model).parent) not in page


def test_differences_are_taken_seed_by_seed(results: Results) -> None:
    """What is common to a sample drops out of the interval; a seed that one lacks does not count."""
    kl = {"louiskv": {0: 1.0, 1: 5.0, 2: 9.0}, "trigger: every-step": {0: 0.5, 1: 4.0, 2: 8.5}, "full": {0: 0.0}}
    study = attrs.evolve(results.study, seeds=(0, 1, 2), token_budget=(16,), watch=0, tasks=results.study.tasks[:1])
    outcomes = {
        cell.key: Outcome(key=cell.key, figures={"kl": kl[cell.label][cell.seed]}, seconds=0.0)
        for cell in study.cells()
        if cell.seed in kl[cell.label]
    }
    made = Results(study=study, cells=study.cells(), outcomes=outcomes)
    every, full = paired(made, "kl")

    assert (every.label, every.budget, full.label, full.budget) == ("trigger: every-step", 16, "full", None)
    mean, reach = -2 / 3, 4.302653 * (0.25 / 3) ** 0.5 / 3**0.5  # t of 2 degrees, variance 0.25 / 3
    assert (every.difference.mean, every.difference.reach) == (pytest.approx(mean), pytest.approx(reach, rel=1e-6))
    assert (full.difference.mean, full.difference.reach) == (-1, None)
    found = cells_of(markdown_page(made), "### copy: less the base, seed by seed")
    assert found["trigger: every-step 16"]["KL"] == f"{mean:.4f} ± {reach:.4f}" and found["full -"]["KL"] == "-1.0000"


def test_kl_along_the_text(results: Results) -> None:
    """Eight parts of equal length, each a mean over its tokens and then over the seeds."""
    study = attrs.evolve(
        results.study, token_budget=(16,), watch=0, tasks=results.study.tasks[:1], vary={}, policies=()
    )
    outcomes = {
        cell.key: Outcome(
            key=cell.key, figures={"kl": 0.0, "kl_by_token": [cell.seed + 1.0] * 8 + [2.0] * 8}, seconds=0.0
        )
        for cell in study.cells()
    }
    page = markdown_page(Results(study=study, cells=study.cells(), outcomes=outcomes))
    found = cells_of(page, "### copy: KL along the generated text")["louiskv 16"]

    assert [found[f"{part}/8"].partition(" ")[0] for part in (1, 4, 5, 8)] == ["1.5000", "1.5000", "2.0000", "2.0000"]


def test_markdown_keeps_contexts_apart(results: Results) -> None:
    """A section each, with the figures, differences and curves of its own cells."""
    study = attrs.evolve(
        results.study, context=(64, 96), token_budget=(16,), watch=0, tasks=results.study.tasks[:1], policies=()
    )
    outcomes = {
        cell.key: Outcome(
            key=cell.key,
            figures={"kl": kl, "kl_by_token": [kl] * 8},
            seconds=0.0,
        )
        for cell in study.cells()
        for kl in [cell.context + (cell.slot is not None)]
    }
    page = markdown_page(Results(study=study, cells=study.cells(), outcomes=outcomes))

    for context in (64, 96):
        name = f"copy, {context} tokens"
        assert cells_of(page, f"## {name}")["louiskv 16"]["KL"].startswith(f"{context}.0000")
        (changed,) = cells_of(page, f"### {name}: less the base, seed by seed").values()
        assert changed["KL"].startswith("1.0000")
        curves = cells_of(page, f"### {name}: KL along the generated text")
        assert curves["louiskv 16"]["8/8"].startswith(f"{context}.0000")


# ---- in a browser ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """Headless Chromium."""
    program = find_chromium()
    if program is None:
        pytest.skip("Chromium is not installed; apt-get install chromium")
    with running(program, tmp_path_factory.mktemp("profile")) as browser:
        yield browser


CELLS = """[...document.querySelectorAll("#figures tbody tr")].map((row) => ({
  label: row.dataset.label, task: row.dataset.task, budget: row.cells[3].dataset.value,
  figures: Object.fromEntries([...row.querySelectorAll("[data-figure]")].map(
    (cell) => [cell.dataset.figure, [cell.dataset.value ?? null, cell.innerText.split("±")[0].trim()]])),
}))"""
BOXES = """[...document.querySelectorAll("figure svg, .timeline:not([hidden]) svg, .tile, h2, .legend span")]
  .filter((part) => !part.closest("details:not([open])"))
  .map((part) => { const box = part.getBoundingClientRect(); return [box.left, box.width, box.height,
    Boolean(part.closest(".scroll"))]; })"""


@pytest.mark.parametrize("width, dark", [(1280, False), (390, False), (390, True)])
def test_numbers_can_be_read(width: int, dark: bool, browser: Browser, report: Path, results: Results) -> None:
    """At the width of a desk and of a phone, light and dark: the table has every figure, every picture is there and has
    a size, and the page itself does not move sideways."""
    browser.open(report / "index.html", width=width, dark=dark)
    shown = {(row["label"], row["task"], int(row["budget"])): row["figures"] for row in browser.evaluate(CELLS)}

    rows = summarise(results)
    assert len(shown) == len(rows) > 0
    for row in rows:
        found = shown[row.label, row.task, -1 if row.budget is None else row.budget]
        for name, value in row.figures.items():
            exact, text = found[name]
            assert float(exact) == value.mean and text == figure(name).show(value.mean)
    assert browser.evaluate("document.documentElement.scrollWidth") == width
    boxes = browser.evaluate(BOXES)
    assert len(boxes) > 20
    for left, box_width, height, may_move in boxes:
        assert box_width > 10 and height > 8
        assert left >= 0 and (may_move or left + box_width <= width + 1)
    background = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, background.strip("rgb()").split(","))) < 150) == dark


def test_pictures_say_what_they_show(browser: Browser, report: Path, results: Results) -> None:
    """Labels and ticks are text; a variant has the same colour in the legend as in the charts."""
    browser.open(report / "index.html", width=1280)
    texts: list[str] = browser.evaluate(
        """[...document.querySelectorAll("#charts svg[role=img]")].map((picture) => picture.textContent)"""
    )
    labels: list[str] = browser.evaluate("""[...document.querySelectorAll("#charts .legend span")]
      .map((part) => part.innerText.trim())""")
    used: list[list[str]] = browser.evaluate("""[...document.querySelectorAll("#charts .legend line")].map((line) => {
      const color = getComputedStyle(line).stroke;
      return [color, [...document.querySelectorAll("#charts figure path")]
        .some((path) => getComputedStyle(path).stroke === color)]; })""")
    aria: list[str] = browser.evaluate("""[...document.querySelectorAll("svg[role=img]")]
      .map((picture) => picture.getAttribute("aria-label"))""")

    assert labels == [variant.label for variant in results.study.variants()]
    assert len({color for color, _ in used}) == len(labels) and [drawn for _, drawn in used] == [True, True, False]
    assert any("attended tokens" in text and "100%" in text for text in texts)
    assert any("bytes moved a token" in text for text in texts) and all(aria)


def test_the_table_sorts(browser: Browser, report: Path) -> None:
    """By a heading's numbers, up and down; what has none comes last."""
    browser.open(report / "index.html", width=1280)
    column = """[...document.querySelectorAll("#figures tbody [data-figure=attended_total]")]
      .map((cell) => cell.dataset.value === undefined ? null : Number(cell.dataset.value))"""
    click = """[...document.querySelectorAll("#figures th button")]
      .find((head) => head.innerText === "attended tokens").click()"""
    orders = []
    for _ in range(2):
        browser.evaluate(click)
        orders.append(browser.evaluate(column))

    numbers = [value for value in orders[0] if value is not None]
    assert 0 < len(numbers) < len(orders[0])
    assert numbers == sorted(numbers) and orders[0][: len(numbers)] == numbers
    assert orders[1][: len(numbers)] == numbers[::-1]


def test_the_timeline(browser: Browser, report: Path, results: Results) -> None:
    """One variant at a time; its text is what was generated, darker where more heads selected."""
    browser.open(report / "index.html", width=1280)
    watched: dict[str, Any] = {cell.label: outcome.figures for cell, outcome in results.done("watch")}
    read = """(() => { const part = document.querySelector(".timeline:not([hidden])");
      return {open: document.querySelectorAll(".timeline:not([hidden])").length,
              label: part.querySelector("h3").innerText,
              tokens: [...part.querySelectorAll(".said span")].map((token) => token.textContent),
              shares: [...part.querySelectorAll(".said span")].map(
                (token) => Number(token.style.getPropertyValue("--share")))}; })()"""
    seen = []
    for number in range(browser.evaluate("document.getElementById('variant').options.length")):
        browser.evaluate(f"""(() => {{ const choice = document.getElementById("variant"); choice.value = "{number}";
          choice.dispatchEvent(new Event("change")); }})()""")
        shown = browser.evaluate(read)
        found = watched[shown["label"]]
        shares = [sum(column) / len(column) for column in zip(*found["fires"], strict=True)]
        assert shown["open"] == 1 and len(shown["tokens"]) == len(found["tokens"])
        assert shown["shares"] == pytest.approx(shares, abs=1e-3)
        seen.append(shown["label"])
    assert seen == ["louiskv", "trigger: every-step"]
