"""What of a model is trained: its shapes with `lora` and `freeze` applied, before any weight is read."""

import difflib
import fnmatch

import torch
from torch import nn

from micota_fast.config.train import TrainSettings
from micota_fast.errors import InputError
from micota_fast.model.config import ModelConfig
from micota_fast.model.decoder import Decoder
from micota_fast.model.safetensors_io import shapes_only
from micota_fast.train.lora import add_adapters, check_frozen_adapters


def trainable_decoder(settings: TrainSettings, shape: ModelConfig) -> tuple[Decoder, str | None]:
    """Build the decoder without memory: what is trained is float32 and requires gradients.

    Returns:
        The decoder, and what of it is not trained, in words.

    Raises:
        InputError: `lora` or `freeze` names what the model does not have, or does not fit it.
    """
    # Weights that are not trained need no more than the compute type.
    decoder = shapes_only(shape, torch.float32 if settings.lora is None else getattr(torch, settings.dtype))
    adapters = "" if settings.lora is None else f"lora: {add_adapters(decoder, settings.lora)} adapters; "
    frozen = freeze(decoder, settings.freeze)
    check_frozen_adapters(decoder, settings.freeze)
    return decoder, f"{adapters}frozen: {frozen:,} of {decoder.num_params():,} parameters" if frozen else None


def freeze(model: nn.Module, patterns: list[str]) -> int:
    """Freeze the parameters whose names match a shell pattern (* ? [seq]); return the number of frozen values.

    Raises:
        InputError: a pattern matches no parameter, or nothing is left to train.
    """
    named = dict(model.named_parameters())
    for pattern in patterns:
        matching = fnmatch.filter(named, pattern)
        if not matching:
            near = ", ".join(difflib.get_close_matches(pattern, named, cutoff=0))
            raise InputError(f"`freeze`: {pattern!r} matches no parameter; the nearest names are {near}")
        for name in matching:
            named[name].requires_grad_(False)
    if not any(p.requires_grad for p in named.values()):
        raise InputError("`freeze` leaves no parameter to train")
    return sum(p.numel() for p in named.values() if not p.requires_grad)
