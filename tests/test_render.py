"""Rendering: what is shown is escaped, well-formed, and what the picture says."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

import trio_pool
from trio_pool.web import _figures as figures
from trio_pool.web._charts import POINTS, Line, choose_window, draw_chart, round_up
from trio_pool.web._html import Html, element, join, text, void
from trio_pool.web._panels import icon, meter
from trio_pool.web._picture import (
    Failure,
    FailureCount,
    Light,
    Mark,
    Picture,
    PoolPicture,
    RestartCause,
    Series,
    Spread,
    WorkerRow,
)
from trio_pool.web._render import render_fragments, render_page
from trio_pool.web._tables import ROWS, choose_workers

NOW = 1_763_780_000.0
EVIL = """<script>alert(1)</script>"><img src=x onerror='alert(2)'>&amp;"""
ASSETS = Path(trio_pool.__file__).parent / "web"


def worker(number: int, **changes: Any) -> WorkerRow:
    row = WorkerRow(
        id=number,
        state="busy",
        job=100 + number,
        age=0.5,
        doing=None,
        jobs=7,
        restarts=0,
        last_error=None,
    )
    return attrs.evolve(row, **changes)


def series(number: int, *, step: float = 1.0, **changes: Any) -> Series:
    names = [field.name for field in attrs.fields(Series)][2:]
    values = {name: tuple(float(i % 7) for i in range(number)) for name in names}
    return Series(**{"step": step, "until": NOW, **values, **changes})


def pool(**changes: Any) -> PoolPicture:
    spread = Spread(count=10, p50=0.01, p95=0.02, p99=0.03, max=0.04)
    whole = PoolPicture(
        name="orders",
        state="open",
        ready=True,
        light="green",
        sentence="working: 2 of 4 busy, nothing waits",
        size=4,
        workers_up=4,
        busy=2,
        busy_share_second=0.5,
        busy_share_minute=0.25,
        queued=0,
        delayed=0,
        running=2,
        max_backlog=1024,
        oldest_wait=0.0,
        wait=spread,
        run=spread,
        accepted_rate=3.0,
        ended_rate=2.0,
        accepted=12,
        done=10,
        failed=0,
        timed_out=0,
        cancelled=0,
        expired=0,
        dropped=0,
        lost=0,
        retries=0,
        restarts=0,
        breaker=None,
        workers=tuple(worker(i) for i in range(4)),
        history=series(60),
    )
    return attrs.evolve(whole, **changes)


def picture(*pools: PoolPicture, **changes: Any) -> Picture:
    whole = Picture(
        time=NOW, lag=0.003, lag_minute=0.2, controls=True, pools=pools or (pool(),)
    )
    return attrs.evolve(whole, **changes)


def hostile(evil: str) -> PoolPicture:
    return pool(
        name=evil,
        state=evil,
        sentence=evil,
        breaker=evil,
        failures=(FailureCount(type=evil, count=1, last=NOW),),
        errors=(
            Failure(
                time=NOW,
                job=evil,
                worker=1,
                attempts=1,
                type=evil,
                place=evil,
                text=evil,
            ),
        ),
        crashes=(RestartCause(time=NOW, worker=1, type=evil, place=evil, text=evil),),
        workers=(worker(1, state=evil, job=evil, doing=evil, last_error=evil),),
        slowest=(worker(1, state=evil, job=evil, doing=evil, last_error=evil),),
        marks=(Mark(time=NOW, kind="mark", text=evil),),
    )


class Reader(HTMLParser):
    """Reads a document, and stumbles over what is not closed."""

    VOID = frozenset({"meta", "link", "input"})

    def __init__(self, document: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(document)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), f"an attribute twice: {attrs}"
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.words)

    def ids(self) -> list[str | None]:
        return [found["id"] for _, found in self.elements if "id" in found]


def read(*pools: PoolPicture, controls: bool = True) -> Reader:
    return Reader(render_page(picture(*pools), controls))


# Markup


def test_all_text_is_escaped_in_elements_and_attributes() -> None:
    html = element("p", EVIL, title=EVIL)
    assert html.count("<") == 2
    assert "'" not in html
    assert Reader(html).elements == [("p", {"title": EVIL})]
    assert Reader(html).text == EVIL


def test_markup_is_not_escaped_twice() -> None:
    assert element("p", element("b", "a & b")) == "<p><b>a &amp; b</b></p>"
    assert join("<", Html("<i></i>")) == "&lt;<i></i>"


