"""The report, opened, clicked and read in a headless browser."""

import json
import os
import shutil
import statistics

import pytest
from synthetic_report import LAYERS, SAVED, big_report

from memo_compile.cli import main
from memo_compile.errors import NoReport
from memo_compile.report.page import page, read_reports
from memo_compile.report.timeline import CATEGORIES

PICTURES = ("before", "after", "arena", "streams")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1400,1300",
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver) and not os.environ.get("CI"):
        pytest.skip("chromium and chromium-driver are not installed (Debian's packages of these names)")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    opened = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield opened
    opened.quit()


@pytest.fixture(scope="module")
def big_page(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(page([big_report()]))
    return path


@pytest.fixture
def big(browser, big_page):
    browser.get(big_page.as_uri())
    return Opened(browser)


class Opened:
    """A page in the browser, with what a person does and sees."""

    def __init__(self, browser):
        self.browser = browser

    def run(self, script, *arguments):
        return self.browser.execute_script(script, *arguments)

    def find(self, name):
        return self.browser.find_element("id", name)

    def point(self, picture, key):
        """Move the pointer to a tensor in a picture; returns whether it is drawn there."""
        from selenium.webdriver.common.action_chains import ActionChains

        self.run("document.getElementById(arguments[0]).scrollIntoView({block: 'center'})", picture)
        at = self.run("return memoReport.where(arguments[0], arguments[1])", picture, key)
        assert at is not None, (picture, key)
        box = self.find(picture)
        size = box.size
        chain = ActionChains(self.browser)
        chain.move_to_element_with_offset(box, at[0] - size["width"] / 2, at[1] - size["height"] / 2)
        return chain

    def highlighted(self):
        """How often the highlighted tensor is drawn, by picture."""
        return {p: int(self.find(p).get_attribute("data-highlighted")) for p in PICTURES}

    @property
    def tip(self):
        return self.find("tip").text

    def rows(self):
        return [r.text for r in self.browser.find_elements("css selector", "#rows .row")]

    def table(self, name):
        self.browser.find_element("css selector", f'button[data-table="{name}"]').click()

    def sort(self, column):
        self.browser.find_element("css selector", f'#head span[data-column="{column}"]').click()

    def filter(self, text):
        box = self.find("filter")
        box.clear()
        box.send_keys(text)

    def problems(self):
        return [e["message"] for e in self.browser.get_log("browser") if e["level"] == "SEVERE"]


@pytest.mark.parametrize("picture", PICTURES)
def test_pointing_at_a_tensor_anywhere_shows_it_everywhere(big, picture):
    big.point(picture, "saved_9_3").perform()
    assert "saved_9_3" in big.tip
    assert big.highlighted() == {"before": 2, "after": 2, "arena": 2, "streams": 2}


def test_the_tip_says_what_a_tensor_is(big):
    big.point("arena", "saved_9_3").perform()
    for words in ("8.00 MiB", "offloaded activation", "layer 9", "offloaded 75 %", "recomputed 25 %", "model.py:7"):
        assert words in big.tip


def test_a_click_pins_a_tensor_and_escape_lets_it_go(big):
    from selenium.webdriver.common.keys import Keys

    big.point("arena", "saved_20_3").click().perform()
    big.point("after", "saved_3_3").perform()
    assert "saved_3_3" in big.tip
    big.run("for (const p of document.querySelectorAll('.pic')) p.onmouseleave()")
    assert big.highlighted() == {"before": 2, "after": 2, "arena": 2, "streams": 2}
    assert big.find("arena").get_attribute("data-key") == "saved_20_3"
    big.browser.find_element("tag name", "body").send_keys(Keys.ESCAPE)
    assert set(big.highlighted().values()) == {0}


def test_pointing_at_a_row_shows_the_tensor_in_the_pictures(big):
    from selenium.webdriver.common.action_chains import ActionChains

    big.filter("saved_30_7")
    row = big.browser.find_element("css selector", "#rows .row")
    ActionChains(big.browser).scroll_to_element(row).move_to_element(row).perform()
    assert big.highlighted() == {"before": 2, "after": 2, "arena": 2, "streams": 2}
    assert "lit" in row.get_attribute("class")


def test_tables_sort_and_filter(big):
    total = int(big.find("count").text.split(" of ")[1])
    assert total > 4000
    big.filter("gradient_12")
    assert big.find("count").text == f"9 of {total}"
    assert all("gradient_12_" in row for row in big.rows())
    big.sort(0)
    names = [row.split()[0] for row in big.rows()]
    assert names == sorted(names)
    big.sort(0)
    assert [row.split()[0] for row in big.rows()] == sorted(names, reverse=True)
    big.filter("")
    big.table("activations")
    assert big.find("count").text == f"{LAYERS * SAVED} of {LAYERS * SAVED}"
    assert "75 %" in big.rows()[0]
    big.table("layers")
    assert big.find("count").text == f"{LAYERS + 1} of {LAYERS + 1}"
    assert [row.split()[0] for row in big.rows()[:3]] == ["0", "1", "2"]
    big.table("stops")
    assert "reads across tokens" in big.rows()[0]


def test_finding_a_tensor_pins_it(big):
    big.find("find").send_keys("derivative_31_59")
    assert big.find("arena").get_attribute("data-key") == "derivative_31_59"
    assert big.highlighted()["arena"] == 1


def test_the_page_says_budget_peak_arena_and_stalls(big):
    text = big.browser.find_element("tag name", "body").text
    for words in ("180.0 MiB", "900.0 MiB unplanned", "1.000 × its lower bound", "device memory", "waiting for room"):
        assert words in text
    for category in CATEGORIES:
        assert category in big.find("legend").text


def test_a_big_plan_loads_in_two_seconds_and_stays_fluid(browser, big_page):
    """At 32 layers and over 4 000 tensors on each side; of a few tries, since other work shares the machine."""
    assert big_page.stat().st_size < 10 * 2**20
    loads, moves = [], []
    for _ in range(4):
        browser.get(big_page.as_uri())
        loads.append(browser.execute_script("return memoReport.ready / 1000"))
        moves.append(
            browser.execute_script(
                """const times = [];
                for (const id of ["before", "after", "arena", "streams"]) {
                  const box = document.getElementById(id), {left, top, width, height} = box.getBoundingClientRect();
                  for (let i = 0; i < 25; i++) {
                    const at = {clientX: left + width * (0.1 + 0.035 * i), clientY: top + height * (0.1 + 0.03 * i)};
                    const began = performance.now();
                    box.dispatchEvent(new MouseEvent("mousemove", {...at, bubbles: true}));
                    times.push(performance.now() - began);
                  }
                }
                return times"""
            )
        )
    assert min(loads) < 2, loads
    # A frame is 16 ms; what is asked is that a moved pointer is answered within two.
    assert min(statistics.median(m) for m in moves) < 32, [statistics.median(m) for m in moves]


def test_a_zoom_shows_less_and_a_double_click_all(big):
    from selenium.webdriver.common.action_chains import ActionChains

    def drawn():
        return big.run("return memoReport.where('arena', 'temporary_31_50')[0]")

    whole = drawn()
    big.run("document.getElementById('arena').scrollIntoView({block: 'center'})")
    box = big.find("arena")
    left = -box.size["width"] // 2
    ActionChains(big.browser).move_to_element_with_offset(box, left + 100, 0).click_and_hold().move_by_offset(
        300, 0
    ).release().perform()
    assert drawn() > whole + 200
    ActionChains(big.browser).double_click(box).perform()
    assert drawn() == pytest.approx(whole)


def test_a_real_plan_shows_its_memory_arena_and_source_lines(browser, inductor_dump, capsys, tmp_path):
    out = tmp_path / "report.html"
    assert main(["report", str(inductor_dump.folder), "--out", str(out)]) == 0
    assert str(out) in capsys.readouterr().out
    browser.get(out.as_uri())
    opened = Opened(browser)
    assert not opened.problems()
    (data,) = read_reports(inductor_dump.folder)
    assert (
        f"{len(data['segments'])} segments, {len(inductor_dump.plan.buffers)} buffers" in opened.find("arena-note").text
    )
    offloaded = next(a.name for a in inductor_dump.plan.activations if a.offloaded == a.tokens and a.tokens > 1)
    opened.point("streams", offloaded).perform()
    assert offloaded in opened.tip
    assert "llama.py" in opened.tip or "parallel.py" in opened.tip
    assert all(count > 0 for count in opened.highlighted().values())


def test_the_timeline_adds_up_to_the_planned_peak(inductor_dump, eager_dump):
    """What is stacked is what the plan says: the arena as held and what lies outside of it, or the live bytes."""
    for dumped in (inductor_dump, eager_dump):
        (data,) = read_reports(dumped.folder)
        after = data["after"]
        live = [0] * (after["steps"] + 1)
        for t in after["tensors"]:
            if not after["emitted"] or (len(t) > 11 and not t[11]):
                live[t[4]] += t[3]
                live[min(t[5], after["steps"])] -= t[3]
        total, peak = 0, 0
        for step in range(after["steps"]):
            total += live[step]
            peak = max(peak, total + (after["held"][step] if after["held"] else 0))
        assert peak == pytest.approx(dumped.plan.predicted_peak, rel=0.02)


def test_text_in_the_data_cannot_leave_its_element():
    report = big_report()
    report["plan"]["name"] = "</script><b>x"
    text = page([report])
    assert text.count("</script>") == 2
    start = text.index('id="data">') + len('id="data">')
    assert json.loads(text[start : text.index("</script>", start)])[0]["plan"]["name"] == "</script><b>x"


def test_a_folder_without_a_report_is_refused_with_what_to_do(tmp_path, capsys):
    with pytest.raises(NoReport, match="MEMO_DUMP"):
        read_reports(tmp_path)
    assert main(["report", str(tmp_path)]) == 2
    assert "report.json" in capsys.readouterr().err
