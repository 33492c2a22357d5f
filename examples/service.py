"""An HTTP service whose requests are jobs of a pool, with a page, health and metrics.

    pip install trio-pool[web,process]
    python service.py --bind 127.0.0.1:8000
    curl http://127.0.0.1:8000/factors/600851475143

Each number is factored in a process of its own pool of workers, under the deadline of
its request: who waits no longer than a second says so by the header ``X-Timeout: 1``,
and what is late is killed. Where too many wait already the answer is 503. The page is
at ``/``; ``/health``, ``/ready`` and ``/metrics`` are beside it. On SIGTERM ``/ready``
turns to 503, what was accepted is finished within POOL_GRACE seconds, and the exit
code is 0.

In a container (no shell between, so the signal reaches Python):

    FROM python:3.13-slim
    RUN pip install trio-pool[web,process]
    COPY service.py .
    USER nobody
    ENV POOL_SIZE=4 POOL_MAX_BACKLOG=32 POOL_GRACE=20
    CMD ["python", "service.py", "--bind", "0.0.0.0:8000", "--liveness", "0.0.0.0:8001"]

In Kubernetes. Only known hosts are answered: the probes ask for the pod by its
address, and others for the service by its names. The liveness endpoint is a thread,
which answers though the loop is blocked, and tells the line that blocks it. The grace
is shorter than the pod's:

    apiVersion: apps/v1
    kind: Deployment
    metadata: {name: factors}
    spec:
      replicas: 2
      selector: {matchLabels: {app: factors}}
      template:
        metadata:
          labels: {app: factors}
          annotations: {prometheus.io/scrape: "true", prometheus.io/port: "8000"}
        spec:
          terminationGracePeriodSeconds: 30
          containers:
          - name: factors
            image: factors
            ports: [{containerPort: 8000}, {containerPort: 8001}]
            env:
            - name: POD_IP
              valueFrom: {fieldRef: {fieldPath: status.podIP}}
            - {name: SERVICE_HOSTS, value: "factors factors.default.svc.cluster.local"}
            - {name: POOL_GRACE, value: "20"}
            readinessProbe: {httpGet: {path: /ready, port: 8000}, periodSeconds: 2}
            livenessProbe: {httpGet: {path: /health, port: 8001}, periodSeconds: 5}
"""

import argparse
import logging
import os

import trio
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from trio_pool import (
    BacklogFull,
    JobCancelled,
    Pool,
    PoolClosed,
    PoolConfig,
    WorkerCrashed,
    open_pool,
)
from trio_pool.logs import PoolLog
from trio_pool.offload import in_process
from trio_pool.web import drain_on_signal, serve_dashboard

PATIENCE = 10.0  # seconds that a request may take, unless it says less
LATER = {"Retry-After": "1"}


def factor(number: int) -> list[int]:
    """Find the prime factors, in a process; this may take for ever."""
    factors, candidate = [], 2
    while candidate * candidate <= number:
        while number % candidate == 0:
            factors.append(candidate)
            number //= candidate
        candidate += 1
    return [*factors, number] if number > 1 else factors


def make_app(pool: Pool[int, list[int]]) -> Starlette:
    async def factors(request: Request) -> JSONResponse:
        try:
            number = int(request.path_params["number"])
            patience = float(request.headers.get("x-timeout", PATIENCE))
        except ValueError as error:
            return JSONResponse({"error": str(error)}, 400)
        try:
            with trio.fail_after(min(PATIENCE, max(0.0, patience))):
                return JSONResponse(await pool.process(number))
        except trio.TooSlowError:  # its own deadline, or the timeout of the pool
            return JSONResponse({"error": "it took too long"}, 504)
        except (BacklogFull, PoolClosed, JobCancelled) as error:
            return JSONResponse({"error": str(error)}, 503, LATER)
        except WorkerCrashed as error:
            return JSONResponse({"error": str(error)}, 500)

    return Starlette(routes=[Route("/factors/{number}", factors)])


async def main(bind: str, liveness: str | None, config: PoolConfig) -> None:
    names = (os.environ.get(name, "") for name in ("POD_IP", "SERVICE_HOSTS"))
    token = os.environ.get("DASHBOARD_TOKEN")  # with it the page can pause and resize
    pool_of_factors = open_pool(
        config,
        worker=in_process(factor),
        name="factors",
        overflow="reject",
        plugins=[PoolLog()],
    )
    async with pool_of_factors as pool:
        async with serve_dashboard(
            pool,
            app=make_app(pool),
            bind=bind,
            liveness=liveness,
            hosts=" ".join(names).split(),
            token=token,
            describe=str,  # numbers are no secrets
        ) as dashboard:
            print("at", *dashboard.urls, dashboard.liveness or "", flush=True)
            (report,) = await drain_on_signal(pool)
    print(f"at the end: {report.done} done, {report.cancelled} cancelled")


if __name__ == "__main__":  # processes import the program
    parser = argparse.ArgumentParser(description="Factor numbers over HTTP.")
    parser.add_argument("--bind", default="127.0.0.1:8000", metavar="ADDRESS:PORT")
    parser.add_argument("--liveness", metavar="ADDRESS:PORT")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    trio.run(main, options.bind, options.liveness, PoolConfig.from_env())
