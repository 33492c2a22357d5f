"""The page in a real browser, served for a real pool."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import pytest
import trio

from trio_pool import open_pool

pytest.importorskip("starlette", reason="the page needs trio-pool[web]")
pytest.importorskip("hypercorn", reason="the page needs trio-pool[web]")
pytest.importorskip("prometheus_client", reason="the page needs trio-pool[web]")
pytest.importorskip("playwright.sync_api", reason="a browser is driven by playwright")

from playwright.sync_api import Browser, Page, expect, sync_playwright

from trio_pool.web import serve_dashboard

if TYPE_CHECKING:
    from playwright.sync_api import ConsoleMessage, Request

T = TypeVar("T")

CHROMIUM = shutil.which("chromium")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
TOKEN = "a-token-of-some-length"
LOCAL = "127.0.0.1:0"
PATIENCE = 60_000
"""Milliseconds that a browser on a busy machine is waited for."""

pytestmark = [
    pytest.mark.skipif(
        CHROMIUM is None, reason="there is no browser here: apt-get install chromium"
    ),
    # Playwright asks for the event loop of its thread in a way of the past.
    pytest.mark.filterwarnings("ignore:There is no current event loop"),
]


class Tabs:
    """A browser, which lives in a thread of its own."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1)
        self._thread.submit(self._launch).result()

    def _launch(self) -> None:
        self._playwright = sync_playwright().start()
        self.browser: Browser = self._playwright.chromium.launch(
            executable_path=CHROMIUM, args=FLAGS
        )

    def close(self) -> None:
        self._thread.submit(self.browser.close).result()
        self._thread.submit(self._playwright.stop).result()
        self._thread.shutdown()

    async def run(self, act: Callable[[], T]) -> T:
        return await trio.to_thread.run_sync(self._thread.submit(act).result)


