"""What a small model is given: candidates by the names of its arguments, tried until one runs."""

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from benchmarks.families.run import Batch
from benchmarks.families.small import IMAGE, WIDTH

# another number of tokens on each side, so that cross-attention is not square
TOKENS, DECODED = 10, 7
# share of the tokens of a row
PADDED = 0.4
SAMPLES, FRAMES = 4000, 64
# how many tokens stand for an image of four by four patches: all, with a class token, merged, or one
IMAGE_TOKENS = (16, 4, 17, 1, 8, 2, 64)


def batches(model: PreTrainedModel) -> Iterator[Batch]:
    """Yield arguments that a model may take, the likeliest first."""
    makers: list[Callable[[PreTrainedModel, set[str]], Iterator[Batch]]]
    makers = [_text, _images, _patches, _audio, _series, _states]
    names = set(inspect.signature(model.forward).parameters)
    for make in makers:
        yield from make(model, names)


def batches_with_images(model: PreTrainedModel) -> Iterator[Batch]:
    """Yield texts with images in them, one in each, for a model that takes both."""
    names = set(inspect.signature(model.forward).parameters)
    if not {"input_ids", "pixel_values"} <= names:
        return
    pictures = [*_patches(model, names, images=2), *_images(model, names)]
    for count in IMAGE_TOKENS:
        ids = torch.cat([token_ids(3), torch.full((2, count), IMAGE), token_ids(TOKENS, seed=5)], 1)
        types = (ids == IMAGE).long()
        batch: Batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        for name in ("mm_token_type_ids", "token_type_ids"):
            if name in names:
                batch[name] = types
        if "decoder_input_ids" in names:
            batch["decoder_input_ids"] = token_ids(DECODED, seed=4)
        yield from (batch | picture for picture in pictures)


def padded(batch: Batch, side: str) -> Batch:
    """Return the batch with the first or last tokens of its second row hidden."""
    mask = batch["attention_mask"].clone()
    count = int(PADDED * mask.shape[1])
    mask[1, slice(None, count) if side == "left" else slice(-count, None)] = 0
    return batch | {"attention_mask": mask}


