"""Renders what of the page stays as it is, round the fragments that change."""

from collections.abc import Iterator, Mapping, Sequence
from typing import final

import attrs

from . import _tables as tables
from ._html import Html, element, join, quoted, void

_TILES = ("busy", "queue", "times", "flow", "ends")
_CHARTS = ("busy-chart", "queue-chart", "flow-chart", "times-chart")

_TABLES = (
    ("failures", "Failures by type", tables.FAILURES),
    ("crashes", "Crashes of workers", tables.CRASHES),
    ("workers", "Workers", tables.WORKERS),
    ("slowest", "Slowest running jobs", tables.SLOWEST),
    ("errors", "Last errors", tables.ERRORS),
    ("marks", "Marks in the charts", tables.MARKS),
)


def frame(fragments: Mapping[str, Html], names: Sequence[str], controls: bool) -> str:
    """Render the document of the pools of these names."""
    page = _Page(fragments)
    pools = [(f"p{at}", name) for at, name in enumerate(names)]
    main = element(
        "main",
        page.overview(pools) if len(pools) > 1 else "",
        *(page.pool(key, name, controls) for key, name in pools),
        page.loop(),
        id="main",
    )
    body = element("body", page.bar(controls), main)
    document = element("html", page.head(), body, lang="en")
    return f"<!doctype html>\n{document}\n"


@final
@attrs.frozen
class _Page:
    """The fragments that a page starts with."""

    fragments: Mapping[str, Html]

    def fill(self, name: str, key: str, **attributes: object) -> Html:
        """Make the element that a fragment lives in."""
        return element(name, self.fragments[key], id=key, **attributes)

    def head(self) -> Html:
        """Render what the browser is told; everything else comes from here."""
        again = void("meta", http_equiv="refresh", content="5")
        icon = self.fragments["page-icon"]
        return element(
            "head",
            void("meta", charset="utf-8"),
            void(
                "meta", name="viewport", content="width=device-width, initial-scale=1"
            ),
            void("meta", name="color-scheme", content="light dark"),
            self.fill("title", "page-title"),
            void("link", rel="icon", id="icon", href=icon),
            void("link", rel="stylesheet", href="page.css"),
            element("script", src="page.js", defer=True),
            element("noscript", again),
        )

    def bar(self, controls: bool) -> Html:
        """Render the line at the top: whether what is shown is current."""
        return element(
            "header",
            element("h1", "trio_pool"),
            element(
                "p",
                element("span", "picture of ", class_="wide"),
                self.fill("span", "clock"),
                " UTC",
                class_="of",
            ),
            element("p", "as loaded", id="link", role="status"),
            self.fill("p", "announce", class_="unseen", aria_live="polite"),
            self.fill("span", "page-icon", hidden=True),
            _token() if controls else "",
            class_="bar",
        )

    def overview(self, pools: Sequence[tuple[str, str]]) -> Html:
        """Render a line for each pool that leads to its section."""
        lines = (
            element("li", self.fill("a", f"{key}-overview", href=f"#{key}"))
            for key, _ in pools
        )
        return element("nav", element("ul", *lines), aria_label="Pools")

    def pool(self, key: str, name: str, controls: bool) -> Html:
        """Render all of one pool."""
        return element(
            "section",
            element("h2", name, id=f"{key}-name"),
            self.fill("div", f"{key}-verdict"),
            _controls(key, name) if controls else "",
            element("div", *self._each(key, _TILES, "tile"), class_="tiles"),
            element("div", *self._each(key, _CHARTS, "chart"), class_="charts"),
            element(
                "div",
                *(self._table(key, *table) for table in _TABLES),
                class_="tables",
            ),
            id=key,
            class_="pool",
            aria_labelledby=f"{key}-name",
        )

    def _each(self, key: str, parts: Sequence[str], look: str) -> Iterator[Html]:
        name = "figure" if look == "chart" else "div"
        for part in parts:
            yield self.fill(name, f"{key}-{part}", class_=f"card {look} {part}")

    def _table(self, key: str, part: str, title: str, columns: Sequence[str]) -> Html:
        heads = (
            element("th", column, scope="col", class_=tables.class_of(column))
            for column in columns
        )
        summary = f"{key}-summary"
        more = join(" ", self.fill("span", summary)) if part == "workers" else ""
        table = element(
            "table",
            element("caption", element("b", title), more),
            element("thead", element("tr", *heads)),
            self.fill("tbody", f"{key}-{part}"),
        )
        # It scrolls by itself where it is too wide, by the keyboard as well.
        return element(
            "div",
            table,
            class_=f"card table {part}",
            tabindex=0,
            role="region",
            aria_label=title,
        )

    def loop(self) -> Html:
        """Render what concerns the loop that all pools share."""
        return element(
            "section",
            element("h2", "Event loop", id="loop-name"),
            element(
                "div",
                self.fill("div", "lag"),
                self.fill("figure", "lag-chart", class_="chart"),
                class_="card",
            ),
            class_="loop",
            aria_labelledby="loop-name",
        )


def _token() -> Html:
    field = void(
        "input",
        id="token",
        type="password",
        autocomplete="off",
        spellcheck="false",
        placeholder="to pause or resize",
    )
    return element("form", element("label", "Token ", field), class_="token")


def _controls(key: str, name: str) -> Html:
    wanted = void(
        "input",
        type="number",
        name="size",
        min=0,
        step=1,
        required=True,
        inputmode="numeric",
    )
    return element(
        "form",
        element("button", "Pause", type="button", data_act="pause"),
        element("button", "Resume", type="button", data_act="resume"),
        element("label", "Workers ", wanted),
        element("button", "Resize", type="submit", data_act="resize"),
        element("output", id=f"{key}-answer", role="status"),
        class_="controls",
        data_pool=quoted(name),
        aria_label=f"Controls of {name}",
    )