class Tab:
    """One page, and what went wrong in it."""

    def __init__(self, tabs: Tabs, page: Page) -> None:
        self.tabs = tabs
        self.page = page
        self.complaints: list[str] = []
        self.asked: list[str] = []
        page.set_default_timeout(PATIENCE)
        page.on("console", self._hear)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("request", self._ask)

    def _hear(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(message.text)

    def _ask(self, request: Request) -> None:
        self.asked.append(request.url)

    async def do(self, act: Callable[[Page], T]) -> T:
        return await self.tabs.run(lambda: act(self.page))

    async def shows(self, selector: str, words: str) -> None:
        """Wait until an element holds these words."""
        await self.do(
            lambda page: expect(page.locator(selector)).to_contain_text(
                words, timeout=PATIENCE
            )
        )

    async def ticks(self, times: int = 1) -> None:
        """Wait for newer pictures."""
        for _ in range(times):
            clock = await self.do(lambda page: page.locator("#clock").inner_text())
            await self.do(
                lambda page, clock=clock: expect(  # type: ignore[misc]
                    page.locator("#clock")
                ).not_to_have_text(clock, timeout=PATIENCE)
            )


@pytest.fixture(scope="module")
def tabs() -> Iterator[Tabs]:
    opened = Tabs()
    yield opened
    opened.close()


@asynccontextmanager
async def open_tab(
    tabs: Tabs,
    url: str,
    *,
    prepare: Callable[[Page], object] = lambda _: None,
    alone: bool = False,
    **options: Any,
) -> AsyncIterator[Tab]:
    """Open a page; at the end nothing has been complained of or asked elsewhere.

    With ``alone`` its server may be gone, which browsers complain of.
    """
    context = await tabs.run(lambda: tabs.browser.new_context(**options))
    try:
        tab = Tab(tabs, await tabs.run(context.new_page))
        await tab.do(prepare)
        await tab.do(lambda page: page.goto(f"{url}/"))
        yield tab
        assert alone or tab.complaints == []
        assert [asked for asked in tab.asked if not asked.startswith(url)] == []
    finally:
        await tabs.run(context.close)


async def hold(event: trio.Event) -> None:
    await event.wait()


async def fail(text: str) -> None:
    raise ValueError(text)


async def test_figures_change_while_one_looks(tabs: Tabs) -> None:
    release = trio.Event()
    async with (
        open_pool(2, hold, name="orders") as pool,
        serve_dashboard(pool, bind=LOCAL) as dashboard,
        open_tab(tabs, dashboard.urls[0]) as tab,
    ):
        await tab.shows("#link", "live")
        await tab.shows("#p0-verdict", "idle")
        for _ in range(3):
            await pool.submit(release)
        await tab.shows("#p0-queue", "1 queued")
        await tab.shows("#p0-summary", "2 busy")
        await tab.shows("#announce", "orders: saturated.")
        assert "saturated" in await tab.do(lambda page: page.title())
        release.set()
        await tab.shows("#p0-verdict", "idle")
        await tab.shows("#p0-flow", "3 done")


async def test_the_first_picture_needs_no_script(tabs: Tabs) -> None:
    async with (
        open_pool(2, hold, name="orders") as pool,
        serve_dashboard(pool, bind=LOCAL) as dashboard,
        open_tab(tabs, dashboard.urls[0], java_script_enabled=False) as tab,
    ):
        await tab.shows("#p0-busy", "2 of 2 workers up")


async def test_several_pools_are_led_to_from_the_top(tabs: Tabs) -> None:
    async with (
        open_pool(1, hold, name="orders") as orders,
        open_pool(1, hold, name="mails") as mails,
        serve_dashboard([orders, mails], bind=LOCAL) as dashboard,
        open_tab(tabs, dashboard.urls[0]) as tab,
    ):
        mails.pause()
        await tab.shows("nav", "paused")
        await tab.do(lambda page: page.get_by_role("link", name="mails").click())
        assert (await tab.do(lambda page: page.url)).endswith("#p1")
        await tab.do(
            lambda page: expect(page.locator("#p1-verdict")).to_be_in_viewport()
        )
        mails.resume()


async def test_it_connects_again_when_the_server_is_back(tabs: Tabs) -> None:
    async with open_pool(1, hold) as pool:
        async with serve_dashboard(pool, bind=LOCAL) as dashboard:
            url = dashboard.urls[0]
            tab_of_this = open_tab(tabs, url, alone=True)
            tab = await tab_of_this.__aenter__()
            await tab.shows("#link", "live")
        await tab.shows("#link", "connection lost, last picture of")
        assert await tab.do(lambda page: page.locator("body.lost").count())
        bind = url.removeprefix("http://")
        await refuse_once(int(bind.rpartition(":")[2]))
        async with serve_dashboard(pool, bind=bind):
            await tab.shows("#link", "live")
            assert not await tab.do(lambda page: page.locator("body.lost").count())
            await tab.ticks()
            await tab_of_this.__aexit__(None, None, None)


async def refuse_once(port: int) -> None:
    """Answer one request with 503, as a proxy does when the server is not there."""
    answer = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n"

    async def answer_one(stream: trio.SocketStream) -> None:
        async with stream:
            await stream.receive_some()
            await stream.send_all(answer + b"Connection: close\r\n\r\n")
        nursery.cancel_scope.cancel()

    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            await trio.serve_tcp(answer_one, port, host="127.0.0.1")


async def test_silence_is_told_and_a_dead_connection_is_given_up(tabs: Tabs) -> None:
    def prepare(page: Page) -> None:
        page.clock.install()
        page.route("**/events", lambda _: None)

    async with (
        open_pool(1, hold) as pool,
        serve_dashboard(pool, bind=LOCAL) as dashboard,
        open_tab(tabs, dashboard.urls[0], prepare=prepare) as tab,
    ):
        await tab.shows("#link", "as loaded")
        await tab.do(lambda page: page.clock.fast_forward(5_000))
        await tab.shows("#link", "no news: is the program blocked?")
        await tab.do(lambda page: page.unroute("**/events"))
        await tab.do(lambda page: page.clock.fast_forward(6_000))
        await tab.do(lambda page: page.clock.fast_forward(6_000))
        await tab.shows("#link", "live")


async def test_a_tab_out_of_sight_gives_its_connection_back(tabs: Tabs) -> None:
    look = "Object.defineProperty(document, 'hidden', {value: %s, configurable: true});"
    tell = "document.dispatchEvent(new Event('visibilitychange'));"
    async with (
        open_pool(1, hold) as pool,
        serve_dashboard(pool, bind=LOCAL) as dashboard,
        open_tab(
            tabs, dashboard.urls[0], prepare=lambda page: page.clock.install()
        ) as tab,
    ):
        await tab.shows("#link", "live")
        await tab.do(lambda page: page.evaluate(look % "true" + tell))
        await tab.do(lambda page: page.clock.fast_forward(61_000))
        await tab.shows("#link", "asleep")
        assert (await tab.do(lambda page: page.title())).startswith("(asleep)")
        await tab.do(lambda page: page.evaluate(look % "false" + tell))
        await tab.shows("#link", "live")
        assert "asleep" not in await tab.do(lambda page: page.title())


async def test_without_a_token_one_can_only_look(tabs: Tabs) -> None:
    async with (
        open_pool(1, hold) as pool,
        serve_dashboard(pool, bind=LOCAL) as dashboard,
        open_tab(tabs, dashboard.urls[0]) as tab,
    ):
        assert not await tab.do(lambda page: page.locator("form, button").count())


@pytest.mark.parametrize(
    "name",
    [
        "orders",
        "\u00fcber/a b?c#d & <e>",
        "caf\u00e9\u00a0\U0001f469\u200d\U0001f4bb\ntwo",
    ],
)
async def test_controls_work_with_the_token(tabs: Tabs, name: str) -> None:
    def resize(page: Page) -> None:
        page.get_by_role("spinbutton").fill("3")
        page.keyboard.press("Enter")

    async with (
        open_pool(1, hold, name=name) as pool,
        serve_dashboard(pool, bind=LOCAL, token=TOKEN) as dashboard,
        open_tab(tabs, dashboard.urls[0]) as tab,
    ):
        await tab.do(lambda page: page.get_by_label("Token").fill(TOKEN))
        await tab.do(lambda page: page.get_by_role("button", name="Pause").click())
        await tab.shows("#p0-answer", "pause: paused")
        assert pool.state.value == "paused"
        await tab.shows("#p0-verdict", "paused")
        await tab.do(lambda page: page.get_by_role("button", name="Resume").click())
        await tab.shows("#p0-answer", "resume: open")
        assert pool.state.value == "open"
        await tab.do(resize)
        await tab.shows("#p0-answer", "resize: 3 wanted")
        assert pool.size == 3
        await tab.shows("#p0-busy", "3 of 3 workers up")


@pytest.mark.parametrize("token", ["", "another-token-of-some-length"])
async def test_controls_do_nothing_without_the_token(tabs: Tabs, token: str) -> None:
    async with (
        open_pool(1, hold) as pool,
        serve_dashboard(pool, bind=LOCAL, token=TOKEN) as dashboard,
        open_tab(tabs, dashboard.urls[0], alone=True) as tab,
    ):
        await tab.do(lambda page: page.get_by_label("Token").fill(token))
        await tab.do(lambda page: page.get_by_role("button", name="Pause").click())
        await tab.shows("#p0-answer.refused", "pause: refused: a token is needed")
        assert pool.state.value == "open"


async def test_a_size_that_is_refused_is_named(tabs: Tabs) -> None:
    def resize(page: Page) -> None:
        page.get_by_label("Token").fill(TOKEN)
        page.get_by_role("spinbutton").fill("99999999")
        page.get_by_role("button", name="Resize").click()

    async with (
        open_pool(1, hold) as pool,
        serve_dashboard(pool, bind=LOCAL, token=TOKEN) as dashboard,
        open_tab(tabs, dashboard.urls[0], alone=True) as tab,
    ):
        await tab.do(resize)
        await tab.shows("#p0-answer.refused", "99999999")
        assert pool.size == 1


async def test_focus_input_and_selection_survive_new_pictures(tabs: Tabs) -> None:
    select = """() => {
        const range = document.createRange();
        range.selectNodeContents(document.querySelector("#p0-busy h3"));
        getSelection().removeAllRanges();
        getSelection().addRange(range);
    }"""
    async with (
        open_pool(1, hold) as pool,
        serve_dashboard(pool, bind=LOCAL, token=TOKEN) as dashboard,
        open_tab(tabs, dashboard.urls[0]) as tab,
    ):
        await tab.shows("#link", "live")
        await tab.do(lambda page: page.get_by_role("spinbutton").fill("7"))
        await tab.do(lambda page: page.locator(".table.workers").focus())
        await tab.do(lambda page: page.evaluate(select))
        await pool.resize(2)
        await tab.ticks(2)
        assert (
            await tab.do(lambda page: page.get_by_role("spinbutton").input_value())
            == "7"
        )
        await tab.do(
            lambda page: expect(page.locator(".table.workers")).to_be_focused()
        )
        selected = "() => getSelection().toString()"
        assert "Busy" in await tab.do(lambda page: page.evaluate(selected))
        assert "1 of 1" in await tab.do(lambda page: page.inner_text("#p0-busy"))
        await tab.do(lambda page: page.evaluate("getSelection().removeAllRanges()"))
        await tab.shows("#p0-busy", "2 of 2 workers up")


@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 360)])
async def test_it_can_be_read_on_any_screen(
    tabs: Tabs, scheme: str, width: int
) -> None:
    name = "a" * 300
    async with (
        open_pool(30, fail, name=name, unobserved="ignore") as pool,
        open_pool(1, hold, name="other") as other,
        serve_dashboard([pool, other], bind=LOCAL, token=TOKEN, describe=str) as board,
        open_tab(
            tabs,
            board.urls[0],
            color_scheme=scheme,
            viewport={"width": width, "height": 740},
        ) as tab,
    ):
        for _ in range(20):
            await pool.submit("b" * 300)
        other.pause()
        board.mark("c" * 100)
        await tab.shows("#p0-errors", "bbb")
        await tab.shows("#p1-verdict", "paused")
        wide = "document.documentElement.scrollWidth"
        assert await tab.do(lambda page: page.evaluate(wide)) == width
        ground = await tab.do(lambda page: page.evaluate(GROUND))
        assert (sum(ground) < 150) == (scheme == "dark")
        assert await tab.do(lambda page: page.evaluate(FAINT)) == []
        other.resume()


