"""Ends connections whose other end reads no more, as nothing else would end them."""

from collections.abc import Iterator

import trio
from hypercorn.trio.tcp_server import TCPServer
from trio.lowlevel import Task

# Hypercorn shields what it sends from cancellation, so a reader that has stopped
# reading would hold the server, and with it the block around it, for ever.


async def cut_off_around(task: Task) -> None:
    """End the connection that a task answers."""
    at: Task | None = task
    while at is not None and not await _cut_off(at):
        nursery = at.parent_nursery
        at = None if nursery is None else nursery.parent_task


async def cut_off_below(task: Task) -> None:
    """End all connections that the tasks below this one serve."""
    for below in list(_descend(task)):
        await _cut_off(below)


def _descend(task: Task) -> Iterator[Task]:
    tasks = [task]
    while tasks:
        found = tasks.pop()
        yield found
        for nursery in found.child_nurseries:
            tasks.extend(nursery.child_tasks)


async def _cut_off(task: Task) -> bool:
    frames = [frame for frame, _ in task.iter_await_frames()]
    for frame in frames:
        server = frame.f_locals.get("self")
        if isinstance(server, TCPServer):
            await trio.aclose_forcefully(server.stream)
            return True
    return False