def test_attributes_that_are_none_or_false_are_left_out() -> None:
    html = void("input", required=True, disabled=False, id=None, data_x=0, class_="a")
    assert html == '<input required data-x="0" class="a">'


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        ("\x00\x1b[31m", "\\x00\\x1b[31m"),
        ("\udc80", "\\udc80"),
        ("a\u202eb", "a\\u202eb"),
        ("two\nlines", "two\nlines"),
        ("Gr\u00fc\u00dfe \u2713", "Gr\u00fc\u00dfe \u2713"),
    ],
)
def test_what_does_not_print_is_shown_by_its_code(raw: str, shown: str) -> None:
    assert text(raw) == shown


@given(st.text())
def test_any_text_can_be_sent_and_comes_back(raw: str) -> None:
    html = element("p", raw)
    html.encode("utf-8")
    if raw.isprintable():
        assert Reader(html).text == raw


# Figures


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (None, "\u2013"),
        (math.nan, "\u2013"),
        (math.inf, "no end"),
        (0.0, "0 s"),
        (1e-9, "0 s"),
        (0.000_42, "420 \u00b5s"),
        (0.000_999_9, "1.0 ms"),
        (0.0031, "3.1 ms"),
        (0.213, "213 ms"),
        (0.99999, "1.0 s"),
        (2.34, "2.3 s"),
        (59.99, "60 s"),
        (60, "1 min 00 s"),
        (3_599.9, "59 min 59 s"),
        (7_500, "2 h 05 min"),
        (200_000, "2 d 7 h"),
    ],
)
def test_seconds_are_told_with_the_unit_that_fits(
    value: float | None, told: str
) -> None:
    assert figures.seconds(value) == told


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (0, "0"),
        (1_284_331, "1,284,331"),
        (12_345_678, "12.35 M"),
        (4e9, "4.00 G"),
        (5e12, "5.00 T"),
        (math.inf, "no bound"),
    ],
)
def test_counts_are_exact_until_they_are_too_long(value: float, told: str) -> None:
    assert figures.count(value) == told


def test_only_nothing_is_0_percent_and_only_all_is_100_percent() -> None:
    shares = [0.0, 0.001, 0.5, 0.999, 1.0]
    assert [figures.share(share) for share in shares] == [
        "0 %",
        "1 %",
        "50 %",
        "99 %",
        "100 %",
    ]


def test_rates_and_times_of_the_day() -> None:
    rates = [0, 0.012, 0.42, 12.3, 1234.5]
    assert [figures.rate(rate) for rate in rates] == [
        "0/s",
        "0.012/s",
        "0.4/s",
        "12/s",
        "1,234/s",
    ]
    assert figures.clock(NOW) == "02:53:20"
    assert figures.stamp(NOW) == "2025-11-22T02:53:20Z"


# Charts


def points_of(html: str, look: str) -> list[tuple[float, float]]:
    (found,) = re.findall(rf'class="line {look}" points="([^"]+)"', html)
    pairs = (spot.split(",") for spot in found.split())
    return [(float(x), float(y)) for x, y in pairs]


def chart(values: tuple[float, ...], **changes: Any) -> Html:
    options: dict[str, Any] = {
        "line": Line("busy", values, "first"),
        "series": series(len(values)),
        "marks": (),
        "least": 1,
        **changes,
    }
    return draw_chart(
        "Title",
        [options["line"]],
        options["series"],
        say=figures.mean,
        least=options["least"],
        marks=options["marks"],
    )


def test_a_chart_draws_values_from_the_right_and_up_to_a_round_figure() -> None:
    points = points_of(chart((0.0, 5.0, 7.5)), "first")
    assert points == [(177, 100), (178, 37.5), (179, 6.25)]


@pytest.mark.parametrize("step", [1.0, 5.0])
@pytest.mark.parametrize("minutes", [0.5, 3, 3.1, 7, 14.9, 15])
def test_charts_have_few_points_that_fit(minutes: float, step: float) -> None:
    number = int(minutes * 60 / step)
    found = series(number, step=step)
    window = choose_window(found, number)
    thin = window.thin(Line("x", found.busy, "first"))
    assert 0 < len(thin) <= window.points <= POINTS
    assert minutes <= window.minutes < minutes + 3
    assert NOW - 5 <= window.end <= NOW


def test_a_chart_stays_the_same_until_a_point_is_whole_and_keeps_its_shape() -> None:
    values = [float(37 * i % 101) for i in range(900)]
    charts = []
    for at in range(11):
        shown = tuple([*values, *map(float, range(at))][-900:])
        charts.append(chart(shown, series=series(900, until=NOW + at)))
    changes = [a != b for a, b in pairwise(charts)]
    assert changes.count(True) == 2
    first, last = points_of(charts[0], "first"), points_of(charts[10], "first")
    assert [y for _, y in first][2:] == [y for _, y in last][:-2]


