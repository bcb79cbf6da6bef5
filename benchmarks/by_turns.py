"""Time by turns: whatever slows the machine for a while slows all contestants alike."""

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch


def by_turns(
    measures: Mapping[str, Callable[[], Any]], rounds: int, *, warm_up: bool = False
) -> dict[str, list]:
    """What each measure returned, one value a round; with warm_up, after a round that is not kept."""
    found: dict[str, list] = {name: [] for name in measures}
    for turn in range(rounds + warm_up):
        for name, measure in measures.items():
            value = measure()
            if turn >= warm_up:
                found[name].append(value)
    return found


def seconds(call: Callable[[], object], device: str = "cpu") -> float:
    """How long one call takes, the device's work included."""
    began = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def seconds_by_turns(
    calls: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    warm_up: bool = False,
    device: str = "cpu",
) -> dict[str, list[float]]:
    timed = {name: partial(seconds, call, device) for name, call in calls.items()}
    return by_turns(timed, rounds, warm_up=warm_up)


def median_ratio(numerators: Iterable[float], denominators: Iterable[float]) -> float:
    """The median of the rounds' ratios, which a slow round does not move."""
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))
