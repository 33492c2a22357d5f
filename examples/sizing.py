"""Find out how many workers keep a promise, and how many jobs may have to wait.

    python sizing.py --rate 60 --p50 0.1 --p99 0.6 --promise 0.75

The load is simulated: `rate` jobs a second, half of which take no more than `p50`
seconds, and 99 of 100 no more than `p99`. The promise is that 99 of 100 callers have
their result within so many seconds. Then the backlog is made as short as it may be
for at most one job in a thousand to be turned away.
"""

import argparse
import itertools
import math
import sys

from trio_pool.testing import LogNormal, Poisson, SimulationReport, simulate

HEADS = "workers", "backlog", "busy", "waited", "rejected", "p99 wait", "p99 total"
TURNED_AWAY = 0.001


def show(workers: int, backlog: float, report: SimulationReport) -> None:
    rejected = report.rejected / report.offered
    print(
        f"{workers:>10}{backlog:>10}{report.utilisation:>10.0%}{report.waited:>10.0%}"
        f"{rejected:>10.2%}{report.wait.p99:>8.2f} s{report.total.p99:>8.2f} s"
    )


def find_workers(service: LogNormal, load: Poisson, jobs: int, promise: float) -> int:
    # With fewer the work comes in faster than it is done.
    for workers in itertools.count(math.floor(load.rate * service.mean) + 1):
        report = simulate(service, load, workers, jobs=jobs, max_backlog=math.inf)
        show(workers, math.inf, report)
        if report.run.p99 > promise:
            sys.exit("no number of workers keeps the promise: the jobs take too long")
        if report.total.p99 <= promise:
            break
    return workers


def find_backlog(service: LogNormal, load: Poisson, jobs: int, workers: int) -> int:
    backlog = 1
    while True:
        report = simulate(
            *(service, load, workers), jobs=jobs, max_backlog=backlog, overflow="reject"
        )
        show(workers, backlog, report)
        if report.rejected <= TURNED_AWAY * report.offered:
            return backlog
        backlog *= 2


def main() -> None:
    parser = argparse.ArgumentParser(description="Find the size of a pool.")
    parser.add_argument("--rate", type=float, default=60.0)
    parser.add_argument("--p50", type=float, default=0.1)
    parser.add_argument("--p99", type=float, default=0.6)
    parser.add_argument("--promise", type=float, default=0.75)
    parser.add_argument("--jobs", type=int, default=10_000)
    args = parser.parse_args()
    try:
        load = Poisson(args.rate)
        service = LogNormal.from_percentiles(p50=args.p50, p99=args.p99)
    except ValueError as error:
        parser.error(str(error))
    print("".join(f"{head:>10}" for head in HEADS))
    workers = find_workers(service, load, args.jobs, args.promise)
    backlog = find_backlog(service, load, args.jobs, workers)
    print(f"open_pool({workers}, handler, max_backlog={backlog})")


if __name__ == "__main__":
    main()