def test_a_chart_of_longer_steps_leaves_out_the_newest_which_is_not_over() -> None:
    whole = series(100, step=5.0)
    before, after = (
        chart((*whole.busy[:-1], newest), series=whole) for newest in (1.0, 90.0)
    )
    assert before == after


def test_peaks_are_not_averaged_away() -> None:
    values = (0.0,) * 400 + (60.0,) + (0.0,) * 499
    drawn = chart(values, line=Line("lag", values, "first", peaks=True))
    assert min(y for _, y in points_of(drawn, "first")) == 0
    smooth = chart(values)
    assert "most 12" in smooth
    assert "most 60" in drawn


def test_a_chart_tells_its_figures_to_those_who_do_not_see_it() -> None:
    found = Reader(chart((2.0, 4.0, 3.0)))
    (label,) = [a["aria-label"] for _, a in found.elements if a.get("role") == "img"]
    assert label == "Title, the last 3 minutes: busy now 3, most 4, least 2"


@pytest.mark.parametrize("history", [None, series(0), series(1)])
def test_without_history_there_is_no_chart_but_a_word(history: Series | None) -> None:
    page = read(pool(history=history))
    assert "Measured from now on." in page.text


def test_marks_are_where_their_time_is_and_old_ones_are_left_out() -> None:
    marks = [
        Mark(time=NOW + 9, kind="mark", text="soon"),
        Mark(time=NOW - 90, kind="resize", text="2 to 4"),
        Mark(time=NOW - 181, kind="state", text="paused"),
    ]
    drawn = chart((1.0,) * 100, marks=marks)
    assert re.findall(r'<line x1="([0-9.]+)%"', drawn) == ["100.0", "49.7"]
    assert "paused" not in drawn
    assert "2 to 4" in drawn


@given(st.lists(st.floats(0, 1e300), min_size=2, max_size=30))
def test_any_figures_can_be_drawn(values: list[float]) -> None:
    html = chart(tuple(values))
    Reader(html)
    assert "nan" not in html
    assert "inf" not in html
    assert all(-0.01 <= y <= 100 for _, y in points_of(html, "first"))


@given(st.floats(0, 1e308))
def test_axes_end_at_a_figure_that_is_not_below_the_values(value: float) -> None:
    top = round_up(value)
    assert value <= top
    assert top <= 2 * value or value < 1e-9


def test_a_pool_that_is_all_busy_is_no_alarm_by_itself() -> None:
    html = render_fragments(picture(pool(busy_share_second=1.0)))["p0-busy"]
    assert 'width="100.0%" height="100%" class="some"' in html


def test_a_meter_is_never_wider_than_it_is() -> None:
    assert 'width="100.0%"' in meter(7.0, "Busy")
    assert 'width="0.0%"' in meter(-1.0, "Busy")


# The page


@pytest.mark.parametrize("controls", [True, False])
@pytest.mark.parametrize("number", [1, 3])
def test_the_page_is_well_formed_and_holds_each_fragment_once(
    number: int, controls: bool
) -> None:
    pools = [pool(name=f"pool {at}") for at in range(number)]
    page = read(*pools, controls=controls)
    ids = page.ids()
    assert len(set(ids)) == len(ids)
    fragments = set(render_fragments(picture(*pools)))
    if number == 1:
        fragments.remove("p0-overview")
    assert fragments <= set(ids)


def test_fragments_are_in_the_page_as_they_are_sent() -> None:
    shown = picture(hostile(EVIL), pool())
    page = render_page(shown, True)
    for key, html in render_fragments(shown).items():
        assert f'id="{key}"' in page
        assert html in page
        Reader(html)


def test_nothing_that_users_named_becomes_markup() -> None:
    tame, evil = read(hostile("tame")), read(hostile(EVIL))
    assert [tag for tag, _ in evil.elements] == [tag for tag, _ in tame.elements]
    assert [set(a) for _, a in evil.elements] == [set(a) for _, a in tame.elements]
    assert evil.text.count("<script>alert(1)") == tame.text.count("tame")


@given(st.text(max_size=60))
def test_no_name_breaks_the_page(name: str) -> None:
    page = render_page(picture(hostile(name)), True)
    page.encode("utf-8")
    Reader(page)


