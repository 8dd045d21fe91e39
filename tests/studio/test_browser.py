"""The report in headless Chromium: mouse, keyboard, touch width, dark colours, and no error."""

import shutil
import time

import pytest

from headwise.studio import write_report
from tests.studio.synthetic import TEXT, many, payload
from tests.studio.test_payload import BARE
from tests.studio.test_report import HOSTILE

pytestmark = pytest.mark.browser
# without the last ones Chromium asks for hosts of its maker at every start
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run --disable-quic --disable-sync "
    "--disable-background-networking --disable-component-update"
).split()
HEAD = "return document.querySelector('.cardhead h2').textContent"
FILLS = "return [...document.querySelectorAll('.cell')].map((cell) => cell.getAttribute('fill'))"
FOCUSED = "const at = document.activeElement.dataset; return [+at.layer, +at.head]"


@pytest.fixture(scope="module")
def chromium():
    webdriver = pytest.importorskip("selenium.webdriver", reason="no selenium: pip install selenium")
    driver = shutil.which("chromedriver")
    if driver is None:
        pytest.skip("no chromedriver: apt-get install chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    for flag in FLAGS:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield browser
    browser.quit()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("reports")
    write_report(payload(30, 9, missing=[(29, 8), (12, 4)]), found / "usual.html")
    write_report(many(20, 3), found / "many.html")
    return found


@pytest.fixture
def page(chromium, folder):
    """Opens a report of the folder; at the end of the test its console must be empty."""

    def visit(name="usual", hash="", width=1440, height=900, scheme="light"):
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        chromium.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        colours = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", colours)
        chromium.get("about:blank")
        chromium.get(f"file://{folder}/{name}.html{hash}")
        return chromium

    chromium.get_log("browser")
    yield visit
    assert chromium.get_log("browser") == []
    assert chromium.execute_script("return performance.getEntriesByType('resource').map((e) => e.name)") == []


def cell(browser, layer, head):
    return browser.find_element("css selector", f".cell[data-layer='{layer}'][data-head='{head}']")


def press(browser, *keys):
    from selenium.webdriver.common.action_chains import ActionChains

    ActionChains(browser).send_keys(*keys).perform()


def test_a_click_on_a_cell_shows_that_head(page):
    browser = page()
    before = browser.execute_script(HEAD)
    cell(browser, 7, 2).click()
    assert browser.execute_script(HEAD) == "Layer 7 Head 2" != before
    assert "head=text:7:2" in browser.current_url
    assert cell(browser, 7, 2).get_attribute("aria-selected") == "true"
    assert "layer 7, head 2" in browser.find_element("css selector", "[role=status]").get_attribute("textContent")


def test_a_question_recolours_and_reranks(page):
    browser = page()
    fills, title = browser.execute_script(FILLS), browser.find_element("css selector", ".asked h2").text
    browser.find_element("css selector", ".choice input[value=entropy]").click()
    assert browser.find_element("css selector", ".asked h2").text == "Entropy" != title
    assert browser.execute_script(FILLS) != fills
    assert "nats" in browser.find_element("css selector", ".legend").text
    asked = next(q for q in payload(30, 9, missing=[(29, 8), (12, 4)])["questions"] if q["name"] == "entropy")
    rows = enumerate(asked["grid"]["text"])
    best = max((v, i, j) for i, row in rows for j, v in enumerate(row) if v is not None)
    assert browser.find_element("css selector", ".ranking .who").text == f"L{best[1]}.H{best[2]}"


def test_keys_move_and_choose(page):
    from selenium.webdriver.common.keys import Keys

    browser = page(hash="#question=sinks&head=text:3:1")
    browser.execute_script("document.querySelector('.asked a').focus()")
    press(browser, Keys.TAB)
    assert browser.execute_script(FOCUSED) == [3, 1]
    press(browser, Keys.ARROW_RIGHT, Keys.ARROW_DOWN, Keys.ARROW_DOWN)
    assert browser.execute_script(FOCUSED) == [4, 3]
    assert browser.execute_script(HEAD) == "Layer 3 Head 1"
    assert browser.find_elements("css selector", ".rings .focus")
    assert "L4.H3" in browser.find_element("css selector", ".tip").text
    press(browser, Keys.ENTER)
    assert browser.execute_script(HEAD) == "Layer 4 Head 3"
    press(browser, Keys.HOME)
    assert browser.execute_script(FOCUSED) == [0, 3]
    press(browser, Keys.TAB, Keys.TAB)  # the grid is one stop on the way
    assert browser.execute_script("return !document.activeElement.closest('.grid')")


def test_the_grid_says_what_it_is(page):
    browser = page()
    grid = browser.find_element("css selector", "[role=grid]")
    assert (grid.get_attribute("aria-rowcount"), grid.get_attribute("aria-colcount")) == ("9", "30")
    assert len(browser.find_elements("css selector", "[role=grid] > [role=row]")) == 9
    assert len(browser.find_elements("css selector", "[role=gridcell][tabindex='0']")) == 1
    assert cell(browser, 12, 4).get_attribute("fill").startswith("url(#")
    assert "no such head" in cell(browser, 12, 4).get_attribute("aria-label")
    assert "share of attention" in cell(browser, 0, 0).get_attribute("aria-label")


def test_tokens_show_what_they_look_at(page):
    from selenium.webdriver.common.keys import Keys

    made = payload(30, 9, missing=[(29, 8), (12, 4)])["sample"]["rows"]
    key = next(iter(made))
    browser = page(hash=f"#question=sinks&head={key}")
    tokens = browser.find_elements("css selector", ".token")
    assert len(tokens) == len(TEXT)
    tokens[20].click()
    told = browser.find_element("css selector", ".told")
    assert told.text.startswith(f"From {TEXT[20].strip()} (20) to ")
    coloured = {i for i, token in enumerate(tokens) if token.get_attribute("style")}
    assert coloured == {j for j, _ in made[key][20]}
    press(browser, Keys.ARROW_RIGHT)
    assert f"({21})" in told.text
    without = next(k for k in payload(30, 9)["details"] if k not in made)
    browser = page(hash=f"#question=sinks&head={without}")
    assert "not one of them" in browser.find_element("css selector", ".sample").text
    browser.find_element("css selector", ".chip").click()
    assert browser.find_elements("css selector", ".token")


def test_roles_are_marked_and_picked_out(page):
    browser = page()
    assert not browser.find_elements("css selector", ".marks path")
    browser.find_element("css selector", ".show-roles").click()
    marked = len(browser.find_elements("css selector", ".marks path"))
    assert marked == len(browser.find_elements("css selector", ".roles li")) - 1  # all but "mixed"
    browser.find_element("css selector", ".roles li button").click()
    assert len(browser.find_elements("css selector", ".marks path")) == 1
    assert browser.find_elements("css selector", ".cell.faint")
    assert "role=" in browser.current_url


def test_the_address_keeps_the_state(page):
    browser = page(hash="#question=copy_heads&head=text:5:6&roles=1")
    assert browser.find_element("css selector", ".asked h2").text == "Copying heads"
    assert browser.execute_script(HEAD) == "Layer 5 Head 6"
    browser.execute_script("location.hash = '#question=distance&head=text:9:0'")
    time.sleep(0.2)
    assert browser.execute_script(HEAD) == "Layer 9 Head 0"
    browser = page(hash="#question=constructor&head=text:99:99&role=__proto__")
    assert browser.find_element("css selector", ".asked h2").text == "First-token sinks"


@pytest.mark.parametrize("width", [320, 360, 768, 1000, 1440])
def test_no_width_scrolls_sideways(page, width):
    browser = page(width=width, height=780)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    cell(browser, 20, 3).click()
    assert browser.execute_script(HEAD) == "Layer 20 Head 3"


def test_dark_follows_the_system_and_the_button(page):
    ground = "return getComputedStyle(document.querySelector('.hw')).backgroundColor"
    browser = page(scheme="light")
    light, fills = browser.execute_script(ground), browser.execute_script(FILLS)
    browser = page(scheme="dark")
    dark = browser.execute_script(ground)
    assert dark == "rgb(15, 19, 22)" != light
    assert browser.execute_script(FILLS) != fills
    browser.find_element("css selector", ".theme").click()
    assert browser.execute_script(ground) == light
    assert browser.execute_script(FILLS) == fills
    browser.execute_script("localStorage.clear()")


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("low", [0, -1])
def test_equal_steps_of_a_score_are_equal_steps_of_colour(page, theme, low):
    steps = page().execute_script(
        """const { colour } = module_colour_js.scoreScale(arguments[1], 1, arguments[0]);
        const side = (sign) => Array.from({ length: 21 }, (_, i) => module_vendor_d3_js.lab(colour((sign * i) / 20)));
        return (arguments[1] < 0 ? [1, -1] : [1]).map((sign) => side(sign).slice(1).map((b, i, all) => {
          const a = side(sign)[i];
          return [Math.hypot(a.l - b.l, a.a - b.a, a.b - b.b), b.l - a.l];
        }));""",
        theme,
        low,
    )
    for side in steps:
        lengths, lightness = zip(*side)
        assert max(lengths) < 1.3 * min(lengths)
        assert all(step > 0 for step in lightness) or all(step < 0 for step in lightness)


def shown(browser):
    return [label.text for label in browser.find_elements("css selector", ".choice") if label.is_displayed()]


@pytest.mark.parametrize(("width", "height"), [(1440, 900), (360, 780)])
def test_sixty_columns_are_twenty_choices(page, width, height):
    browser = page("many", width=width, height=height)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert len(browser.find_elements("css selector", ".choice")) == 60
    closed = "return [...document.querySelectorAll('.choice')].filter((c) => !c.hidden).length"
    assert browser.execute_script(closed) == 20 + 2, "the chosen question shows its other columns"
    browser.find_element("css selector", ".choice input[value=question_1]").click()
    label = ".choice:has(input[value={}])"
    assert browser.find_element("css selector", label.format("question_1_column_2")).is_displayed()
    assert not browser.find_element("css selector", label.format("question_0_column_1")).is_displayed()
    browser.find_element("css selector", ".choice input[value=question_1_column_2]").click()
    assert browser.find_element("css selector", ".asked h2").text == "Column 2 of 1"
    assert browser.execute_script(closed) == 22
    assert browser.execute_script(
        """const strip = document.querySelector('.choices').getBoundingClientRect();
        const chosen = document.querySelector('.choice.chosen').getBoundingClientRect();
        return chosen.left >= strip.left && chosen.right <= strip.right + 1 && chosen.bottom <= strip.bottom + 1;"""
    ), "what is chosen is in sight"


def test_questions_are_searched(page):
    browser = page("many")
    search = browser.find_element("css selector", ".search")
    search.send_keys("RETRIEVAL head")
    found = browser.execute_script(
        """return [...document.querySelectorAll('.choice')].filter((c) => !c.hidden)
        .map((c) => c.querySelector('input').value)"""
    )
    wanted = [q["name"] for q in many(20, 3)["questions"] if q["paper"]["title"] == "Retrieval Head"]
    assert found == wanted
    search.send_keys(" unicorn")
    assert shown(browser) == []
    assert "No question has these words" in browser.find_element("css selector", ".questions").text
    search.clear()
    search.send_keys(" ")
    assert len(shown(browser)) <= 22


def test_the_card_of_many_scores_tells_where_the_head_stands_out(page):
    browser = page("many", hash="#question=question_3&head=text:7:2")
    rows = browser.find_elements("css selector", ".scores tbody tr")
    assert 12 <= len(rows) <= 13
    assert browser.find_element("css selector", ".scores .chosen")
    ranks = [int(row.find_element("css selector", ".rank").text) for row in rows][-12:]
    assert ranks == sorted(ranks)
    browser.find_element("css selector", ".card .more").click()
    assert len(browser.find_elements("css selector", ".scores tbody tr")) == 60
    cell(browser, 9, 1).click()
    assert len(browser.find_elements("css selector", ".scores tbody tr")) == 60, "the next head shows as many"


def test_a_table_beside_the_heads_is_drawn(page):
    browser = page("many")
    section = browser.find_element("css selector", ".matrix")
    assert section.find_element("css selector", "h2").text == "Layers"
    assert len(section.find_elements("css selector", "rect")) == 144
    assert "From 0.064 to 1.000" in section.text


def test_hostile_text_runs_nothing(page, folder):
    given = payload(2, 3)
    given["model"]["name"] = given["command"] = given["created"] = given["questions"][0]["title"] = HOSTILE
    given["sample"]["tokens"][0] = given["streams"][0]["name"] = HOSTILE
    for part in (*[q["grid"] for q in given["questions"]], *[q["sem"] for q in given["questions"]], given["roles"]):
        part[HOSTILE] = part.pop("text")
    given["details"], given["sample"]["rows"] = {}, {}
    given["role_rules"] = {"constructor": HOSTILE, HOSTILE: HOSTILE}
    given["roles"][HOSTILE] = [["constructor", HOSTILE, "__proto__"]] * 2
    write_report(given, folder / "hostile.html")
    browser = page("hostile")
    assert browser.find_element("css selector", "h1").get_attribute("textContent") == HOSTILE
    cell(browser, 1, 1).click()
    assert browser.execute_script("return window.pwned === undefined")


def test_a_bare_payload_is_drawn(page, folder):
    write_report(BARE, folder / "bare.html")
    browser = page("bare")
    assert browser.execute_script(HEAD) == "Layer 0 Head 0"
    assert "no sample sentence" in browser.find_element("css selector", ".card").text


def test_streams_stand_apart(page, folder):
    write_report(payload(3, 4, ("audio", "text", "cross")), folder / "streams.html")
    browser = page("streams")
    assert len(browser.find_elements("css selector", "[role=grid]")) == 3
    browser.find_elements("css selector", "[role=grid]")[2].find_element("css selector", "[data-head='2']").click()
    assert browser.execute_script(HEAD) == "Layer 0 Head 2cross"


def test_ten_thousand_heads_are_no_trouble(page, folder):
    """Without the time of other processes this takes a tenth of a second; the bound is for a busy machine."""
    write_report(payload(80, 128), folder / "large.html")
    browser = page("large", width=360, height=780)
    assert browser.execute_script("return document.documentElement.scrollWidth") == 360
    took = browser.execute_script(
        """const start = performance.now();
        document.querySelector(".choice input[value=local]").click();
        document.body.getBoundingClientRect();
        return performance.now() - start;"""
    )
    assert took < 2000
