"""Renders the figures of a pool that are read first: its verdict and its tiles."""

from collections.abc import Iterable

from . import _figures as figures
from ._html import Html, element, join
from ._picture import Light, Picture, PoolPicture, Spread

_WORDS: dict[Light, str] = {
    "green": "All right",
    "amber": "Under pressure",
    "red": "Trouble",
    "off": "Stopped",
}

_DISC = "M12 1a11 11 0 1 0 0 22a11 11 0 1 0 0-22Z"

# Each has a shape of its own, for those who do not see the colours.
_LAMPS: dict[Light, tuple[str, str]] = {
    "green": (_DISC, "M6.5 12.5L10.5 16.5L17.5 8"),
    "amber": ("M12 1.5L23.5 22H.5Z", "M12 9V14.5M12 18V18.4"),
    "red": ("M7.5 1H16.5L23 7.5V16.5L16.5 23H7.5L1 16.5V7.5Z", "M8 8L16 16M16 8L8 16"),
    "off": (_DISC, "M7 12H17"),
}

_INKS: dict[Light, str] = {
    "green": "1a7f45",
    "amber": "c77700",
    "red": "c8281e",
    "off": "6b7785",
}


def lamp(light: Light) -> Html:
    """Draw a traffic light as a shape and a colour."""
    shape, inner = _LAMPS[light]
    return element(
        "svg",
        element("path", d=shape, class_="shape"),
        element("path", d=inner, class_="inner"),
        class_=f"lamp {light}",
        viewBox="0 0 24 24",
        width=24,
        height=24,
        role="img",
        aria_label=_WORDS[light],
    )


def icon(light: Light) -> str:
    """Return the address of the page's icon, which holds the whole picture."""
    shape, inner = _LAMPS[light]
    return (
        "data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' "
        f"viewBox='0 0 24 24'%3E%3Cpath fill='%23{_INKS[light]}' d='{shape}'/%3E"
        f"%3Cpath fill='none' stroke='white' stroke-width='3' d='{inner}'/%3E%3C/svg%3E"
    )


def worst(pools: Iterable[PoolPicture]) -> PoolPicture | None:
    """Return the pool that is doing worst, the first of several; None without any."""
    order: tuple[Light, ...] = ("red", "amber", "green", "off")
    return min(pools, key=lambda pool: order.index(pool.light), default=None)


def head_of(sentence: str) -> str:
    """Return the word that a verdict starts with, without its figures."""
    return sentence.partition(":")[0]


def _sentence(pool: PoolPicture) -> Html:
    head, colon, rest = pool.sentence.partition(":")
    return join(element("strong", head), colon, rest)


def overview(pool: PoolPicture) -> Html:
    """Render a pool's line among those of all pools."""
    return element(
        "span",
        lamp(pool.light),
        element("b", pool.name, class_="name"),
        element("span", _sentence(pool), class_="says"),
        class_=f"pool-line {pool.light}",
    )


def verdict(pool: PoolPicture) -> Html:
    """Render how a pool is doing."""
    takes = "refuses jobs" if pool.refuses else "takes jobs"
    facts = [pool.state, takes if pool.ready else "not ready"]
    if pool.breaker is not None:
        facts.append(f"circuit breaker {pool.breaker.replace('_', '-')}")
    return element(
        "div",
        lamp(pool.light),
        element("p", _sentence(pool), class_="sentence"),
        element("p", " \u00b7 ".join(facts), class_="facts"),
        class_=f"verdict {pool.light}",
    )


def announcement(picture: Picture) -> Html:
    """Say how the pools are doing without figures: what is worth reading aloud."""
    told = (f"{pool.name}: {head_of(pool.sentence)}." for pool in picture.pools)
    return join(" ".join(told))


def page_title(pool: PoolPicture | None) -> Html:
    """Render the title of the window, of the pool that is doing worst."""
    if pool is None:
        return join("trio_pool")
    signs: dict[Light, str] = {"green": "\u2713 ", "amber": "! ", "red": "\u2716 "}
    sign = signs.get(pool.light, "")
    return join(f"{sign}{pool.name}: {head_of(pool.sentence)}")