def test_the_page_has_no_script_or_style_of_its_own_and_nothing_from_elsewhere() -> (
    None
):
    page = read(hostile(EVIL), pool())
    for tag, found in page.elements:
        assert tag != "style"
        assert not [name for name in found if name == "style" or name.startswith("on")]
        for name in ("src", "href"):
            address = found.get(name) or ""
            assert "//" not in address.replace("http://www.w3.org/2000/svg", "")
            assert not address.startswith("/"), "a mount below a path would break"
    scripts = [found for tag, found in page.elements if tag == "script"]
    assert scripts == [{"src": "page.js", "defer": None}]


@pytest.mark.parametrize("name", ["page.css", "page.js"])
def test_the_assets_ask_nobody_else(name: str) -> None:
    asset = (ASSETS / name).read_text(encoding="utf-8")
    assert "//" not in re.sub(r"^\s*//.*$|;\s*//.*$", "", asset, flags=re.MULTILINE)
    assert "@import" not in asset
    assert "url(" not in asset
    assert "eval" not in asset


def test_every_class_of_a_light_has_its_look() -> None:
    css = (ASSETS / "page.css").read_text(encoding="utf-8")
    for rule in (".verdict.red", ".lamp.amber", ".line.first", ".mark.on-restart"):
        assert rule in css


@pytest.mark.parametrize(
    ("light", "word"),
    [
        ("green", "All right"),
        ("amber", "Under pressure"),
        ("red", "Trouble"),
        ("off", "Stopped"),
    ],
)
def test_a_light_is_told_by_word_and_shape_and_not_by_colour_alone(
    light: Light, word: str
) -> None:
    lights: list[Light] = ["green", "amber", "red", "off"]
    html = render_fragments(picture(pool(light=light)))["p0-verdict"]
    assert f'class="verdict {light}"' in html
    assert f'aria-label="{word}"' in html
    assert len({icon(other) for other in lights}) == 4


def test_the_sentence_is_shown_as_it_is() -> None:
    page = read(pool(sentence="paused: 12 jobs wait"))
    assert "paused: 12 jobs wait" in "".join(page.words)
    assert "all fine" in "".join(read(pool(sentence="all fine")).words)


def test_what_is_read_aloud_has_no_figures_that_change_each_second() -> None:
    told = [
        render_fragments(picture(pool(sentence=f"saturated: oldest wait {age} s")))
        for age in (2, 3)
    ]
    assert told[0]["announce"] == told[1]["announce"] == "orders: saturated."
    assert told[0]["p0-verdict"] != told[1]["p0-verdict"]
    live = [a for _, a in read().elements if a.get("aria-live")]
    assert [found["id"] for found in live] == ["announce"]


def test_the_title_and_the_icon_are_those_of_the_worst_pool() -> None:
    pools = [
        pool(name="fine"),
        pool(name="sick", light="red", sentence="broken: worker 3"),
        pool(name="gone", light="off"),
        pool(name="slow", light="amber"),
    ]
    fragments = render_fragments(picture(*pools))
    assert fragments["page-title"] == "\u2716 sick: broken"
    assert fragments["page-icon"] == text(icon("red"))


def test_a_closed_pool_does_not_hide_one_that_works() -> None:
    fragments = render_fragments(picture(pool(light="off"), pool(name="other")))
    assert "other" in fragments["page-title"]


def test_controls_are_there_only_if_they_may_be_used() -> None:
    tags = {tag for tag, _ in read(controls=False).elements}
    assert not tags & {"button", "input", "form"}
    page = read(pool(name="a/b & c"), controls=True)
    forms = [a for tag, a in page.elements if tag == "form" and "data-pool" in a]
    assert [form["data-pool"] for form in forms] == ["a%2Fb%20%26%20c"]
    assert [a["data-act"] for tag, a in page.elements if tag == "button"] == [
        "pause",
        "resume",
        "resize",
    ]


@pytest.mark.parametrize(
    "name",
    [
        "caf\u00e9\u00a0bar",
        "\U0001f469\u200d\U0001f4bb",
        "two\nlines",
        "\udc80",
        "a?b#c",
    ],
)
def test_a_pool_of_any_name_can_be_asked_for_by_its_controls(name: str) -> None:
    page = read(pool(name=name))
    [form] = [a for tag, a in page.elements if tag == "form" and "data-pool" in a]
    asked = form["data-pool"]
    assert asked is not None
    assert re.fullmatch(r"[\w%.~-]+", asked, re.ASCII)
    assert unquote(asked) == name.encode(errors="backslashreplace").decode()


