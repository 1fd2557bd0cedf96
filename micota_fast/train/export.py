"""The trained model as a Hugging Face checkpoint: streamed, with a model card that says how it was made."""

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from torch.distributed.tensor import DTensor

from micota_fast.common.files import remove_whole
from micota_fast.config.train import LoraConfig
from micota_fast.errors import InputError
from micota_fast.model.adapter import save_adapter, save_merged
from micota_fast.model.checks import checked_config
from micota_fast.model.decoder import Decoder, parameter_shapes
from micota_fast.model.folder import stored_tensors
from micota_fast.model.safetensors_io import save_checkpoint
from micota_fast.sources import hub
from micota_fast.train.lora import adapted_modules
from micota_fast.train.storage import require_room
from micota_fast.train.world import World

_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def export(
    decoder: Decoder,
    source: Path,
    out: Path,
    world: World,
    files: Mapping[str, str],
    dtype: str | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write `decoder`, plain or sharded, to `out`. Call it on all ranks; rank 0 writes.

    Parameters are gathered one by one: besides its shards, a rank holds one whole parameter.

    Args:
        decoder: the trained weights.
        source: the checkpoint they were trained from: its tokenizer, chat template and generation_config are copied.
        out: replaced if it exists; it appears whole or not at all.
        world: the processes.
        files: names and texts of what else the folder holds, in place of copies of the same name.
        dtype: to store; None: the one that config.json states.
        max_shard_bytes: largest size of a file.

    Raises:
        InputError: on all ranks, if rank 0 could not write.
    """
    weights = _Gathered(decoder, list(parameter_shapes(decoder.config)), world)
    stored = getattr(torch, dtype or decoder.config.dtype_name or "float32", torch.float32)
    size = stored.itemsize * sum(shape.numel() for shape in parameter_shapes(decoder.config).values())

    def write() -> None:
        try:
            with _replacing(out, size):
                save_checkpoint(weights, decoder.config, source, out, dtype, max_shard_bytes, extra_files=files)
        finally:
            weights.drain()

    if not world.is_main:
        weights.drain()
    world.on_main(write)


def export_adapter(
    decoder: Decoder, lora: LoraConfig, base: str, out: Path, world: World, files: Mapping[str, str]
) -> None:
    """Write the adapters of `decoder`, plain or sharded, to `out` in peft's layout. Call it on all ranks.

    Args:
        decoder: with trained adapters.
        lora: of the adapters.
        base: the checkpoint they were trained beside, as peft is to find it.
        out: replaced if it exists; it appears whole or not at all.
        world: the processes; rank 0 writes.
        files: names and texts of what else the folder holds.

    Raises:
        InputError: on all ranks, if rank 0 could not write.
    """
    names = [f"{name}.lora_{half}.weight" for name in adapted_modules(decoder) for half in "AB"]
    gathered = _Gathered(decoder, names, world)
    tensors = {name: gathered[name].cpu() for name in names}

    def write() -> None:
        with _replacing(out, sum(tensor.nbytes for tensor in tensors.values())):
            save_adapter(tensors, lora, base, out, files)

    world.on_main(write)


def export_merged(
    source: Path, adapter: Path, out: Path, world: World, files: Mapping[str, str], dtype: str | None
) -> None:
    """Write the checkpoint `source` with `adapter` added to its weights to `out`; for the rest see `export`."""
    stored = getattr(torch, dtype or checked_config(source).dtype_name or "float32", torch.float32)
    size = stored.itemsize * sum(math.prod(tensor.shape) for _, tensor in stored_tensors(source).values())

    def write() -> None:
        with _replacing(out, size):
            save_merged(source, adapter, out, dtype, files=files)

    world.on_main(write)


@contextmanager
def _replacing(out: Path, size: int) -> Iterator[None]:
    """Make room for `size` bytes of weights at `out`, and say what a failure to write them means for the run."""
    try:
        remove_whole(out)
        require_room(out.parent, size)
        yield
    except (InputError, OSError) as error:
        raise InputError(
            f"{out} ({size:,} bytes of weights) could not be written: {error}. The checkpoints are kept: run the "
            f"same command to resume from the last one"
        ) from None


class _Gathered(Mapping[str, Tensor]):
    """Gathers each parameter when it is asked for. All ranks must ask in the order of `names`.

    The ranks meet on their hosts before each gather. NCCL would end a rank that enters one long before rank 0, which
    writes files between gathers.
    """

    def __init__(self, decoder: Decoder, names: list[str], world: World) -> None:
        self._world, self._names = world, names
        self._parameters = dict(decoder.named_parameters())
        self._taken = 0

    def __getitem__(self, name: str) -> Tensor:
        if name != self._names[self._taken]:
            raise RuntimeError(f"{name} is asked for where {self._names[self._taken]} comes next: ranks would deadlock")
        self._taken += 1
        parameter = self._parameters[name].detach()
        if not isinstance(parameter, DTensor):
            return parameter
        self._world.barrier()
        return parameter.full_tensor()

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def drain(self) -> None:
        """Take part in gathering what this rank has not asked for: for rank 0, or on rank 0 after an error."""
        for name in self._names[self._taken :]:
            self[name]


def license_of(source: Path) -> str | None:
    """Return the license that the model card of a checkpoint states; None if it has no card or states none."""
    try:
        text = (source / "README.md").read_text(encoding="utf-8")
        parts = text.split("---\n", 2)
        front = yaml.safe_load(parts[1]) if len(parts) == 3 and not parts[0].strip() else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError):  # a card is prose: nothing depends on it
        return None
    stated = front.get("license") if isinstance(front, dict) else None
    return stated if isinstance(stated, str) else None


def model_card(
    model: str,
    data: str,
    identity: dict[str, Any],
    facts: dict[str, Any],
    metrics: dict[str, Any],
    chosen: str,
    license_: str | None = None,
    adapter: bool = False,
) -> str:
    """Return README.md of a trained model. Equal runs give equal text, so it has no date and no path of this machine.

    Args:
        model: what training started from, as the recipe names it.
        data: the corpus, as the recipe names it.
        identity: fingerprints of model and documents, and the options, as in summary.json.
        facts: parameters, processes, data and versions, as in summary.json.
        metrics: plain values by name, of the step that gave these weights.
        chosen: which step that is, and why.
        license_: of the model that training started from; None: not known.
        adapter: whether the card is that of an adapter alone.
    """
    on_hub = _HUB_NAME.fullmatch(model) is not None and not Path(model).is_dir()
    base = model if on_hub else Path(model).name
    # The hub shows these as links and filters, so each stands only where it is known to be right.
    front: dict[str, Any] = {"license": license_} if license_ else {}
    front |= {"base_model": base} if on_hub else {}
    front |= {"datasets": [hub.parse(data).repo]} if hub.is_hub(data) else {}
    front |= {"library_name": "transformers", "pipeline_tag": "text-generation"}
    front["tags"] = ["micota-fast", "fine-tuned"]
    what = f"{facts['parameters']:,} parameters"
    if adapter:
        front |= {"library_name": "peft", "tags": [*front["tags"], "lora"]}
        what = f"A LoRA adapter of {facts['adapter_parameters']:,} parameters"
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    counts = facts["data"]
    recipe = identity["options"]
    return f"""---
{_yaml(front)}---

# {base}, fine-tuned

{what}, trained on chains of thought with micota-fast. {chosen}

## Metrics

{_table(metrics)}
## Data

{Path(data).name}: {counts["documents"]:,} documents of {counts["rows"]:,} rows, {counts["tokens"]:,} tokens, of which \
{counts["supervised"]:,} supervised. Their fingerprint: `{identity["documents"]}`.

## Making

Versions: {versions}; {facts["processes"]} processes. Fingerprint of the model it started from: `{identity["model"]}`.

```yaml
{_yaml(recipe)}```
"""


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=120)


def _table(values: dict[str, Any]) -> str:
    rows = "".join(f"| {name} | {value} |\n" for name, value in values.items())
    return f"| | |\n|---|---|\n{rows}"
