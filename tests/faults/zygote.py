"""Starts servers fast: imports everything once, then forks. Each child is a process of its own running nested-serve.

Reads one JSON object a line ({"arguments", "environment", "log"}) and answers with the child's pid. Children die with
their parent, so nothing is left behind when a test run is killed.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys

import nested_runtime.models.hope
import nested_runtime.store.memory
import nested_runtime.store.redis
import nested_runtime.store.sqlite  # noqa: F401 - what a server imports lazily
from server.__main__ import main

PR_SET_PDEATHSIG = 1


def become_server(arguments: list[str], environment: dict[str, str], log: str) -> int:
    """The child: a server that logs to a file."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.environ.update(environment)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for target, source in ((0, nothing), (1, file), (2, file)):
        os.dup2(source, target)
    return main(arguments)


def serve_requests() -> None:
    """Fork a server for every line of standard input."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel buries the children
    if len(os.listdir("/proc/self/task")) != 1:
        raise SystemExit("a process with threads cannot be forked safely; set OMP_NUM_THREADS=1")
    print("ready", flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                status = become_server(order["arguments"], order["environment"], order["log"])
            finally:
                os._exit(status)
        print(pid, flush=True)


if __name__ == "__main__":
    serve_requests()
