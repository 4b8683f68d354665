"""Chain attention in one model class: equal to its own eager attention with an inverse in it, or refused by name."""

import copy
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from benchmarks.families.compare import Wrong, compare, compare_cached, compare_decoder_alone, padding_leaks
from benchmarks.families.inputs import Batch, batches, batches_with_images, padded
from benchmarks.families.run import outputs, relative, switched
from benchmarks.families.small import small_configs, small_models
from hf_chainattn import ChainAttentionError

GAMMA = 0.9
WHOLE = "whole"
AUDIO = ("input_values", "input_features", "audio_values", "waveform")
IMAGES = ("pixel_values", "pixel_values_videos", "hidden_states")
Request = str | dict[str, str]


@dataclass
class Finding:
    """What came out for one model class.

    Args:
        name: Of the class.
        status: ``"checked"``; ``"in part"``, if the whole is refused and a part is not; ``"refused"``; ``"not
            checked"``; or ``"wrong"``.
        reason: Of a refusal, why it was not checked, or what is wrong.
        kind: Of model: decoder, encoder, vision, audio, encoder-decoder, composite or other.
        asked: What was asked for: the whole, and parts by their keys.
        layers: Self-attentions of one forward pass, seen as softmaxes over as many keys as queries.
        dispatched: Those that are chains.
        gamma_0: Largest error at gamma 0 against eager attention, relative, over all inputs.
        sdpa: The same against sdpa, where the model has it.
        gamma_9: The same at gamma 0.9, against the inverse.
        difference: Between gamma 0 and 0.9, the smallest over all inputs.
        dtype: Of the model: float64, or float32 where its code knows no other.
        inputs: Names of what the model was given.
        padding: Which paddings were compared.
        images: Whether texts with images in them were compared too.
        cache: ``"exact"``, a refusal, or empty where there is none or ordinary attention is not exact with it either.
    """

    name: str
    status: str
    reason: str = ""
    kind: str = ""
    asked: list[str] = field(default_factory=list)
    layers: int = 0
    dispatched: int = 0
    gamma_0: float = 0.0
    sdpa: float | None = None
    gamma_9: float = 0.0
    difference: float | None = None
    dtype: str = ""
    inputs: list[str] = field(default_factory=list)
    padding: list[str] = field(default_factory=list)
    images: bool = False
    cache: str = ""


def check(model_type: str, model_class: type[PreTrainedModel]) -> Finding:
    """Return what comes out for a class; whatever happens to it, nothing is raised."""
    name = model_class.__name__
    try:
        model, batch = _running(model_type, model_class)
    except Exception as error:
        refusal = _refusal_unbuilt(model_type, model_class)
        return Finding(name, "not checked", str(error)) if refusal is None else Finding(name, "refused", refusal)
    finding = Finding(name, "checked", kind=kind_of(model, batch), inputs=list(batch))
    finding.dtype = str(model.dtype).removeprefix("torch.")
    try:
        requests = _requests(model, finding)
        _check_construction(model, finding)
        _compare_all(model, batch, requests, finding)
    except ChainAttentionError as error:
        finding.status, finding.reason = "refused", str(error)
    except Wrong as error:
        finding.status, finding.reason = "wrong", str(error)
    except Exception as error:
        finding.status, finding.reason = "wrong", f"{type(error).__name__}: {error}"
    return finding


def kind_of(model: PreTrainedModel, batch: Batch) -> str:
    """Return which kind of model this is: by its config, by what it is given, and by who sees whom."""
    config = model.config
    parts = [key for key in config.sub_configs if isinstance(getattr(config, key, None), PreTrainedConfig)]
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in batch:
        return "encoder-decoder"
    if len(parts) > 1 or (parts and "input_ids" in batch):
        return "composite"
    if any(name in batch for name in AUDIO):
        return "audio"
    if any(name in batch for name in IMAGES[:2]) or "grid_thw" in batch:
        return "vision" if "input_ids" not in batch else "composite"
    if "input_ids" not in batch:
        return "other"
    return "decoder" if _is_causal(model, batch) else "encoder"


def _is_causal(model: PreTrainedModel, batch: Batch) -> bool:
    """Return whether the outputs of earlier tokens do not feel the last one, with eager attention."""
    other = batch["input_ids"].clone()
    other[:, -1] = (other[:, -1] + 1) % 90
    first, second = (outputs(model, batch | {"input_ids": ids})[0] for ids in (batch["input_ids"], other))
    if first.ndim < 3 or first.shape[1] != other.shape[1]:
        return False
    return relative([first[:, :-1]], [second[:, :-1]]) <= 1e-9


def _running(model_type: str, model_class: type[PreTrainedModel]) -> tuple[PreTrainedModel, Batch]:
    """Return the first small model, and what it can be given with finite outputs: in float64, or at least float32."""
    reasons: dict[str, None] = {}
    for dtype in (torch.float64, torch.float32):
        for model in small_models(model_type, model_class):
            found = _first_that_runs(model.to(dtype), _candidates, reasons)
            if found is not None:
                return model, found
    raise ValueError("; ".join(reasons) or "no inputs are known for it")