def test_a_pool_that_refuses_is_not_said_to_take_jobs() -> None:
    told = [
        render_fragments(picture(pool(ready=ready, refuses=refuses)))["p0-verdict"]
        for ready, refuses in [(True, False), (True, True), (False, False)]
    ]
    assert ["takes jobs" in html for html in told] == [True, False, False]
    assert ["refuses jobs" in html for html in told] == [False, True, False]


def test_events_that_were_lost_are_not_said_to_be_failed_jobs() -> None:
    failed = (FailureCount(type="OSError", count=2, last=NOW),)
    shown = pool(events_lost=7, failures=failed)
    html = render_fragments(picture(shown))["p0-failures"]
    assert "7 events lost: failures may be missing here." in html
    assert html.count("<tr") == 2
    html = render_fragments(picture(pool(events_lost=1)))["p0-failures"]
    assert "1 event lost" in html
    assert "No job has failed." not in html


def test_controls_and_scrolled_tables_are_outside_of_what_is_replaced() -> None:
    for html in render_fragments(picture()).values():
        tags = {tag for tag, _ in Reader(html).elements}
        assert not tags & {"form", "input", "button", "a", "caption", "thead"}
        assert "tabindex" not in html


def test_tables_have_captions_and_headers_with_scope() -> None:
    page = read(hostile("x"))
    tags = [tag for tag, _ in page.elements]
    assert tags.count("caption") == 6
    headers = [found for tag, found in page.elements if tag == "th"]
    assert all(found.get("scope") in ("row", "col") for found in headers)


def test_rows_have_as_many_cells_as_their_table_has_columns() -> None:
    page = render_page(picture(hostile("x")), True)
    for table in re.findall(r"<caption>.*?</table>", page, re.DOTALL):
        head, *rows = re.findall(r"<tr.*?</tr>", table, re.DOTALL)
        for row in rows:
            cells = len(re.findall(r"<t[hd]", row))
            assert cells == head.count("<th ") or "colspan" in row


def test_a_small_pool_shows_its_workers_by_id_but_those_in_trouble_first() -> None:
    rows = [
        worker(3, age=9.0),
        worker(1, state="idle", job=None, age=None),
        worker(2, state="restarting", job=None, age=None),
    ]
    assert [row.id for row in choose_workers(rows)] == [2, 1, 3]


def test_of_many_workers_those_that_matter_are_shown_and_the_rest_counted() -> None:
    idle = [worker(i, state="idle", job=None, age=None) for i in range(250)]
    old = [worker(i, age=float(i)) for i in range(250, 300)]
    sick = worker(300, state="restarting", job=None, age=None)
    shown = choose_workers([*idle, *old, sick])
    assert len(shown) == ROWS
    assert [row.id for row in shown[:3]] == [300, 299, 298]
    fragments = render_fragments(picture(pool(workers=(*idle, *old, sick))))
    assert "201 are not" in fragments["p0-summary"]
    assert fragments["p0-workers"].count("<tr") == ROWS


def test_a_slow_job_is_measured_against_what_is_usual() -> None:
    slowest = (worker(1, age=0.5), worker(2, age=0.05), worker(3, age=0.01))
    html = render_fragments(picture(pool(slowest=slowest)))["p0-slowest"]
    assert re.findall(r"[\d.]+\u00d7", html) == ["25\u00d7", "2.5\u00d7"]


def test_failures_stand_out_and_zeros_do_not() -> None:
    html = render_fragments(picture(pool(failed=3)))["p0-ends"]
    assert '<div class="bad"><dt>failed</dt><dd>3</dd></div>' in html
    assert '<div class="zero"><dt>lost</dt><dd>0</dd></div>' in html


def test_workers_that_are_missing_stand_out() -> None:
    html = render_fragments(picture(pool(workers_up=3)))["p0-busy"]
    assert '<strong class="bad">3 of 4 workers up</strong>' in html


@pytest.mark.parametrize("bound", [math.inf, 0, 5])
def test_any_backlog_can_be_shown(bound: float) -> None:
    html = render_fragments(picture(pool(max_backlog=bound, queued=5)))["p0-queue"]
    assert f"backlog {figures.count(bound)}" in html
    assert ('class="full"' in html) == (bound != math.inf)


def test_an_empty_pool_has_words_for_what_it_has_not() -> None:
    empty = Spread(count=0, p50=0, p95=0, p99=0, max=0)
    page = read(pool(size=0, workers=(), wait=empty, run=empty, history=None))
    for words in ("No worker is there.", "No job is running.", "No job has failed."):
        assert words in page.text
