"""The few places of the kit that read trio's insides: what its scheduler draws."""

from __future__ import annotations

import itertools
import random
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import trio
from outcome import Error
from trio.testing import MockClock

from .. import _dispatch, _many, _worker

# A worker lets others run after 0.5 ms of real time; each look at it is this long
# where time is virtual, or the steps would depend on the load of the machine.
_LOOK = 1e-5


class _Arrivals(dict[Any, None]):
    """Stands in for a set whose order is that of addresses: each look is drawn."""

    __slots__ = ("_draw",)

    def __init__(self, draw: random.Random) -> None:
        super().__init__()
        self._draw = draw

    def __iter__(self) -> Iterator[Any]:
        members = list(super().__iter__())
        if len(members) > 1:
            self._draw.shuffle(members)
        return iter(members)

    def add(self, member: Any) -> None:
        self[member] = None

    def remove(self, member: Any) -> None:
        del self[member]


@contextmanager
def seeded_scheduler(seed: int, clock: trio.abc.Clock) -> Generator[None, None, None]:
    """Have trio decide all that it leaves to chance by ``seed``, in the block.

    That is the order of the tasks that are runnable at once, of the tasks that
    one cancellation reaches, and of deadlines at the same time. The source of
    the module `random` is seeded too, and with a virtual clock workers do not
    look at the real one. All of it is put back afterwards.
    """
    inside = _insides()
    order, status, deadlines = inside._r, inside.CancelStatus, inside.Deadlines
    draw = random.Random(seed)
    tell_apart = itertools.count()
    make_status = status.__attrs_post_init__

    def make_ordered_status(self: Any) -> None:
        self._children = _Arrivals(draw)
        self._tasks = _Arrivals(draw)
        make_status(self)

    def add_drawn(self: Any, deadline: float, scope: Any) -> None:
        # An int, as are those of a run in another thread.
        place = draw.getrandbits(32) << 64 | next(tell_apart)
        inside.heappush(self._heap, (deadline, place, scope))
        self._active += 1

    modules: tuple[Any, ...] = (_dispatch, _many, _worker)
    look = modules[0].perf_counter
    looks = (number * _LOOK for number in itertools.count())
    is_virtual = isinstance(clock, MockClock)

    saved = order.getstate(), random.getstate()
    flag, add = inside._ALLOW_DETERMINISTIC_SCHEDULING, deadlines.add
    try:
        inside._ALLOW_DETERMINISTIC_SCHEDULING = True
        status.__attrs_post_init__ = make_ordered_status
        deadlines.add = add_drawn
        order.seed(seed)
        random.seed(seed)
        for module in modules:
            module.perf_counter = looks.__next__ if is_virtual else look
        yield
    finally:
        for module in modules:
            module.perf_counter = look
        inside._ALLOW_DETERMINISTIC_SCHEDULING = flag
        status.__attrs_post_init__ = make_status
        deadlines.add = add
        order.setstate(saved[0])
        random.setstate(saved[1])


def reseed(seed: int) -> None:
    """Draw the order of tasks by ``seed`` from here on, in a seeded scheduler."""
    _insides()._r.seed(seed)


@contextmanager
def seeded_order(seed: str) -> Generator[None]:
    """Seed what trio draws from to order tasks that are ready at the same time.

    It costs the block nothing, and is enough where events come one at a time: it
    matters only where one wakes several tasks. In a trio that draws elsewhere
    their order is left to chance.
    """
    order = getattr(sys.modules.get("trio._core._run"), "_r", None)
    if not isinstance(order, random.Random):
        yield
        return
    before = order.getstate()
    order.seed(seed)
    try:
        yield
    finally:
        order.setstate(before)


def is_inside(scope: trio.CancelScope) -> bool:
    """Say whether some task is inside of a scope just now."""
    # Where trio has changed, a scope counts as entered all the time, which only
    # costs some schedules that make no difference.
    return getattr(scope, "_cancel_status", scope) is not None


def throw(task: trio.lowlevel.Task, error: BaseException) -> None:
    """Raise an error in a task, whatever it waits for; a shield does not stop it."""
    try:
        trio.lowlevel.reschedule(task, Error(error))
    except AssertionError:
        # It has its turn already, as one that swallows each cancellation has
        # all the time: change what it will hear.
        insides: Any = task
        insides._next_send_fn = task.coro.throw
        insides._next_send = error


def _insides() -> Any:
    """Return trio's scheduler module, or say that it is not the one we know."""
    expected: dict[str, Callable[[Any], bool]] = {
        "_r": lambda found: isinstance(found, random.Random),
        "_ALLOW_DETERMINISTIC_SCHEDULING": lambda found: isinstance(found, bool),
        "heappush": callable,
        "CancelStatus": lambda found: (
            hasattr(found, "__attrs_post_init__")
            and {"_tasks", "_children"} <= set(dir(found))
        ),
        "Deadlines": lambda found: {"add", "_heap", "_active"} <= set(dir(found)),
        "Task": lambda found: hasattr(found, "_counter"),
    }
    try:
        inside: Any = import_module("trio._core._run")
    except ImportError:
        inside = None
    for name, is_known in expected.items():
        if not is_known(getattr(inside, name, None)):
            raise RuntimeError(
                f"trio {trio.__version__} orders its tasks in another way than trio "
                f"0.31 to 0.35 ({name} of its scheduler has changed), so no order "
                "can be chosen; please report it to trio_pool"
            )
    return inside
