"""Ratios of time: chain attention over others, over itself with other settings, and on two threads."""

import functools
import statistics
from collections.abc import Callable, Iterator

from benchmarks.chain_cases import ATTENTIONS, PASSES, Attention, Inputs, chain, fits, inputs, threads
from benchmarks.chain_gate import WHOLE, gate, gate_baselines
from benchmarks.registry import Row, alternate, ratio, target

BATCHES = (1, 4, 16)
# the time of short sequences is that of starting small operations
SHORT, LONGER = (64, 128, 256), (512, 1024, 2048, 4096)
# time over that of sdpa; 256 tokens have no target
TARGETS = {
    "forward": {64: 3.2, 128: 2.8, 512: 1.6, 1024: 1.6, 2048: 1.6, 4096: 1.6},
    "forward + backward": {64: 3.5, 128: 2.8, 512: 1.4, 1024: 1.4, 2048: 1.4, 4096: 1.4},
}
# tokens of all sequences from which a round takes so long that three are enough, and the gate has to do as warm-up
LONG = 16 * 4096


def compare(
    case: str, attentions: dict[str, Attention], given: Inputs, *, long: bool = False
) -> dict[str, list[float]]:
    """Return times in seconds of one pass through each way to attend; see ``clock``."""
    return clock({name: functools.partial(PASSES[case], each, *given) for name, each in attentions.items()}, long=long)


def clock(cases: dict[str, Callable[[], object]], *, long: bool = False) -> dict[str, list[float]]:
    """Return times in seconds: up to 30 rounds in about five seconds, at least five, and three where ``long``."""
    if long:
        return alternate(cases, rounds=3, warm=False)
    return alternate(cases, rounds=30, least=5, seconds=5.0)


def time_over_sdpa(lengths: tuple[int, ...]) -> Iterator[Row]:
    """Yield the time of chain attention, eager attention and the naive chain solve over that of sdpa."""
    for batch in BATCHES:
        for tokens in lengths:
            error = gate(batch, tokens)
            if tokens <= WHOLE:
                gate_baselines(tokens)
            for case in PASSES:
                yield {
                    "case": case,
                    "batch": batch,
                    "tokens": tokens,
                    "relative_error": error,
                    **_time(case, batch, tokens),
                }


def _time(case: str, batch: int, tokens: int) -> Row:
    names = list(ATTENTIONS) if fits(batch, tokens) else ["chain", "sdpa"]
    long = batch * tokens >= LONG
    times = compare(case, {name: ATTENTIONS[name] for name in names}, inputs(batch, tokens), long=long)
    others = {
        f"{name}_ratio": ratio(times, name, "sdpa")["ratio"] if name in times else "does not fit"
        for name in ("eager", "naive")
    }
    figures = ratio(times, "chain", "sdpa")
    return {
        **figures,
        "sdpa_milliseconds": 1e3 * statistics.median(times["sdpa"]),
        **others,
        **target(figures["ratio"], at_most=TARGETS[case].get(tokens)),
        "note": "three rounds: one takes long" if long else "",
    }


def removed_over_kept() -> Iterator[Row]:
    """Yield the time with the diagonal removed over that with it kept."""
    case = "forward + backward"
    for tokens in (512, 1024, 2048):
        error = max(gate(1, tokens), gate(1, tokens, "removed"))
        times = compare(case, {"removed": chain("removed"), "kept": chain()}, inputs(1, tokens))
        figures = ratio(times, "removed", "kept")
        row = {"case": case, "tokens": tokens, "relative_error": error, **figures}
        yield {**row, **target(figures["ratio"], at_most=1.25)}


def whole_over_window() -> Iterator[Row]:
    """Yield the time without a window over that with one of 256 tokens."""
    tokens, window = 4096, 256
    error = max(gate(1, tokens), gate(1, tokens, window=window))
    for case in PASSES:
        times = compare(case, {"whole": chain(), "window": chain(window=window)}, inputs(1, tokens))
        figures = ratio(times, "whole", "window")
        row = {"case": case, "tokens": tokens, "window": window, "relative_error": error, **figures}
        yield {**row, **target(figures["ratio"], at_least=4)}


def one_thread_over_two() -> Iterator[Row]:
    """Yield the time of chain attention on one thread over that on two."""
    batch, tokens = 4, 1024
    given = inputs(batch, tokens)
    error = max(gate(batch, tokens), gate(batch, tokens, cores=2))
    for case, work in PASSES.items():

        def on(count: int, work: Callable[..., object] = work) -> None:
            with threads(count):
                work(chain(), *given)

        times = clock({"one": functools.partial(on, 1), "two": functools.partial(on, 2)})
        figures = ratio(times, "one", "two")
        row = {"case": case, "batch": batch, "tokens": tokens, "relative_error": error, **figures}
        yield {**row, **target(figures["ratio"], at_least=1.6)}
