"""The weights of a checkpoint's folder, in one safetensors file or in shards."""

from pathlib import Path

from micota_fast.common.json_io import write_json
from micota_fast.common.safetensors_file import Layout, SafetensorsFile, tensor_bytes
from micota_fast.model.folder import INDEX, SINGLE


class ShardWriter:
    """The weights of a checkpoint's folder: one file, or shards with an index; each has its tensors by name.

    Args:
        folder: where; exists.
        layout: all tensors with at least one element each; each shard takes consecutive ones.
        max_shard_bytes: largest size of a file's tensors, unless one alone is larger.
    """

    def __init__(self, folder: Path, layout: Layout, max_shard_bytes: int) -> None:
        self._files: list[SafetensorsFile] = []
        self._file_of: dict[str, SafetensorsFile] = {}
        shards = _split(layout, max_shard_bytes)
        for number, shard in enumerate(shards, start=1):
            name = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            file = SafetensorsFile(folder / name, {tensor: layout[tensor] for tensor in sorted(shard)})
            self._files.append(file)
            self._file_of |= dict.fromkeys(shard, file)
        if len(shards) > 1:
            index = {
                "metadata": {"total_size": sum(tensor_bytes(*layout[tensor]) for tensor in layout)},
                "weight_map": {tensor: self._file_of[tensor].path.name for tensor in layout},
            }
            write_json(folder / INDEX, index, 2)

    def write(self, tensor: str, offset: int, piece: memoryview) -> None:
        """Write bytes of a tensor, from byte `offset` of it on: see `SafetensorsFile.write`."""
        self._file_of[tensor].write(tensor, offset, piece)

    def close(self) -> None:
        """Close what a writer that failed has left open."""
        for file in self._files:
            file.close()


def _split(layout: Layout, max_shard_bytes: int) -> list[list[str]]:
    """Consecutive tensors of at most `max_shard_bytes` together; a larger one stands alone."""
    shards: list[list[str]] = [[]]
    filled = 0
    for tensor, (shape, code) in layout.items():
        size = tensor_bytes(shape, code)
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += size
    return shards