def meter(share: float, label: str, *, bound: bool = False) -> Html:
    """Draw a share of 0 to 1 as a bar; ``bound`` says that the end is not to be met."""
    percent = 100 * min(max(share, 0.0), 1.0)
    level = "some"
    if bound and percent >= 80:
        level = "full" if percent > 99 else "high"
    return element(
        "svg",
        element("rect", width="100%", height="100%", class_="track"),
        element("rect", width=f"{percent:.1f}%", height="100%", class_=level),
        class_="meter",
        width="100%",
        height=8,
        role="img",
        aria_label=f"{label} {figures.share(share)}",
    )


def _big(value: object, unit: object) -> Html:
    return element("p", element("b", value), " ", unit, class_="big")


def _note(*parts: object) -> Html:
    return element("p", *parts, class_="note")


def busy_tile(pool: PoolPicture) -> Html:
    """Render utilisation, and the size against what is wanted."""
    second, minute = pool.busy_share_second, pool.busy_share_minute
    up = f"{figures.count(pool.workers_up)} of {figures.plural(pool.size, 'worker')} up"
    short = pool.workers_up < pool.size
    return join(
        element("h3", "Busy, last second"),
        _big(figures.share(second), ""),
        meter(second, "Busy"),
        _note(element("strong", figures.share(minute)), " in the last minute"),
        _note(element("strong", up, class_="bad") if short else up),
    )


def queue_tile(pool: PoolPicture) -> Html:
    """Render how many jobs wait, and for how long."""
    waiting = pool.queued + pool.delayed
    bound = figures.count(pool.max_backlog)
    full = waiting / pool.max_backlog if pool.max_backlog else float(waiting > 0)
    delayed = f" \u00b7 {figures.count(pool.delayed)} delayed" if pool.delayed else ""
    return join(
        element("h3", "Queue"),
        _big(figures.count(pool.queued), "queued"),
        meter(full, "Backlog", bound=True),
        _note("oldest waits ", element("strong", figures.seconds(pool.oldest_wait)))
        if waiting
        else _note("nothing waits"),
        _note("backlog ", bound, delayed),
    )


def flow_tile(pool: PoolPicture) -> Html:
    """Render how many jobs come and go."""
    return join(
        element("h3", "Throughput"),
        _big(figures.rate(pool.ended_rate), "out"),
        _big(figures.rate(pool.accepted_rate), "in"),
        _note(
            figures.count(pool.accepted),
            " accepted, ",
            figures.count(pool.done),
            " done, ",
            figures.count(pool.running),
            " running",
        ),
    )


def times_tile(pool: PoolPicture) -> Html:
    """Render how long jobs wait and run, side by side."""

    def cells(read: str, tag: Html) -> Html:
        spreads = (pool.wait, pool.run)
        told = (figures.seconds(getattr(s, read)) for s in spreads)
        return join(tag, *(element("td", cell) for cell in told))

    def counted(spread: Spread) -> str:
        return figures.count(spread.count)

    columns = (element("th", name, scope="col") for name in ("Wait", "Run"))
    rows = (
        element("tr", cells(read, element("th", read, scope="row")))
        for read in ("p50", "p95", "p99", "max")
    )
    return join(
        element("h3", "Wait and run, last minute"),
        element(
            "table",
            element("tr", element("td"), *columns),
            *rows,
            class_="times",
        ),
        _note(counted(pool.wait), " waits, ", counted(pool.run), " runs"),
    )


def ends_tile(pool: PoolPicture) -> Html:
    """Render how jobs ended that did not end well."""
    ends = (
        ("failed", pool.failed, True),
        ("timed out", pool.timed_out, True),
        ("lost", pool.lost, True),
        ("dropped", pool.dropped, True),
        ("expired", pool.expired, True),
        ("cancelled", pool.cancelled, False),
        ("retries", pool.retries, False),
        ("restarts", pool.restarts, True),
    )
    return join(
        element("h3", "Failures"),
        element(
            "dl",
            *(
                element(
                    "div",
                    element("dt", label),
                    element("dd", figures.count(number)),
                    class_="zero" if not number else "bad" if bad else None,
                )
                for label, number, bad in ends
            ),
            class_="ends",
        ),
    )


def lag_note(picture: Picture) -> Html:
    """Render how long the event loop was held up."""
    return _note(
        "Held up for at most ",
        element("strong", figures.seconds(picture.lag)),
        " in the last second, ",
        element("strong", figures.seconds(picture.lag_minute)),
        " in the last minute.",
    )
