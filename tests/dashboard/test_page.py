"""The page in a browser: it loads, its figures move, it fits, and it says when nothing comes."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Locator, Page, ViewportSize, expect, sync_playwright

from tests.dashboard.scene import Scene, load, scene

WAIT_MS = 60_000
NAMES = ("chromium", "chromium-browser", "google-chrome")  # as tools/browser.py has them
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
OPTIONS = [
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium on the PATH: `apt-get install chromium`"
)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    with scene(tmp_path_factory.mktemp("fleet")) as made, load(made):
        yield made


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    sandbox = ["--no-sandbox"] if os.getuid() == 0 else []
    with sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=CHROMIUM, args=[*OPTIONS, *sandbox])
        yield made
        made.close()


class Opened:
    def __init__(self, page: Page) -> None:
        self.page = page
        self.faults: list[str] = []
        page.set_default_timeout(WAIT_MS)
        page.on("pageerror", lambda error: self.faults.append(str(error)))
        page.on("console", lambda said: self._hear(said.type, said.text))

    def go(self, url: str) -> None:
        self.page.goto(url)
        self.wait("Number(document.body.dataset.states) >= 2")

    def wait(self, true: str) -> None:
        self.page.wait_for_function(f"() => {true}", timeout=WAIT_MS)

    def text(self, heading: str) -> str:
        return self._section(heading).inner_text()

    def waits_for_change(self, heading: str) -> None:
        before = self.text(heading)
        expect(self._section(heading)).not_to_have_text(
            before, timeout=WAIT_MS, use_inner_text=True
        )

    def waits_for_text(self, heading: str, pattern: str) -> None:
        expect(self._section(heading)).to_have_text(
            re.compile(pattern, re.DOTALL), timeout=WAIT_MS, use_inner_text=True
        )

    def _section(self, heading: str) -> Locator:
        """The one whose heading begins so."""
        named = self.page.locator("h2", has_text=re.compile(f"^{heading}"))
        return self.page.locator("section", has=named).first

    def _hear(self, kind: str, text: str) -> None:
        if kind in ("error", "warning"):
            self.faults.append(text)


@pytest.fixture(
    params=[(width, scheme) for width in (1280, 390) for scheme in ("light", "dark")],
    ids=["wide-light", "wide-dark", "narrow-light", "narrow-dark"],
)
def opened(request: pytest.FixtureRequest, browser: Browser) -> Iterator[Opened]:
    width, scheme = request.param
    size = ViewportSize(width=width, height=900)
    context = browser.new_context(viewport=size, color_scheme=scheme)
    made = Opened(context.new_page())
    yield made
    back = made.page.evaluate("getComputedStyle(document.body).backgroundColor")
    brightness = sum(int(part) for part in back.removeprefix("rgb(").rstrip(")").split(","))
    assert (brightness < 3 * 128) == (scheme == "dark"), back
    assert made.page.evaluate("document.documentElement.scrollWidth") == width, "it fits"
    context.close()
    assert made.faults == []


def test_a_nodes_figures_move_under_load(fleet: Scene, opened: Opened) -> None:
    opened.go(fleet.node)
    opened.wait("document.querySelectorAll('.chart canvas').length >= 4")
    expect(opened.page.locator("#title")).to_have_text("node-1")
    expect(opened.page.locator("#status")).to_have_text("ready", timeout=WAIT_MS)
    assert "not configured" in opened.text("G4 S3")
    opened.waits_for_change("G3 SSD")
    opened.waits_for_change("Latest requests")
    assert "scheduler" in opened.text("Engines connected")
    opened.page.get_by_label("bytes more or less").fill("16MiB")
    opened.page.get_by_role("button", name="ask").click()
    asked = opened.page.locator("section", has=opened.page.get_by_role("button", name="ask"))
    expect(asked.get_by_role("status")).to_contain_text("found then", timeout=WAIT_MS)


def test_a_fleets_figures_move_under_load_and_decisions_say_why(
    fleet: Scene, opened: Opened
) -> None:
    opened.go(fleet.fleet)
    opened.wait("document.querySelectorAll('.chart canvas').length >= 4")
    opened.waits_for_change("Requests")
    opened.waits_for_text("Time to first token", r"[1-9][\d.]* m?s")
    assert opened.text("Engines").count("serving") == 2
    assert "kv: it has" in opened.text("Last decisions"), "and in which tier"
    assert "next best" in opened.text("Last decisions")
    assert "512 tokens" in opened.text("Top shared prefixes")
    assert "live" in opened.text("Nodes heard")


def test_what_a_planner_wants_beside_what_serves(fleet: Scene, opened: Opened) -> None:
    opened.go(fleet.fleet)
    engines, rates = "Planned engines", "Requests: seen, and expected"
    opened.waits_for_text(rates, r"forecast[1-9][\d.]*/slow[\d.]+/shigh[1-9][\d.]*/s")
    # Of engines as slow as its profile says, the load needs more than the two that serve.
    opened.waits_for_text(engines, r"target[3-8]serving2")
    opened.waits_for_change(rates)
    opened.waits_for_text("Planner", r"floor.* requests/s within \d+ s")


def test_it_says_when_nothing_comes_and_goes_on_when_it_does(
    fleet: Scene, browser: Browser
) -> None:
    page = browser.new_page()
    opened = Opened(page)
    opened.go(fleet.node)
    page.route("**/v1/dashboard", lambda route: route.abort())
    page.reload()
    expect(page.locator("#status")).to_contain_text("no connection", timeout=WAIT_MS)
    page.unroute("**/v1/dashboard")
    expect(page.locator("#status")).to_have_text("ready", timeout=WAIT_MS)
    page.close()
