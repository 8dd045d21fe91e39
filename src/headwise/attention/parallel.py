"""Blocks of work on threads of their own, each with its operations unthreaded.

On a CPU this keeps a block's tiles in one core's cache, and no operation waits for another core to finish its share.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch


def in_parallel(work: Callable[[slice], None], blocks: list[slice], workers: int) -> None:
    """Does the work on every block; more than one at a time where there are workers for it."""
    if workers <= 1 or len(blocks) < 2:
        for rows in blocks:
            work(rows)
        return
    inference = torch.is_inference_mode_enabled()
    queue = list(blocks)

    def worker() -> None:
        with torch.inference_mode(inference), torch.no_grad():
            while queue:
                try:
                    rows = queue.pop()  # the last rows see the most keys: longest first
                except IndexError:
                    return
                work(rows)

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for done in [pool(workers).submit(worker) for _ in range(workers)]:
            done.result()
    finally:
        queue.clear()
        torch.set_num_threads(before)


@cache
def pool(workers: int) -> ThreadPoolExecutor:
    """Kept between calls, as a thread's first operations are slow."""
    return ThreadPoolExecutor(workers, "headwise", torch.set_num_threads, (1,))


# Threads don't survive a fork: a child makes its own.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=pool.cache_clear)
