"""The one timer, of the tuner and of `bench/`: replays of a captured CUDA graph, the median, inputs that rotate."""

import statistics
from collections.abc import Callable, Sequence

import torch

COLD_BYTES = 192 << 20  # calls rotate over this much data: four times an H100's L2


def copies(bytes_per_call: int) -> int:
    """How many sets of inputs a cold timing rotates over: at most 32, since small problems are bound by their launch, not by memory."""
    return max(2, min(32, COLD_BYTES // max(1, bytes_per_call)))


def microseconds(calls: Sequence[Callable[[], object]], budget_ms: float = 30.0) -> float:
    """The median time of one call, over replays of a graph of all `calls` in order; each should work on inputs of its own."""
    graph = capture(calls)
    times = [replay(graph) for _ in range(rounds(replay(graph), budget_ms))]
    return statistics.median(times) * 1e3 / len(calls)


def capture(calls: Sequence[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    """A graph of all `calls` in order. The first two run before, so that nothing is compiled or chosen inside."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for call in calls:
                call()
    return graph


def rounds(first_ms: float, budget_ms: float) -> int:
    """How many replays to take the median of, if the first took `first_ms`."""
    return max(5, min(50, int(budget_ms / max(first_ms, 1e-3))))


def replay(graph: torch.cuda.CUDAGraph) -> float:
    """Replay once and wait: its milliseconds on the device."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)
