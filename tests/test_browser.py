"""The report and the comparison in a headless Chromium: narrow, in the dark, by keyboard, and with nothing asked of any network.

They need Playwright and a Chromium (`make test-browser`): the one in IRLIGN_CHROMIUM, or the system's.
"""

import os
import shutil

import pytest
from small import small_recipe

from irlign.compare import compare_runs
from irlign.files import read_json, read_table, write_json, write_table
from irlign.pipeline import run
from irlign.report import write_report

pytestmark = pytest.mark.browser
BINARIES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
NARROW, WIDE = {"width": 360, "height": 740}, {"width": 1200, "height": 900}
LONG = "unbroken" * 60
HOSTILE = f"</p><script>document.title = 'seized'</script><img src=x onerror=\"document.title = 'seized'\"> {LONG}"
WIDER = "[...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll, pre, svg') && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 80))"


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed (make test-browser)")
    binary = os.environ.get("IRLIGN_CHROMIUM") or next(filter(None, map(shutil.which, BINARIES)), None)
    if binary is None:
        pytest.skip("no Chromium: install one (Debian: apt install chromium) or give its path in IRLIGN_CHROMIUM")
    with playwright.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=binary, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run with n = 4, whose first prompt is hostile and long, whose second alone has another winner and an alarm, whose third alone lost."""
    root = tmp_path_factory.mktemp("seen") / "run"
    run(small_recipe(root))
    results, rows = read_json(root / "evaluation/results.json"), read_table(root / "evaluation/prompts.parquet")
    results["choice"]["n"], results["optimise"]["published"] = 4, "sft"
    for i, row in enumerate(rows):
        row |= {"prompt": f"Question number {i}", "alarms": "", "answer/best_of_n": row["answer/sft"], "golden/sft": 0.0}
        row["answer_golden/best_of_n"] = 1.0 - i / 100
    rows[0] |= {"prompt": HOSTILE, "answer/initial": HOSTILE}
    rows[1] |= {"answer/sft": "One old answer.", "answer/best_of_n": "One zebra answer.", "alarms": "repeats itself"}
    rows[2]["answer_golden/best_of_n"] = -1.0
    write_json(root / "evaluation/results.json", results)
    write_table(root / "evaluation/prompts.parquet", rows)
    write_report(root, root / "report.html")
    return root


@pytest.fixture
def opened(browser, finished):
    """`opened(viewport, scheme, path)`: the page, whose every request and complaint is looked at when the test ends."""
    contexts, seen, complaints = [], [], []

    def open_page(viewport=WIDE, scheme="light", path=finished / "report.html", **options):
        context = browser.new_context(viewport=viewport, color_scheme=scheme, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("request", lambda request: seen.append(request.url))
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(path.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert seen and all(url.startswith(("file://", "data:")) for url in seen)
    assert complaints == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_wider_than_a_narrow_window(opened, scheme):
    page = opened(NARROW, scheme)
    for _ in range(2):
        assert page.evaluate("document.documentElement.scrollWidth") == 360 and page.evaluate(WIDER) == []
        page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        page.locator("#differences").check()


def test_the_comparison_fits_too(opened, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "other")
    compare_runs([finished, tmp_path / "other"], tmp_path / "compare.html")
    page = opened(NARROW, path=tmp_path / "compare.html")
    assert page.evaluate("document.documentElement.scrollWidth") == 360


def _luminance(colour):
    """WCAG's relative luminance of `rgb(r, g, b)`."""
    parts = [int(float(c)) / 255 for c in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    return sum(
        w * (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4) for w, c in zip((0.2126, 0.7152, 0.0722), parts, strict=True)
    )


def _contrast(page, selector):
    """Of an element's text and the first background behind it."""
    of = """e => { let back = e; while (getComputedStyle(back).backgroundColor === 'rgba(0, 0, 0, 0)') back = back.parentElement;
        return [getComputedStyle(e).color, getComputedStyle(back).backgroundColor]; }"""
    high, low = sorted(map(_luminance, page.locator(selector).first.evaluate(of)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_light_and_in_the_dark(opened, scheme):
    page = opened(scheme=scheme)
    page.locator("#differences").check()
    assert (_luminance(page.evaluate("getComputedStyle(document.body).backgroundColor")) < 0.05) == (scheme == "dark")
    for selector in (".answer p", ".soft", "figcaption", "summary b", ".tags", ".tags em", "ins", "del", "small", "figure svg text"):
        assert page.locator(selector).count() and _contrast(page, selector) >= 4.5, selector
    drawn = page.locator("figure svg text").first.evaluate("e => getComputedStyle(e).fill")
    assert (_luminance(drawn) > 0.5) == (scheme == "dark")  # the axes' labels follow the page


def _tab_to(page, selector):
    for _ in range(60):
        page.keyboard.press("Tab")
        if page.evaluate("s => document.activeElement.matches(s)", selector):
            assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"  # one sees where one is
            return
    raise AssertionError(f"{selector} is not reached by the keyboard")


def _shown(page):
    cards = page.locator("article.prompt")
    return [i for i in range(cards.count()) if cards.nth(i).is_visible()], page.locator("#count").inner_text()


def test_by_keyboard_to_the_filters_and_to_a_difference(opened):
    page = opened()
    assert _shown(page) == (list(range(8)), "8 of 8 shown")
    _tab_to(page, "#search")
    page.keyboard.type("ZEBRA answer")
    (only,), words = _shown(page)
    assert words == "1 of 8 shown"
    card = page.locator("article.prompt").nth(only)
    if not card.locator("details").evaluate("d => d.open"):
        _tab_to(page, "article.prompt summary")
        page.keyboard.press("Enter")
    _tab_to(page, "article.prompt .own")
    assert not card.locator("del").first.is_visible()
    page.keyboard.press("Space")
    pick = card.locator(".best_of_n .text")
    assert pick.locator("del").is_visible() and pick.inner_text().split() == ["One", "old", "zebra", "answer."]
    assert (pick.locator("del").inner_text().strip(), pick.locator("ins").inner_text().strip()) == ("old", "zebra")


@pytest.mark.parametrize(("box", "only"), [("#changed", "zebra"), ("#alarmed", "repeats itself"), ("#worse", "Question number 2")])
@pytest.mark.parametrize("script", [True, False])
def test_each_filter_leaves_its_own(opened, box, only, script):
    """Without scripts too: only the search needs one, and is not offered."""
    page = opened(java_script_enabled=script)
    page.locator(box).check()
    shown = [card for card in page.locator("article.prompt").all() if card.is_visible()]
    assert len(shown) == 1 and only in shown[0].text_content()
    assert page.locator("#search").is_visible() == script


def test_policies_can_be_left_out(opened):
    page = opened()
    first = page.locator("article.prompt").first
    assert first.locator(".initial").is_visible()
    page.locator("#of-initial").uncheck()
    assert not first.locator(".initial").is_visible() and first.locator(".sft").is_visible()


def test_what_a_model_wrote_does_not_run(opened):
    page = opened()
    assert "seized" not in page.title() and page.locator("img").count() == 0
    assert page.evaluate("s => document.body.innerText.includes(s)", "document.title = 'seized'")


def test_the_policy_of_the_page_lets_no_other_script_run(browser, finished):
    page = browser.new_page()
    page.goto((finished / "report.html").as_uri())
    page.evaluate("document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.ran = 1'}))")
    assert page.evaluate("window.ran") is None and page.locator("#count").inner_text() == "8 of 8 shown"
    page.close()
