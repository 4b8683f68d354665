"""A small model with chain attention held against its own eager attention, without and with an inverse in it."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedConfig, PreTrainedModel

from benchmarks.families.oracle import Softmaxes, Walks
from benchmarks.families.run import Batch, outputs, relative, switched
from hf_chainattn import ChainAttentionError, integration

# relative errors that are those of rounding
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
# how much of it the walk must change: else nothing is proven
FELT = 1e-3
# tokens that are given at once, and then to a cache
CHUNKS = (6, 1, 1, 2)
PAST = ("input_ids", "attention_mask", "decoder_input_ids", "input_features")


class Wrong(Exception):
    """A model that is silently something else than chain attention, or fails without saying why."""


class Compared(NamedTuple):
    """Errors of one request with one batch; see ``Finding``.

    Args:
        layers: Self-attentions with eager attention.
        chains: Those that are chains.
        keys: The parts that were asked for and have some of them.
    """

    layers: int
    chains: int
    keys: list[str]
    gamma_0: float
    sdpa: float | None
    gamma_9: float
    difference: float


def compare(
    model: PreTrainedModel, batch: Batch, padding: str, request: str | dict[str, str], gamma: float
) -> Compared:
    """Return how far a model with chain attention is from eager attention.

    Raises:
        Wrong: If it is too far, or if not exactly what was asked for is a chain.
        ChainAttentionError: If the model is refused.
    """
    ordinary = Softmaxes()
    eager = real(outputs(model, batch, ordinary), batch, padding)
    with switched(model, 0.0, request):
        zero = real(outputs(model, batch), batch, padding)
    remaining = Softmaxes()
    with switched(model, gamma, request), _counted(remaining) as chains:
        walked = real(outputs(model, batch, remaining), batch, padding)
        modules = {module for module in model.modules() if _chains(getattr(module, "config", None))}
        owners = {found.module: _config_of(model, found.module) for found in remaining.found}
        keys = _keys(model, request, chains)
        silent = [type(module).__name__ for module, config in owners.items() if _chains(config)]
    walks = Walks(gamma, modules)
    with walks.in_the_eager_path():
        expected = real(outputs(model, batch), batch, padding)
    if silent:
        raise Wrong(f"self-attention in {silent} was asked for and is no chain")
    if not (len(chains) == walks.count and len(chains) + len(remaining.found) == len(ordinary.found)):
        raise Wrong(
            f"of {len(ordinary.found)} self-attentions {len(chains)} are chains, {walks.count} go through the "
            f"interface, and {len(remaining.found)} are ordinary"
        )
    errors = {"gamma 0": relative(zero, eager), f"gamma {gamma}": relative(walked, expected)}
    for name, error in errors.items():
        if not error <= TOLERANCE[model.dtype]:
            raise Wrong(f"at {name} it is off by {error:.1e}, padding {padding}, inputs {list(batch)}")
    difference = relative(walked, zero)
    if chains and not difference >= max(FELT, 10 * TOLERANCE[model.dtype]):
        raise Wrong(f"gamma is not felt: {difference:.1e}, padding {padding}")
    sdpa = _sdpa(model, batch)
    off = None if sdpa is None else relative(zero, real(sdpa, batch, padding))
    return Compared(len(ordinary.found), len(chains), keys, errors["gamma 0"], off, errors[f"gamma {gamma}"], difference)


def compare_decoder_alone(model: PreTrainedModel, batch: Batch, gamma: float) -> None:
    """Raise unless without ``encoder=True`` exactly the self-attentions over decoded tokens are chains."""
    tokens = batch["decoder_input_ids"].shape[1]
    ordinary = Softmaxes()
    outputs(model, batch, ordinary)
    layers = sum(found.tokens == tokens for found in ordinary.found)
    unseen = Softmaxes()
    with switched(model, gamma, "chain", encoder=False), _counted(unseen) as chains:
        walked = outputs(model, batch, unseen)
    walks = Walks(gamma, set(model.modules()), tokens)
    with walks.in_the_eager_path():
        expected = outputs(model, batch)
    if not len(chains) == walks.count == layers:
        raise Wrong(f"the decoder has {layers} self-attentions, of which {len(chains)} are chains")
    if not (error := relative(walked, expected)) <= TOLERANCE[model.dtype]:
        raise Wrong(f"with an ordinary encoder the decoder is off by {error:.1e}")


def compare_cached(model: PreTrainedModel, batch: Batch, request: str | dict[str, str], gamma: float) -> str:
    """Return what comes of the same tokens given in chunks, with a cache.

    Returns:
        ``"exact"``, the sentence of a refusal, or nothing where ordinary attention gives something else in chunks too.

    Raises:
        Wrong: If chain attention does.
    """
    name = "decoder_input_ids" if "decoder_input_ids" in batch else "input_ids"
    if name not in batch or set(batch) - set(PAST):
        return ""
    try:
        if not relative([_in_chunks(model, batch, name)], [outputs(model, batch)[0]]) <= TOLERANCE[model.dtype]:
            return ""
    except Exception:
        # a model without a cache, or one that takes no chunks
        return ""
    with switched(model, gamma, request):
        whole = outputs(model, batch)[0]
        try:
            error = relative([_in_chunks(model, batch, name)], [whole])
        except ChainAttentionError as refusal:
            return str(refusal)
    if not error <= TOLERANCE[model.dtype]:
        raise Wrong(f"with a cache it is off by {error:.1e}")
    return "exact"


@torch.no_grad()
def _in_chunks(model: PreTrainedModel, batch: Batch, name: str) -> Tensor:
    cache, parts, start, tokens = None, [], 0, batch[name].shape[1]
    for size in CHUNKS:
        if start == tokens:
            break
        stop = min(start + size, tokens)
        now = batch | {name: batch[name][:, start:stop]}
        if name == "input_ids" and "attention_mask" in batch:
            now["attention_mask"] = batch["attention_mask"][:, :stop]
        torch.manual_seed(0)
        with Softmaxes():
            result = model(**now, past_key_values=cache, use_cache=True)
        cache, start = result.past_key_values, stop
        if not isinstance(cache, Cache):
            raise TypeError("no cache")
        parts.append(result[0])
    return torch.cat(parts, 1)


def padding_leaks(model: PreTrainedModel, batch: Batch) -> bool:
    """Return whether the outputs of tokens feel what stands in the padding, with eager attention."""
    if "input_ids" not in batch or batch["attention_mask"].shape != batch["input_ids"].shape:
        return False
    hidden = batch["attention_mask"] == 0
    other = torch.where(hidden, (batch["input_ids"] + 7) % 90, batch["input_ids"])
    first, second = (real(outputs(model, batch | {"input_ids": ids}), batch, "some") for ids in (batch["input_ids"], other))
    return not first or not relative(first, second) <= 1e-9


def real(tensors: list[Tensor], batch: Batch, padding: str) -> list[Tensor]:
    """Return the outputs of tokens that are not padding; without padding everything.

    Nothing of a text in which other numbers of outputs than of tokens come out: which are padding is not known there.
    """
    if padding == "none" or "decoder_input_ids" in batch:
        return tensors
    mask = batch["attention_mask"].bool()
    found = [tensor[mask] for tensor in tensors if tensor.shape[:2] == mask.shape]
    return found if "input_ids" in batch else tensors


@contextlib.contextmanager
def _counted(softmaxes: Softmaxes) -> Iterator[list[nn.Module | None]]:
    """Note the modules that call chain attention, whose own softmaxes are not to be seen."""
    chains: list[nn.Module | None] = []

    def counting(function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
            chains.append(softmaxes.module)
            with softmaxes.paused():
                return function(*args, **kwargs)

        return counted

    with (
        mock.patch.object(integration, "chain_attention", counting(integration.chain_attention)),
        mock.patch.object(integration, "attend_with_cache", counting(integration.attend_with_cache)),
    ):
        yield chains


def _chains(config: object) -> bool:
    return isinstance(config, PreTrainedConfig) and config._attn_implementation == "chain"


def _config_of(model: PreTrainedModel, module: nn.Module | None) -> PreTrainedConfig:
    """Return the config of the innermost module around another that has one."""
    names = {inner: name for name, inner in model.named_modules()}
    path = names.get(module, "") if module is not None else ""
    while path:
        config = getattr(model.get_submodule(path), "config", None)
        if isinstance(config, PreTrainedConfig):
            return config
        path = path.rpartition(".")[0]
    return model.config


def _keys(
    model: PreTrainedModel, request: str | dict[str, str], modules: list[nn.Module | None]
) -> list[str]:
    """Return the parts that were asked for and have chains, "" for the whole."""
    if isinstance(request, str):
        return []
    configs = [_config_of(model, module) for module in modules]
    return [
        key for key in request if key and any(_holds(getattr(model.config, key), config) for config in configs)
    ]


def _holds(config: PreTrainedConfig, other: PreTrainedConfig) -> bool:
    parts = (getattr(config, key, None) for key in config.sub_configs)
    return config is other or any(isinstance(part, PreTrainedConfig) and _holds(part, other) for part in parts)


def _sdpa(model: PreTrainedModel, batch: Batch) -> list[Tensor] | None:
    if not model._supports_sdpa:
        return None
    try:
        model.set_attn_implementation("sdpa")
        return outputs(model, batch)
    except Exception:
        return None
    finally:
        model.set_attn_implementation("eager")
