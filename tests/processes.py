"""Several processes on one machine, as torchrun describes them, forked so that they start at once."""

import os
import socket
import sys
import traceback
from collections.abc import Callable

import torch


def run_together(count: int, work: Callable[[int], None]) -> list[int]:
    """Call `work` with its number in `count` forked processes and give their exit statuses."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    sys.stdout.flush()
    sys.stderr.flush()
    children = []
    for rank in range(count):
        child = os.fork()
        if child == 0:
            os.environ |= {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(count),
                "MASTER_ADDR": "localhost",
                "MASTER_PORT": str(port),
                "TORCHELASTIC_RUN_ID": "test",
            }
            _work(work, rank)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def _work(work: Callable[[int], None], rank: int) -> None:
    status = 1
    try:
        torch.set_num_threads(1)  # threads of OpenMP do not survive a fork
        work(rank)
        status = 0
    except SystemExit as stop:
        status = int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
