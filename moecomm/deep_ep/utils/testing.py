"""How scripts time a function."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from moecomm.deep_ep.refusals import demand


def _synchronize() -> None:
    if torch.accelerator.current_accelerator() is not None:
        torch.accelerator.synchronize()


def bench(
    fn: Callable[[], Any], num_warmups: int = 50, num_tests: int = 50, post_fn: Callable[[], Any] | None = None
) -> tuple[float, float, float]:
    """Seconds of fn(): mean, smallest and largest, without the first of num_tests calls; post_fn runs in between.

    >>> all(seconds >= 0 for seconds in bench(lambda: None, 1, 3))
    True
    """
    demand(num_tests >= 1, "num_tests is no count", got=num_tests, expected="at least 1")
    for _ in range(num_warmups):
        fn()
    seconds = []
    for _ in range(num_tests):
        _synchronize()
        begin = time.perf_counter()
        fn()
        _synchronize()
        seconds.append(time.perf_counter() - begin)
        if post_fn is not None:
            post_fn()
    seconds = seconds[1:] or seconds
    return sum(seconds) / len(seconds), min(seconds), max(seconds)


def bench_kineto(
    fn: Callable[[], Any],
    kernel_names: str | Sequence[str],
    num_tests: int = 30,
    suppress_kineto_output: bool = False,
    trace_path: str | None = None,
    barrier_comm_profiling: bool = False,
    num_kernels_per_period: int = 1,
) -> Any:
    """Seconds of the kernels (on the CPU: operators) whose names contain the given ones, per call of fn().

    Args:
        kernel_names: one name gives one number, several give a tuple; 0 for a name that does not occur.
        trace_path: file for a Chrome trace. suppress_kineto_output: no effect: nothing is printed.
        barrier_comm_profiling: meet the other ranks before each call.
        num_kernels_per_period: how many kernels of a name a call launches; with more than one each gets its own number.

    >>> bench_kineto(lambda: torch.ones(2) + 1, "aten::add", num_tests=2) > 0
    True
    """
    accelerated = torch.accelerator.current_accelerator() is not None
    kinds = [torch.profiler.ProfilerActivity.CPU]
    kinds += [torch.profiler.ProfilerActivity.CUDA] if accelerated else []
    fn()
    with torch.profiler.profile(activities=kinds, acc_events=True) as profile:
        for _ in range(num_tests):
            if barrier_comm_profiling and torch.distributed.is_initialized():
                torch.distributed.barrier()
            fn()
        _synchronize()
    if trace_path is not None:
        profile.export_chrome_trace(trace_path)
    events = profile.events() or []
    names = (kernel_names,) if isinstance(kernel_names, str) else tuple(kernel_names)
    results: list[Any] = []
    for name in names:
        found = [e for e in events if name in e.name]
        spent = [(e.device_time if accelerated else e.cpu_time) / 1e6 for e in found]
        if num_kernels_per_period > 1:
            periods = [spent[i::num_kernels_per_period] for i in range(num_kernels_per_period)]
            results.append([sum(part) / max(1, len(part)) for part in periods])
        else:
            results.append(sum(spent) / num_tests)
    return results[0] if isinstance(kernel_names, str) else tuple(results)