def token_ids(tokens: int = TOKENS, batch: int = 2, seed: int = 3) -> Tensor:
    """Return ids ``[batch, tokens]`` that are no special ones."""
    return torch.randint(5, 90, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def _random(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _text(model: PreTrainedModel, names: set[str]) -> Iterator[Batch]:
    if "input_ids" not in names:
        return
    batch: Batch = {"input_ids": token_ids()}
    if "attention_mask" in names:
        batch["attention_mask"] = torch.ones(2, TOKENS, dtype=torch.long)
    if "decoder_input_ids" in names:
        yield batch | {"decoder_input_ids": token_ids(DECODED, seed=4)}
    yield batch
    if "bbox" in names:
        yield batch | {"bbox": torch.randint(0, 10, (2, TOKENS, 4)).sort(-1).values}
        yield batch | {"bbox": _random(2, TOKENS, 8)}
    if "pixel_values" in names:
        yield from (batch | images for images in _images(model, names))


def _images(model: PreTrainedModel, names: set[str]) -> Iterator[Batch]:
    config = _part(model.config, "vision_config", "backbone_config")
    side = getattr(config, "image_size", WIDTH)
    high, wide = (side, side) if isinstance(side, int) else (tuple(side) if side else (WIDTH, WIDTH))
    channels = getattr(config, "num_channels", None) or getattr(config, "in_channels", None) or 3
    if "pixel_values" in names:
        yield {"pixel_values": _random(2, channels, high, wide)}
        if "spatial_shapes" in names:
            # SigLIP 2: patches, one after another
            patches = {"pixel_values": _random(2, 16, channels * config.patch_size**2)}
            yield patches | {"pixel_attention_mask": torch.ones(2, 16).long(), "spatial_shapes": torch.full((2, 2), 4)}
        for frames in {getattr(config, "num_frames", 4), getattr(config, "frames_per_clip", 4), 1}:
            yield {"pixel_values": _random(2, frames, channels, high, wide)}
    if "pixel_values_videos" in names:
        yield {"pixel_values_videos": _random(2, getattr(config, "frames_per_clip", 4), channels, high, wide)}


def _patches(model: PreTrainedModel, names: set[str], images: int = 1) -> Iterator[Batch]:
    """Patches of images of four by four, as the towers of Qwen2-VL and its kin take them."""
    config = _part(model.config, "vision_config")
    patch, channels = getattr(config, "patch_size", 8), getattr(config, "in_channels", 3)
    frames = getattr(config, "temporal_patch_size", 1)
    for grid in ("grid_thw", "image_grid_thw"):
        for name in ("hidden_states", "pixel_values"):
            if grid in names and name in names and isinstance(patch, int):
                size = torch.tensor([[1, 4, 4]] * images)
                yield {name: _random(16 * images, channels * frames * patch**2), grid: size}
                yield {name: _random(16 * images, channels * patch**2), grid: size}


def _audio(model: PreTrainedModel, names: set[str]) -> Iterator[Batch]:
    config = _part(model.config, "audio_config", "encoder_config")
    mels = [getattr(config, name, None) for name in ("num_mel_bins", "feature_size", "input_feat_per_channel")]
    mels += [getattr(config, name, None) for name in ("feature_projection_input_dim", "input_dim", "num_freqs")]
    mel = next((count for count in mels if isinstance(count, int)), 16)
    decoded = {"decoder_input_ids": token_ids(DECODED)} if "decoder_input_ids" in names else {}
    if "input_values" in names:
        masks = [{"attention_mask": torch.ones(2, SAMPLES, dtype=torch.long)}] if "attention_mask" in names else []
        for mask in (*masks, {}):
            yield {"input_values": _random(2, SAMPLES), **mask, **decoded}
        yield {"input_values": _random(2, getattr(config, "max_length", FRAMES), mel), **decoded}
        yield {"input_values": _random(2, 1, SAMPLES), **decoded}
    if "input_features" in names:
        positions = getattr(config, "max_source_positions", None)
        for frames in (2 * positions if isinstance(positions, int) else FRAMES, FRAMES, 200):
            for shape in ((2, mel, frames), (2, frames, mel)):
                yield {"input_features": _random(*shape), **decoded}
                for name in ("attention_mask", "input_features_mask", "feature_attention_mask"):
                    if name in names:
                        yield {"input_features": _random(*shape), name: torch.ones(2, frames).long(), **decoded}


def _series(model: PreTrainedModel, names: set[str]) -> Iterator[Batch]:
    config = model.config
    length, channels = getattr(config, "context_length", 10), getattr(config, "num_input_channels", 1)
    if "past_time_features" in names:
        past = length + max(getattr(config, "lags_sequence", [0]))
        features = getattr(config, "num_time_features", 0)
        batch = {"past_values": _random(2, past), "past_time_features": _random(2, past, features)}
        batch["past_observed_mask"] = torch.ones(2, past)
        future = getattr(config, "prediction_length", 5)
        yield batch | {"future_values": _random(2, future), "future_time_features": _random(2, future, features)}
    elif "past_values" in names:
        yield {"past_values": _random(2, length, channels)}
        yield {"past_values": _random(2, length)}


def _states(model: PreTrainedModel, names: set[str]) -> Iterator[Batch]:
    width = getattr(model.config, "hidden_size", WIDTH)
    for name in ("inputs_embeds", "hidden_states"):
        if name in names and isinstance(width, int):
            yield {name: _random(2, TOKENS, width)}
            if "attention_mask" in names:
                yield {name: _random(2, TOKENS, width), "attention_mask": torch.ones(2, TOKENS, dtype=torch.long)}


def _part(config: PreTrainedConfig, *names: str) -> PreTrainedConfig:
    """Return the first of the named parts of a config that it has, else itself."""
    parts = (getattr(config, name, None) for name in names)
    return next((part for part in parts if isinstance(part, PreTrainedConfig)), config)