GROUND = """getComputedStyle(document.body).backgroundColor
    .match(/[0-9.]+/g).slice(0, 3).map(Number)"""

# Texts whose contrast with what is behind them is below that of WCAG's level AA.
FAINT = """() => {
    const parts = (color) => color.match(/[0-9.]+/g).map(Number);
    const luminance = (color) => {
        const [r, g, b] = parts(color).slice(0, 3).map((part) => {
            const value = part / 255;
            return value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
        });
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const behind = (element) => {
        for (let at = element; at; at = at.parentElement) {
            const color = getComputedStyle(at).backgroundColor;
            if ((parts(color)[3] ?? 1) === 1) return color;
        }
        return "rgb(255, 255, 255)";
    };
    const faint = [];
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
        const element = walker.currentNode.parentElement;
        const shown = element.checkVisibility() && walker.currentNode.data.trim();
        if (!shown) continue;
        const style = getComputedStyle(element);
        const ink = element instanceof SVGElement ? style.fill : style.color;
        const [low, high] = [luminance(ink), luminance(behind(element))].sort();
        const ratio = (Math.max(low, high) + 0.05) / (Math.min(low, high) + 0.05);
        if (ratio < 4.5) faint.push([shown.slice(0, 40), ratio.toFixed(2)]);
    }
    return faint;
}"""


async def test_what_users_named_is_shown_and_never_run(tabs: Tabs) -> None:
    evil = "<img src=x onerror=document.title='owned'><script>alert(1)</script>"
    async with (
        open_pool(1, fail, name=evil, unobserved="ignore") as pool,
        serve_dashboard(pool, bind=LOCAL, token=TOKEN, describe=str) as dashboard,
        open_tab(tabs, dashboard.urls[0]) as tab,
    ):
        await pool.submit(evil, id=evil)
        dashboard.mark(evil)
        await tab.shows("#p0-errors", evil)
        await tab.shows("#p0-marks", evil)
        assert not await tab.do(lambda page: page.locator("main img").count())
        assert not await tab.do(lambda page: page.locator("main script").count())
        assert "owned'>" in await tab.do(lambda page: page.title())
