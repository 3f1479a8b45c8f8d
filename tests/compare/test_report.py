"""The report of measured costs, in a real browser: what it shows, sorts and answers, and that it asks no network."""

import fcntl
import json
import os
import re
import select
import shutil
import subprocess
from base64 import b64decode
from dataclasses import replace
from itertools import pairwise

import pytest

from subquad.compare.report import page, write
from subquad.compare.results import Point
from subquad.errors import UserError

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-pipe",
)
SUBJECTS = ["Mamba2", "Attention", "Hyena", "RWKV7"]


class Browser:
    """Chromium and one page of it, asked through its debugging pipe; `events` holds what it told unasked."""

    def __init__(self, program, profile):
        to_browser, to_us = os.pipe(), os.pipe()
        # Not among the numbers that the shell gives away.
        theirs = [fcntl.fcntl(fd, fcntl.F_DUPFD, 20) for fd in (to_browser[0], to_us[1])]
        self.write, self.read = to_browser[1], to_us[0]
        start = f'exec 3<&{theirs[0]} 4>&{theirs[1]} "$0" "$@"'
        command = ["bash", "-c", start, program, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        self.process = subprocess.Popen(command, pass_fds=theirs, stderr=subprocess.DEVNULL)
        for fd in (*theirs, to_browser[0], to_us[1]):
            os.close(fd)
        self.events, self.rest, self.count, self.session = [], b"", 0, None
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")

    def ask(self, method, **params):
        self.count += 1
        message = {"id": self.count, "method": method, "params": params}
        os.write(
            self.write, json.dumps(message | ({"sessionId": self.session} if self.session else {})).encode() + b"\0"
        )
        while (answer := self._next()).get("id") != self.count:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def _next(self):
        while b"\0" not in self.rest:
            assert select.select([self.read], [], [], 60)[0], "the browser says nothing"
            found = os.read(self.read, 1 << 20)
            assert found, "the browser has gone"
            self.rest += found
        message, self.rest = self.rest.split(b"\0", 1)
        return json.loads(message)

    def open(self, path, width=1200, height=900, dark=False):
        self.events.clear()
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", features=[scheme])
        self.ask("Page.navigate", url=path.as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self._next())

    def js(self, expression):
        found = self.ask("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def texts(self, selector):
        return self.js(f"[...document.querySelectorAll({selector!r})].map((e) => e.textContent)")

    def place(self, selector):
        """The middle of an element, brought into view."""
        show = f"const e = document.querySelector({selector!r}); e.scrollIntoView({{block: 'center'}});"
        return self.js(
            f"(() => {{{show} const b = e.getBoundingClientRect(); return [b.x + b.width/2, b.y + b.height/2]}})()"
        )

    def mouse(self, kind, x, y):
        button = {} if kind == "mouseMoved" else {"button": "left", "clickCount": 1}
        self.ask("Input.dispatchMouseEvent", type=kind, x=x, y=y, **button)

    def click(self, selector):
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            self.mouse(kind, *self.place(selector))

    def key(self, name):
        text = {"text": "\r"} if name == "Enter" else {"text": " "} if name == " " else {}
        codes = {"Enter": 13, " ": 32, "Escape": 27, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}
        for kind in ("keyDown", "keyUp"):
            self.ask("Input.dispatchKeyEvent", type=kind, key=name, windowsVirtualKeyCode=codes[name], **text)

    def complaints(self):
        """What the page logged, threw or was refused, and what it asked for besides itself."""
        loud = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
        said = [event for event in self.events if event["method"] in loud]
        asked = [e["params"]["request"]["url"] for e in self.events if e["method"] == "Network.requestWillBeSent"]
        return said + [url for url in asked[1:] if not url.startswith("data:")]

    def close(self):
        os.close(self.write)
        os.close(self.read)
        self.process.terminate()
        self.process.wait(20)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.skip(f"there is no browser here: none of {', '.join(BROWSERS)}")
    browser = Browser(program, tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture
def report(made_up, tmp_path):
    path = tmp_path / "cost.html"
    write(made_up(SUBJECTS), path)
    return path


def test_it_opens_from_disk_asks_no_network_and_logs_nothing(browser, report):
    browser.open(report)
    assert browser.js("document.title") == "Cost against length"
    assert sorted(browser.texts("#plot .line text")) == sorted(name * 2 for name in SUBJECTS)  # with its title
    assert browser.texts("#missing") == ["No time: Attention from 16,384 tokens: does not fit: needs about 38 GB."]
    assert browser.texts("dd")[0] == "subquad compare complexity --layers <b>all</b> --html cost.html"
    assert "Example & Sons <i>CPU</i>" in browser.texts("header p")[0]
    assert browser.complaints() == []


def test_every_table_sorts_by_a_click_or_a_key_on_a_heading(browser, report):
    browser.open(report)
    browser.js("document.querySelectorAll('details').forEach((d) => { d.open = true })")
    times = "#points tbody td:nth-child(5)"
    heading = "#points thead th:nth-child(5)"
    assert browser.texts(heading) == ["median ms"]

    def figures():
        return [float(text.replace(",", "")) for text in browser.texts(times) if text != "-"]

    before = figures()
    browser.click(f"{heading} button")
    assert browser.js(f"document.querySelector('{heading}').ariaSort") == "ascending"
    assert figures() == sorted(before) != before
    assert browser.texts(times)[-1] == "-"
    browser.js(f"document.querySelector('{heading} button').focus()")
    browser.key("Enter")
    assert browser.js(f"document.querySelector('{heading}').ariaSort") == "descending"
    assert figures() == sorted(before, reverse=True)
    assert browser.texts(times)[-1] == "-"  # what does not fit stays last
    browser.click("#points thead th:nth-child(1) button")
    assert browser.texts("#points tbody th") == sorted(browser.texts("#points tbody th"))
    assert browser.js("document.querySelectorAll('th[aria-sort=ascending], th[aria-sort=descending]').length") == 1
    heads, buttons = browser.texts("thead th[scope=col]"), browser.texts("thead th[aria-sort] button")
    assert heads == buttons
    assert browser.complaints() == []


def rows(browser, table):
    """Cells by heading, a row a mapping."""
    heads = browser.texts(f"#{table} thead th")
    cells = browser.texts(f"#{table} tbody th, #{table} tbody td")
    return [dict(zip(heads, cells[i : i + len(heads)], strict=True)) for i in range(0, len(cells), len(heads))]


def test_growth_and_crossovers(browser, report):
    browser.open(report)
    found = {(row["subject"], row["phase"]): row for row in rows(browser, "growth")}
    assert len(found) == 3 * len(SUBJECTS)
    exponents = {key: row["exponent of time"] for key, row in found.items()}
    assert exponents["Attention", "prefill"] == "2.00"
    assert exponents["Mamba2", "prefill"] == exponents["Mamba2", "train"] == "1.00"
    assert exponents["Mamba2", "decode"] == "0.00"
    assert found["Attention", "prefill"]["of state"] == "1.00"
    dense = found["Attention", "train"]
    assert dense["exponent of time"] == "-"
    assert dense["no time"] == "from 16,384 tokens: does not fit: needs about 38 GB"
    from_there = "below Attention from"
    assert found["Hyena", "prefill"][from_there] == "1,500"  # where 3 n is 2 n^2 / 1000
    assert found["Mamba2", "prefill"][from_there] == "always below"
    for heading in (4, 10):
        browser.click(f"#growth thead th:nth-child({heading}) button")
    shown = [row[from_there] for row in rows(browser, "growth")]
    figures = [float(text.split()[0].replace(",", "")) for text in shown if text[0].isdigit()]
    assert figures == sorted(figures)
    assert shown[0] == "always below"
    assert shown[-1] in ("-", "fewer than two lengths to compare")


def test_claims_stand_beside_what_was_measured(browser, report):
    browser.open(report)
    survey = {(row["model"], row["cost"]): row for row in rows(browser, "survey")}
    prefill = survey["Transformer", "prefill"]
    assert (prefill["stated"], prefill["exponent measured"], prefill["verdict"]) == ("O(T^2 D)", "2.00", "agrees")
    assert survey["S4", "prefill"]["verdict"] == "not measured"
    cards = {(row["layer"], row["cost"]): row for row in rows(browser, "claims")}
    assert cards["Mamba2", "prefill"]["verdict"] == "agrees"
    assert cards["Mamba2", "prefill"]["source"].startswith("Dao and Gu 2024")
    assert browser.complaints() == []


def test_rows_are_chosen_by_words(browser, report):
    browser.open(report)
    browser.click("#points summary")
    browser.click("#points input[type=search]")
    browser.ask("Input.insertText", text="hyena decode")
    shown = browser.texts("#points tbody tr:not([hidden]) th")
    assert shown == ["Hyena"] * 3


def test_layers_and_families_are_chosen(browser, report):
    browser.open(report)
    lines = "[...document.querySelectorAll('#plot .line')].map((e) => e.dataset.subject).sort()"
    browser.click("#subjects input[value=RWKV7]")
    assert browser.js(lines) == ["Attention", "Hyena", "Mamba2"]
    browser.key(" ")  # the box has the focus
    assert browser.js(lines) == sorted(SUBJECTS)
    browser.click("#subjects fieldset:has([value=Hyena]) legend input")
    assert browser.js(lines) == ["Attention", "Mamba2", "RWKV7"]
    browser.click(".buttons button:nth-child(2)")
    assert browser.js(lines) == []
    assert browser.texts("#plot text") == ["Choose what to draw."]
    browser.click(".buttons button:nth-child(1)")
    assert browser.js(lines) == sorted(SUBJECTS)
    assert browser.complaints() == []


def test_phases_and_quantities(browser, report):
    browser.open(report)
    assert browser.js("document.querySelector('[name=quantity][value=state_bytes]').disabled")
    browser.click("[name=phase][value=decode]")
    browser.click("[name=quantity][value=state_bytes]")
    assert browser.texts("#caption") == ["Decoding one token: state"]
    assert "tokens of context" in browser.texts("#plot text")
    browser.click("[name=phase][value=train]")  # which has no state: back to the first there is
    assert browser.texts("#caption") == ["Training, forward and backward: time, median"]
    assert browser.texts("#missing") != [""]
    assert browser.js("document.querySelector('[name=phase]:checked') === document.activeElement")
    assert browser.complaints() == []


def test_layers_ops_and_models_are_shown_apart(browser, made_up, tmp_path):
    path = tmp_path / "cost.html"
    found = made_up(SUBJECTS)
    model = [Point("mamba2", "model", "decode", n, 7.0) for n in (512, 1024)]
    op = [Point("Mamba2", "op", "prefill", n, 0.5) for n in (512, 1024)]
    write(replace(found, points=[*found.points, *op, *model]), path)
    browser.open(path)
    shown = "[...document.querySelectorAll('#plot .line')].map((e) => e.dataset.subject).sort()"
    labels = "[...document.querySelectorAll('#subjects fieldset > label')]"
    offered = f"{labels}.filter((e) => e.offsetParent).map((e) => e.textContent)"
    assert browser.js(shown) == sorted(SUBJECTS)
    assert sorted(browser.js(offered)) == sorted(SUBJECTS)
    browser.click("[name=kind][value=op]")
    assert browser.texts("#caption") == ["Prefill: time, median"]
    assert browser.js(shown) == browser.js(offered) == ["Mamba2"]
    browser.click("[name=kind][value=model]")
    assert browser.texts("#caption") == ["Decoding one token: time, median"]
    assert browser.js(shown) == browser.js(offered) == ["mamba2"]
    assert browser.complaints() == []


def test_a_point_tells_its_figures_to_the_pointer_and_to_keys(browser, report):
    browser.open(report)
    browser.mouse("mouseMoved", *browser.place("#plot [data-subject=Mamba2] .mark"))
    said = "Mamba21,024 tokens: 1.02\u00a0msquartiles 0.922 to 1.13 ms0.488 \u00d7 Attention"
    assert browser.texts("#tip") == [said]
    assert browser.texts("#plot .line.on text") == ["Mamba2" * 2]
    browser.mouse("mouseMoved", 5, 5)
    assert browser.js("document.getElementById('tip').hidden")
    browser.js("document.getElementById('plot').focus()")
    browser.key("ArrowRight")
    (first,) = browser.texts("#live")
    browser.key("ArrowUp")
    browser.key("ArrowLeft")
    (second,) = browser.texts("#live")
    assert "16,384 tokens" in first
    assert "4,096 tokens" in second or "1,024 tokens" in second
    assert first.split(",")[0] != second.split(",")[0]
    browser.key("Escape")
    assert browser.js("document.getElementById('tip').hidden")
    assert browser.complaints() == []


CONTRAST = """(() => {
  const context = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const light = (colour) => {
    context.fillStyle = colour;
    context.fillRect(0, 0, 1, 1);
    const parts = [...context.getImageData(0, 0, 1, 1).data].slice(0, 3).map((v) => v / 255);
    const [r, g, b] = parts.map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const page = light(getComputedStyle(document.body).backgroundColor);
  return [...document.querySelectorAll("#plot text, p, td, th, label:not(:has(:disabled)), a, dt")].map((e) => {
    const style = getComputedStyle(e), text = light(e.ownerSVGElement ? style.fill : style.color);
    return (Math.max(text, page) + 0.05) / (Math.min(text, page) + 0.05);
  });
})()"""


@pytest.mark.parametrize("dark", [False, True])
def test_everything_is_readable_in_both_schemes_and_fits_a_narrow_screen(browser, made_up, tmp_path, dark):
    path = tmp_path / "cost.html"
    names = ["Attention", "Mamba2", "RWKV5", "Retention", "DeltaNet", "RWKV7", "Mamba", "S4", "Hyena", "SwiGLU", "MoE"]
    write(made_up(names), path)
    browser.open(path, width=400, dark=dark)
    assert browser.js("getComputedStyle(document.body).backgroundColor") == (
        "rgb(20, 24, 28)" if dark else "rgb(255, 255, 255)"
    )
    found = browser.js(CONTRAST)
    assert len(found) > 100
    assert min(found) >= 4.5
    assert len(browser.texts("h1, h2")) == 7
    assert browser.js("document.documentElement.scrollWidth") <= 400
    boxes = browser.js(
        "[...document.querySelectorAll('#plot .line text')].map((e) => e.getBoundingClientRect().toJSON())"
    )
    boxes.sort(key=lambda box: box["top"])
    assert len(boxes) == len(names)
    assert all(above["bottom"] <= below["top"] + 3 for above, below in pairwise(boxes))
    assert all(box["right"] <= 400 for box in boxes)


def test_what_is_measured_cannot_become_markup(browser, made_up, tmp_path):
    path = tmp_path / "cost.html"
    evil = "</script><script>bad=1</script><img src=x onerror=bad=2>{{style}}"
    found = made_up(["Mamba2", evil], (64, 128))
    write(replace(found, command=evil, points=[*found.points, Point("Hyena", "op", "train", 64, note=evil)]), path)
    browser.open(path)
    assert browser.js("typeof bad") == "undefined"
    assert browser.js("document.images.length") == 0
    assert browser.texts("dd")[0] == evil
    assert evil in browser.texts("#points td")
    assert evil in browser.texts("#subjects label")
    assert browser.complaints() == []


def test_it_prints(browser, report):
    browser.open(report)
    pdf = b64decode(browser.ask("Page.printToPDF")["data"])
    assert pdf.startswith(b"%PDF")


def test_figures_stand_in_the_tables_without_a_script(made_up):
    text = page(made_up(SUBJECTS, (64,)))
    assert not re.search(r"""(?:src|href)=["'](?!#|data:)|url\(|@import""", text)
    assert "<noscript>" in text
    rows = re.findall(r"<tr>(<th scope=\"row\".*?)</tr>", text)
    assert len(rows) >= 3 * len(SUBJECTS)
    assert any("does not fit: needs about 38 GB" in row and 'class="n none">-<' in row for row in rows)


def test_nothing_measured_is_a_report_as_well(browser, made_up, tmp_path):
    path = tmp_path / "cost.html"
    write(made_up([]), path)
    browser.open(path)
    assert browser.js("document.getElementById('figure').hidden")
    assert browser.complaints() == []


def test_a_file_is_replaced_only_when_asked(made_up, tmp_path):
    path = tmp_path / "cost.html"
    path.write_text("mine")
    with pytest.raises(UserError, match="exists; pass overwrite"):
        write(made_up(["Mamba2"], (64,)), path)
    assert path.read_text() == "mine"
    write(made_up(["Mamba2"], (64,)), path, overwrite=True)
    assert path.read_text().startswith("<!doctype html>")
