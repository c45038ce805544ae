"""A Dask cluster of local processes that no other user of the machine can reach."""

from __future__ import annotations

import logging
from typing import Any

from distributed import Nanny, Scheduler, SpecCluster, Worker
from distributed.security import Security

HOST = "127.0.0.1"


class PrivateScheduler(Scheduler):
    """A scheduler without Dask's HTTP server, which would show the study to every local user."""

    def start_http_server(self, *arguments: Any, **options: Any) -> None:
        """Start nothing."""


class PrivateWorker(Worker):
    """A worker without Dask's HTTP server."""

    def start_http_server(self, *arguments: Any, **options: Any) -> None:
        """Start nothing."""


def local_cluster(workers: int) -> SpecCluster:
    """Start a scheduler in this process and `workers` processes with one thread each.

    Every connection is encrypted and authenticated (TLS) with a new certificate that only these processes have.
    Without it, any local user could run code as the owner of the study.

    Errors: `RuntimeError` where a process ends while it starts.
    """
    common: dict[str, Any] = {"host": HOST, "protocol": "tls://", "security": Security.temporary()}
    worker = {
        "cls": Nanny,
        "options": {
            **common,
            "nthreads": 1,
            "memory_limit": 0,
            "silence_logs": logging.CRITICAL,
            "worker_class": PrivateWorker,
            "dashboard": False,
        },
    }
    return SpecCluster(
        scheduler={"cls": PrivateScheduler, "options": {**common, "port": 0, "dashboard": False}},
        workers=dict.fromkeys(range(workers), worker),
        worker=worker,
        security=common["security"],
        silence_logs=logging.CRITICAL,  # type: ignore[arg-type]  a level is what Dask expects
    )