def _candidates(model: PreTrainedModel) -> Iterator[Batch]:
    yield from batches(model)
    yield from batches_with_images(model)


def _first_that_runs(
    model: PreTrainedModel, makers: Callable[[PreTrainedModel], Any], reasons: dict[str, None]
) -> Batch | None:
    for batch in makers(model):
        try:
            found = outputs(model, batch)
        except Exception as error:
            reasons[f"{', '.join(batch)}: {type(error).__name__}: {error}"] = None
            continue
        if found and all(tensor.isfinite().all() for tensor in found):
            return dict(batch)
        reasons[f"{', '.join(batch)}: eager attention itself gives no finite output"] = None
    return None


def _refusal_unbuilt(model_type: str, model_class: type[PreTrainedModel]) -> str | None:
    """Return the sentence with which the construction of a model is refused, without the memory for its weights."""
    for make in itertools.chain(small_configs(CONFIG_MAPPING[model_type]()), [CONFIG_MAPPING[model_type]]):
        try:
            with torch.device("meta"):
                model_class._from_config(make(), attn_implementation="chain")
        except ChainAttentionError as error:
            return str(error)
        except Exception:
            continue
        return None
    return None


def _requests(model: PreTrainedModel, finding: Finding) -> list[Request]:
    """Return what can be asked of a model: the whole, and where it has parts everything that is not refused.

    Raises:
        ChainAttentionError: If the whole is refused, and so is every part.
    """
    requests: list[Request] = []
    refusal: ChainAttentionError | None = None
    config = model.config
    everything = {}
    try:
        with switched(model, GAMMA, "chain"):
            requests.append("chain")
            everything[""] = "chain"
    except ChainAttentionError as error:
        refusal = error
    for key in config.sub_configs:
        if isinstance(getattr(config, key, None), PreTrainedConfig):
            try:
                with switched(model, GAMMA, {key: "chain"}):
                    everything[key] = "chain"
            except ChainAttentionError as error:
                refusal = refusal or error
    if set(everything) - {""}:
        requests.append(everything)
    if not requests:
        raise refusal or Wrong("nothing can be asked of it")
    if "chain" not in requests:
        finding.reason = str(refusal)
        finding.status = "checked" if "by part" in str(refusal) else "in part"
    return requests


def _check_construction(model: PreTrainedModel, finding: Finding) -> None:
    """Raise unless a model that is built as a chain is accepted or refused as one that is switched is."""
    config = copy.deepcopy(model.config)
    try:
        with torch.device("meta"):
            type(model)._from_config(config, attn_implementation="chain")
    except ChainAttentionError:
        accepted = False
    else:
        accepted = True
    if accepted != (finding.reason == ""):
        raise Wrong(f"it is {'accepted' if accepted else 'refused'} at its construction and not when it is switched")


def _compare_all(model: PreTrainedModel, batch: Batch, requests: list[Request], finding: Finding) -> None:
    """Compare every request with every padding, with images where there are some, and with a cache."""
    illustrated = _first_that_runs(model, batches_with_images, {})
    chains: dict[str, int] = {}
    for request in requests:
        for given, padding in _inputs(model, batch, illustrated):
            compared = compare(model, given, padding, request, GAMMA)
            finding.layers = max(finding.layers, compared.layers)
            if compared.chains == 0:
                continue
            for key in [WHOLE] if request == "chain" else compared.keys:
                chains[key] = max(chains.get(key, 0), compared.chains)
            finding.dispatched = max(finding.dispatched, compared.chains)
            finding.gamma_0 = max(finding.gamma_0, compared.gamma_0)
            finding.gamma_9 = max(finding.gamma_9, compared.gamma_9)
            if compared.sdpa is not None:
                finding.sdpa = max(finding.sdpa or 0.0, compared.sdpa)
            finding.difference = min(finding.difference or compared.difference, compared.difference)
            finding.images |= given is illustrated
            if padding not in finding.padding:
                finding.padding.append(padding)
    finding.asked = list(chains)
    if not chains or (requests[0] == "chain" and WHOLE not in chains):
        raise Wrong(f"of {finding.layers} self-attentions none is a chain")
    if "decoder_input_ids" in batch and requests[0] == "chain":
        compare_decoder_alone(model, batch, GAMMA)
    finding.cache = compare_cached(model, batch, requests[0], GAMMA)


def _inputs(model: PreTrainedModel, batch: Batch, illustrated: Batch | None) -> list[tuple[Batch, str]]:
    given = [(batch, "none")]
    if "attention_mask" in batch:
        for side in ("left", "right"):
            hidden = padded(batch, side)
            # where ordinary attention feels what stands in the padding, there is nothing to compare
            if not padding_leaks(model, hidden):
                given.append((hidden, side))
    return [*given, (illustrated, "none")] if illustrated is not None else given
