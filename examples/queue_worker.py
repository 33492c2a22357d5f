"""Work off a durable queue, a table of SQLite, with a pool of workers.

    python queue_worker.py --queue /tmp/queue.db --messages 1000

Urgent messages come first. Each is acknowledged when its job has ended: whenever the
program is killed none is lost, as it can be taken again once its lease is over. One
that fails, or kills its worker, too often is put aside. SIGTERM and Ctrl-C stop it in
order: what runs may end within the grace, the rest is given back.
"""

import argparse
import os
import signal
import sqlite3
import tempfile
import time
from contextlib import closing, nullcontext
from typing import Any, NamedTuple

import trio

from trio_pool import JobCancelled, Pool, PoolClosed, PoolConfig, open_pool

ATTEMPTS = 3
TAKES = 10  # that often it was taken, and never ended: it kills whoever takes it
PAUSE = 0.1  # seconds until a message that failed is tried again
TABLE = """CREATE TABLE messages (
  id INTEGER PRIMARY KEY, body TEXT NOT NULL, priority INTEGER NOT NULL,
  attempts INTEGER NOT NULL DEFAULT 0, due REAL NOT NULL DEFAULT 0,
  state TEXT NOT NULL DEFAULT 'open', note TEXT)"""
TAKE = """UPDATE messages SET attempts = attempts + 1, due = ? WHERE id = (
  SELECT id FROM messages WHERE state = 'open' AND due <= ?
  ORDER BY priority DESC, id LIMIT 1) RETURNING id, body, priority, attempts"""
# Nothing is changed once the lease is over and somebody else has the message.
END = "UPDATE messages SET state = ?, note = ? WHERE id = ? AND attempts = ?"
GIVE_BACK = "UPDATE messages SET attempts = ?, due = ? WHERE id = ? AND attempts = ?"


class Message(NamedTuple):
    id: int
    body: str
    priority: int
    attempts: int


class Queue:
    def __init__(self, file: sqlite3.Connection, lease: float) -> None:
        self.file, self.lease = file, lease
        self.thread = trio.CapacityLimiter(1)

    def fill(self, number: int) -> None:
        """Make messages, all or none, unless that was done before."""
        # Who looks at the queue is in nobody's way.
        self.file.execute("PRAGMA journal_mode = WAL")
        self.file.execute("BEGIN IMMEDIATE")
        if not self.file.execute("SELECT 1 FROM sqlite_master").fetchone():
            self.file.execute(TABLE)
            self.file.execute(
                "CREATE INDEX turn ON messages (state, priority DESC, id)"
            )
            for n in range(number):
                row = ("spoilt", 1) if n % 25 == 7 else (f"mail {n}", -(n % 2))
                insert = "INSERT INTO messages (body, priority) VALUES (?, ?)"
                self.file.execute(insert, row)
        self.file.execute("COMMIT")

    async def run(self, statement: str, *values: Any) -> list[Any]:
        """Run one statement, which is one transaction, to its end."""

        def run() -> list[Any]:
            return self.file.execute(statement, values).fetchall()

        return await trio.to_thread.run_sync(run, limiter=self.thread)

    async def take(self) -> Message | None:
        """Take the most urgent one; that counts as an attempt, as it may kill us."""
        now = time.time()
        rows = await self.run(TAKE, now + self.lease, now)
        return Message(*rows[0]) if rows else None

    async def end(self, message: Message, state: str, note: str) -> None:
        await self.run(END, state, note, message.id, message.attempts)

    async def give_back(self, message: Message, attempts: int, wait: float) -> None:
        due = time.time() + wait
        await self.run(GIVE_BACK, attempts, due, message.id, message.attempts)

    async def count(self, state: str) -> int:
        asked = "SELECT count(*) FROM messages WHERE state = ?"
        return int((await self.run(asked, state))[0][0])


async def send(message: Message) -> str:
    """Do the work; some of it works the second time, some never."""
    await trio.sleep(0.01)
    if message.body == "spoilt":
        raise ValueError("nobody can read this")
    if message.id % 10 == 0 and message.attempts == 1:
        raise ConnectionError("try again")
    return f"sent {message.body}"


async def carry(queue: Queue, pool: Pool[Message, str]) -> None:
    """Bring messages to the pool, one after the other, until none is left."""
    while not pool.closed:
        message = await queue.take()
        if message is not None:
            await deliver(queue, pool, message)
        elif await queue.count("open"):
            await trio.sleep(PAUSE / 2)
        else:
            break


async def deliver(queue: Queue, pool: Pool[Message, str], message: Message) -> None:
    if message.attempts > TAKES:
        await queue.end(message, "aside", "killed its worker")
        return
    try:
        note = await pool.process(message, priority=message.priority)
    except (JobCancelled, PoolClosed):
        # It is not to blame.
        await queue.give_back(message, message.attempts - 1, 0)
    except Exception as error:
        if message.attempts < ATTEMPTS:
            await queue.give_back(message, message.attempts, PAUSE)
        else:
            await queue.end(message, "aside", repr(error))
    else:
        await queue.end(message, "done", note)


async def stop_on_signals(pool: Pool[Message, str], grace: float) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with trio.open_nursery() as nursery:
            await anext(signals)
            nursery.start_soon(pool.shutdown, grace)
            await anext(signals)
            pool.cancel()


async def work(queue: Queue, args: argparse.Namespace) -> int:
    """Work until nothing is left or a signal comes; say how many attempts failed."""
    # Nothing waits in the pool: there is a worker for each carrier.
    limits = PoolConfig(size=args.workers, max_backlog=0, timeout=args.timeout)
    async with open_pool(limits, send) as pool, trio.open_nursery() as stopper:
        stopper.start_soon(stop_on_signals, pool, args.grace)
        async with trio.open_nursery() as carriers:
            for _ in range(args.workers):
                carriers.start_soon(carry, queue, pool)
        stopper.cancel_scope.cancel()
    return pool.statistics().failed


async def main(path: str, args: argparse.Namespace) -> None:
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    with closing(connection) as file:
        # The lease is for as long as a message may be with us.
        queue = Queue(file, lease=4 * args.timeout)
        queue.fill(args.messages)
        failed = await work(queue, args)
        for state in ("done", "aside", "open"):
            print(f"{await queue.count(state)} {state}", end=", ")
        print(f"{failed} attempts failed")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--queue", help="the file; default: one for this run alone")
    parser.add_argument("--messages", type=int, default=100, help="in a new queue")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--timeout", type=float, default=5.0, help="seconds of a job")
    parser.add_argument(
        "--grace", type=float, default=5.0, help="seconds, once stopped"
    )
    args = parser.parse_args()
    own = tempfile.TemporaryDirectory() if args.queue is None else nullcontext("")
    with own as folder:
        trio.run(main, args.queue or os.path.join(folder, "queue.db"), args)
