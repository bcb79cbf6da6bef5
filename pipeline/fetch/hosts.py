"""Turns at hosts, and what each host may cost: one that is slow must not starve the others.

A host spends seconds of our threads where it fails or is slow, or where its images are slow to
decode, and earns some back with every good answer. Once it has spent its budget, its remaining URLs
are put off for a later run.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.fetch.policy import RETRYABLE, FetchError

BUDGET = 10.0  # time-outs
QUICK_FAILURE = 0.25  # time-outs that a failure costs at least, however quick
EARNED = 0.25  # time-outs that a good and quick answer earns back
SLOW = 0.5  # time-outs from which a good answer counts as slow
SLOW_DECODING_S = 1.0  # from which an image's decoding is its host's cost


class Hosts:
    """Safe to share between threads; lives as long as a worker process, some shards."""

    def __init__(self, per_host: int, timeout_s: float):
        self.per_host, self.timeout_s = per_host, timeout_s
        self.slots: dict[str, threading.Semaphore] = {}
        self.spent: dict[str, float] = {}  # s, less what was earned back
        self.lost: dict[str, float] = {}  # s, in all
        self.lock = threading.Lock()

    def slot(self, host: str) -> threading.Semaphore:
        return self.slots.setdefault(host, threading.Semaphore(self.per_host))

    def require_budget(self, host: str) -> None:
        """Raises FetchError `put_off` where the host has spent what it had."""
        if self.spent.get(host, 0.0) >= BUDGET * self.timeout_s:
            cost = (
                f"{self.lost[host]:.0f} s lost to its failures, slow answers and images in this run"
            )
            raise FetchError("put_off", f"{host}: {cost}", final=True)

    @contextmanager
    def charged(self, host: str) -> Iterator[None]:
        """Around one request: what it took, and how it ended, is put to the host's account."""
        start, failed = time.monotonic(), False
        try:
            yield
        except FetchError as error:
            failed = error.status in RETRYABLE
            raise
        finally:
            self._charge(host, time.monotonic() - start, failed)

    def charge_decoding(self, host: str, seconds: float) -> None:
        """What decoding an image of the host took: meanwhile nothing else is decoded."""
        if seconds >= SLOW_DECODING_S:
            with self.lock:
                self.lost[host] = self.lost.get(host, 0.0) + seconds
                self.spent[host] = self.spent.get(host, 0.0) + seconds

    def _charge(self, host: str, seconds: float, failed: bool) -> None:
        slow = seconds >= SLOW * self.timeout_s
        with self.lock:
            if failed or slow:
                self.lost[host] = self.lost.get(host, 0.0) + seconds
                cost = max(seconds, QUICK_FAILURE * self.timeout_s) if failed else seconds
                self.spent[host] = self.spent.get(host, 0.0) + cost
            elif (left := self.spent.pop(host, 0.0) - EARNED * self.timeout_s) > 0:
                self.spent[host] = left

    def slowest(self, count: int) -> dict[str, float]:
        """The hosts that have cost most, and the seconds that each has."""
        with self.lock:
            dearest = sorted(self.lost.items(), key=lambda item: -item[1])[:count]
        return dict(dearest)
