"""Ways to time a call that a CPU launches and a GPU executes. A sampler returns microseconds a call."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

Sampler = Callable[[], float]
Call = Callable[[int], object]

# A replayed graph should take about this long, so that an event's resolution (0.5 us) and a launch do not show.
GRAPH_US = 2000.0
MOST_CALLS = 400
# The GPU sleeps this many cycles, some 0.3 ms, while the CPU launches the timed calls.
SLEEP_CYCLES = 500_000


class HostSampler:
    """The CPU's clock around one call."""

    def __init__(self, call: Call) -> None:
        self.call, self.turn = call, 0

    def __call__(self) -> float:
        start = time.perf_counter()
        self.call(self.turn)
        self.turn += 1
        return (time.perf_counter() - start) * 1e6


class EventSampler:
    """CUDA events around one call, after a read of more bytes than any cache holds.

    They are read, not written: dirty lines would have to leave the cache during the call. The GPU waits before the
    first event until the CPU, which may take longer than the kernel, has launched everything.
    """

    def __init__(self, call: Call, flushed_bytes: int) -> None:
        self.call, self.turn = call, 0
        self.buffer = torch.ones(flushed_bytes // 4, device="cuda")
        self.events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        for turn in range(3):
            call(turn)
        torch.cuda.synchronize()

    def __call__(self) -> float:
        torch.cuda._sleep(SLEEP_CYCLES)
        self.buffer.sum()
        self.events[0].record()
        self.call(self.turn)
        self.events[1].record()
        self.turn += 1
        torch.cuda.synchronize()
        return self.events[0].elapsed_time(self.events[1]) * 1e3


class GraphSampler:
    """CUDA events around the replay of a graph of many calls that rotate through their inputs.

    Raises:
        RuntimeError: the call synchronises, or does something else that cannot be captured.
    """

    def __init__(self, call: Call, turns: int) -> None:
        self.events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        # torch's advice before a capture: a warm-up on another stream than the default one
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for turn in range(3):
                call(turn)
        torch.cuda.synchronize()
        # timed by a replay and not by the calls, because the CPU may launch them more slowly than the GPU runs them
        self._capture(call, turns)
        once = self() * self.calls
        self._capture(call, min(MOST_CALLS, turns * max(1, round(GRAPH_US / max(once, 1.0)))))

    def _capture(self, call: Call, calls: int) -> None:
        self.calls, self.graph = calls, torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            for turn in range(calls):
                call(turn)
        self.graph.replay()
        torch.cuda.synchronize()

    def __call__(self) -> float:
        torch.cuda._sleep(SLEEP_CYCLES)
        self.events[0].record()
        self.graph.replay()
        self.events[1].record()
        torch.cuda.synchronize()
        return self.events[0].elapsed_time(self.events[1]) * 1e3 / self.calls
