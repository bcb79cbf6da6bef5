"""Work ahead of a consumer with threads: JPEG decoding and resizing let go of Python's lock."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

In, Out = TypeVar("In"), TypeVar("Out")


def ahead(
    function: Callable[[In], Out], items: Iterable[In], workers: int, depth: int
) -> Iterator[Out]:
    """map(function, items) in order, computed by threads up to depth items ahead.

    The order, and so every result, is the same for any number of workers.
    """
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque = deque()
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) >= depth:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
