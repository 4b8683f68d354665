"""What chain attention adds to the time that ``torch.compile`` takes, each compilation in a process of its own.

``python -m benchmarks.chain_compile chain inductor`` is such a process.
"""

import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import hf_chainattn  # noqa: F401  makes attn_implementation="chain" known
from benchmarks.fresh import fresh
from benchmarks.registry import Row, target

REPEATS = 3
MODEL = "Llama, 2 layers"


def first_call(implementation: str, backend: str) -> dict[str, float]:
    """Return the seconds of the first call of a compiled model, and how far its logits are from the plain ones.

    A forward pass without gradients, compiled as one graph.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=2,
        hidden_size=64,
        intermediate_size=128,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=256,
        attn_implementation=implementation,
    )
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(config.vocab_size, (2, 96))
    with torch.no_grad():
        plain = model(ids, use_cache=False).logits
        compiled = torch.compile(model, fullgraph=True, backend=backend)
        start = time.perf_counter()
        logits = compiled(ids, use_cache=False).logits
        seconds = time.perf_counter() - start
    return {"seconds": seconds, "relative_error": ((logits - plain).norm() / plain.norm()).item()}


def compile_time() -> Iterator[Row]:
    """Yield the seconds that compiling a model with chain attention takes longer than with sdpa."""
    # inductor writes C++ on a CPU
    backend = "inductor" if shutil.which("g++") or shutil.which("clang++") else "aot_eager"
    seconds: dict[str, list[float]] = {"chain": [], "sdpa": []}
    worst, failure = 0.0, ""
    for _ in range(REPEATS):
        for name, found in seconds.items():
            try:
                result = _compile(name, backend)
            except RuntimeError as error:
                failure = str(error)
                break
            found.append(result["seconds"])
            worst = max(worst, result["relative_error"])
    if not worst <= 1e-5:
        raise AssertionError(f"the compiled model is wrong: relative error {worst:.1e}")
    row: Row = {"model": MODEL, "backend": backend, "relative_error": worst}
    if failure:
        yield {**row, "added_seconds": failure, "target": "<= 5", "verdict": "missed"}
        return
    extra = [a - b for a, b in zip(seconds["chain"], seconds["sdpa"], strict=True)]
    median = statistics.median(extra)
    yield {
        **row,
        "chain_seconds": statistics.median(seconds["chain"]),
        "sdpa_seconds": statistics.median(seconds["sdpa"]),
        "added_seconds": median,
        "range": [min(extra), max(extra)],
        "repeats": REPEATS,
        **target(median, at_most=5),
    }


def _compile(implementation: str, backend: str) -> dict[str, float]:
    """Return ``first_call`` of a process that finds no cache, and compiles in one process like everything else."""
    with tempfile.TemporaryDirectory() as folder:
        nothing_cached = {
            "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",
            "TORCHINDUCTOR_CACHE_DIR": folder,
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
        }
        result: dict[str, float] = fresh(
            "benchmarks.chain_compile", implementation, backend, environment=nothing_cached
        )
    return result


if __name__ == "__main__":
    print(json.dumps(first_call(sys.argv[1], sys.argv[2])))
