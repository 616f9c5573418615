"""Work ahead of the model: images are read and resized in threads while it computes."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

MOST_THREADS = 8


def ahead(work: Callable[[T], R], items: Iterable[T], *, number: int) -> Iterator[R]:
    """Apply a function to items in threads, and yield the results in the items' order.

    Args:
        work: may be called in any thread. Its exceptions are raised when their result is asked for.
        items: read only as far as needed.
        number: of results that may be waiting: memory does not grow with the number of items.
    """
    threads = max(1, min(MOST_THREADS, len(os.sched_getaffinity(0)), number))
    waiting: deque[Future[R]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for item in items:
                if len(waiting) >= number:
                    yield waiting.popleft().result()
                waiting.append(pool.submit(work, item))
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
