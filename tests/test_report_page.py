"""The page of a report in a real Chromium, opened as a file: what a person sees, clicks and types."""

import json

import pytest

from hf_e5.filters.run import filter_records
from hf_e5.report.write import write_report
from support.chromium import BROWSER, Chromium


EVIL = "</script><img src=x onerror='window.broken = 1'><script>window.broken = 1</script> lunar"


@pytest.fixture(scope="module")
def page(tmp_path_factory, sample_rows):
    """A report of 400 sample records, a hostile one and one dropped, with its records."""
    folder = tmp_path_factory.mktemp("run")
    changes = {"query": EVIL, "positive": "The night sky of this text has no moon and no script. " * 3, "model": EVIL}
    changes |= {"negative": EVIL.replace("lunar", "solar"), "placeholders": {EVIL: EVIL}}
    evil = {**sample_rows[5], "id": EVIL, **changes}
    rows = [*sample_rows, evil, {**sample_rows[2], "id": "copy"}]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "records.jsonl").write_text(text, encoding="utf-8")
    filter_records(folder, num_proc=1)
    write_report(folder)
    return folder / "report" / "index.html", rows


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if BROWSER is None:
        pytest.skip("needs a browser: apt-get install chromium")
    with Chromium(BROWSER, tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def opened(browser, page):
    browser.open(page[0])
    browser.wait("document.querySelectorAll('#list li').length === 50")
    yield browser
    assert browser.messages == []


def count(browser) -> int:
    return int(browser.evaluate("document.getElementById('count').textContent.replaceAll(',', '').split(' ')[0]"))


def selected(browser) -> str:
    return browser.evaluate("document.querySelector('#list [aria-selected=true] .id').textContent")


def choose(browser, facet: str, value: str) -> None:
    browser.evaluate(
        f"(() => {{ const select = document.getElementById('{facet}'); select.value = {json.dumps(value)};"
        " select.dispatchEvent(new Event('change')); })()"
    )


def search(browser, text: str) -> None:
    before = browser.evaluate("document.getElementById('count').textContent")
    browser.evaluate("document.getElementById('search').select()")
    browser.type(text)
    browser.wait(f"document.getElementById('count').textContent !== {json.dumps(before)}")


def test_filters_agree_with_the_records(opened, page):
    rows = page[1]
    assert count(opened) == len(rows)
    for task_type in ("sts", "short_short"):
        choose(opened, "task_type", task_type)
        assert count(opened) == sum(row["task_type"] == task_type for row in rows)
    choose(opened, "task_type", "bitext")
    choose(opened, "language", "de")
    german = [r for r in rows if r["task_type"] == "bitext" and "de" in (r["language"], r["document_language"])]
    assert count(opened) == len(german) > 0
    opened.evaluate("document.querySelector('[type=reset]').click()")
    opened.wait(f"document.getElementById('count').textContent === '{len(rows)} records'")
    choose(opened, "verdict", "dropped")
    assert count(opened) == 1 and selected(opened) == "copy"
    assert "same query and positive as" in opened.evaluate("document.querySelector('#detail .reason').textContent")


def test_search_is_over_all_texts_and_marks_the_words(opened, page):
    search(opened, "the MOON")
    names = ("id", "instruction", "query", "positive", "negative")
    texts = ["\n".join(filter(None, map(row.get, names))) for row in page[1]]
    assert count(opened) == sum("the" in text.lower() and "moon" in text.lower() for text in texts) > 0
    marks = set(
        opened.evaluate("[...document.querySelectorAll('#detail mark')].map(m => m.textContent.toLowerCase())")
    )
    assert marks == {"the", "moon"}
    search(opened, "no such words (anywhere[")
    assert count(opened) == 0
    assert "No record matches" in opened.evaluate("document.getElementById('list').textContent")


def test_keyboard_alone(opened, page):
    opened.evaluate("document.body.focus()")
    opened.press("j")
    opened.press("ArrowDown")
    assert selected(opened) == page[1][2]["id"]
    opened.press("k")
    assert selected(opened) == page[1][1]["id"]
    opened.press("ArrowRight")
    assert selected(opened) == page[1][50]["id"]
    opened.press("ArrowUp")
    assert selected(opened) == page[1][49]["id"]
    assert "page 1 of" in opened.evaluate("document.getElementById('page').textContent")
    opened.press("/")
    assert opened.evaluate("document.activeElement.id") == "search"
    opened.type("jk/")
    assert opened.evaluate("document.getElementById('search').value") == "jk/"
    opened.press("Escape")
    assert opened.evaluate("document.activeElement.id") == "list" and count(opened) == len(page[1])
    opened.evaluate("document.getElementById('tab-records').focus()")
    opened.press("ArrowRight")
    assert opened.evaluate("document.activeElement.id") == "tab-overview"
    assert not opened.evaluate("document.getElementById('overview').hidden")


def test_hostile_text_stays_text(opened):
    search(opened, "window.broken")
    assert count(opened) == 1
    detail = opened.evaluate("document.getElementById('detail').textContent")
    assert detail.count(EVIL) == 5
    choose(opened, "model", EVIL)
    assert count(opened) == 1
    assert opened.evaluate("window.broken") is None
    assert opened.evaluate("document.querySelectorAll('img').length") == 0
    # A second line of defence: even markup that got in could not run.
    opened.evaluate("document.getElementById('detail').innerHTML = '<img src=x onerror=\"window.broken = 1\">'")
    opened.evaluate("new Promise((resolve) => setTimeout(resolve, 100))")
    assert opened.evaluate("window.broken") is None
    assert any("Content Security Policy" in message for message in opened.messages)
    opened.messages.clear()


def test_right_to_left_text(opened):
    choose(opened, "task_type", "sts")
    choose(opened, "language", "ar")
    assert opened.evaluate("getComputedStyle(document.querySelector('#detail .text.query')).direction") == "rtl"
    assert opened.evaluate("document.querySelector('#detail .text.query').lang") == "ar"
    assert opened.evaluate("getComputedStyle(document.querySelector('#detail .text.instruction')).direction") == "ltr"


def test_light_and_dark(opened):
    grounds = []
    for scheme in ("light", "dark"):
        opened.prefer(scheme)
        colors = opened.evaluate(
            "['backgroundColor', 'color'].map((name) =>"
            " getComputedStyle(document.body)[name].match(/\\d+/g).map(Number))"
        )
        grounds.append([sum(color) for color in colors])
    assert grounds[0][0] > 700 > 300 > grounds[0][1]
    assert grounds[1][0] < 150 < 600 < grounds[1][1]


def test_the_overview_shows_the_figure_and_all_tables(opened, page):
    opened.evaluate("document.getElementById('tab-overview').click()")
    assert opened.evaluate("document.querySelector('.paper svg').getBoundingClientRect().width") > 600
    titles = opened.evaluate("[...document.querySelectorAll('#overview h2')].map(h => h.textContent)")
    assert {"Filters", "Task types", "Lengths in characters", "Diversity", "Models", "Languages of queries"} <= set(
        titles
    )


def test_twenty_thousand_records(browser, tmp_path, sample_rows):
    """As many rows as a page holds by default: all can be reached, and only 50 of them are in the document."""
    rows = [{**row, "id": f"{number}-{row['id']}"} for number in range(50) for row in sample_rows]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "records.jsonl").write_text(text, encoding="utf-8")
    write_report(tmp_path)
    browser.open(tmp_path / "report" / "index.html")
    assert count(browser) == 20_000
    assert browser.evaluate("document.querySelectorAll('#list li').length") == 50
    search(browser, rows[-1]["id"])
    assert count(browser) >= 1 and selected(browser).endswith(rows[-1]["id"])
    assert browser.messages == []
