"""The trained model as a Hugging Face checkpoint: streamed, with a model card that says how it was made."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from torch.distributed.tensor import DTensor

from micota_fast.common.files import remove_whole
from micota_fast.errors import InputError
from micota_fast.model.decoder import Decoder, parameter_shapes
from micota_fast.model.safetensors_io import save_checkpoint
from micota_fast.train.storage import require_room
from micota_fast.train.world import World


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
    weights = _Gathered(decoder, world)
    stored = getattr(torch, dtype or decoder.config.dtype_name or "float32", torch.float32)
    size = stored.itemsize * sum(shape.numel() for shape in parameter_shapes(decoder.config).values())

    def write() -> None:
        try:
            remove_whole(out)
            require_room(out.parent, size)
            save_checkpoint(weights, decoder.config, source, out, dtype, max_shard_bytes, extra_files=files)
        except (InputError, OSError) as error:
            raise InputError(
                f"{out} ({size:,} bytes of weights) could not be written: {error}. The checkpoints are kept: run the "
                f"same command to resume from the last one"
            ) from None
        finally:
            weights.drain()

    if not world.is_main:
        weights.drain()
    world.on_main(write)


class _Gathered(Mapping[str, Tensor]):
    """Gathers each parameter when it is asked for. All ranks must ask in the model's order.

    The ranks meet on their hosts before each gather. NCCL would end a rank that enters one long before rank 0, which
    writes files between gathers.
    """

    def __init__(self, decoder: Decoder, world: World) -> None:
        self._world = world
        self._parameters = dict(decoder.named_parameters())
        self._names = list(parameter_shapes(decoder.config))
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


def model_card(
    model: str, data: str, identity: dict[str, Any], facts: dict[str, Any], metrics: dict[str, Any], chosen: str
) -> str:
    """Return README.md of a trained model. Equal runs give equal text, so it has no date and no path of this machine.

    Args:
        model: what training started from, as the recipe names it.
        data: the corpus, as the recipe names it.
        identity: fingerprints of model and documents, and the options, as in summary.json.
        facts: parameters, processes, data and versions, as in summary.json.
        metrics: plain values by name, of the step that gave these weights.
        chosen: which step that is, and why.
    """
    base = model if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", model) and not Path(model).is_dir() else Path(model).name
    front: dict[str, Any] = {"base_model": base, "library_name": "transformers", "pipeline_tag": "text-generation"}
    front["tags"] = ["micota-fast", "fine-tuned"]
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    counts = facts["data"]
    recipe = identity["options"]
    return f"""---
{_yaml(front)}---

# {base}, fine-tuned

{facts["parameters"]:,} parameters, trained on chains of thought with micota-fast. {chosen}

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
