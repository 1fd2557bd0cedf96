"""Files written piece by piece have the bytes that the safetensors library writes."""

import random
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from micota_fast.common.dtypes import CODES, DTYPES
from micota_fast.common.safetensors_file import SafetensorsFile, read_header
from micota_fast.model.safetensors_io import code_of, load_model, memory_of, save_checkpoint


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_a_checkpoint_has_the_bytes_of_the_library(dtype: str, qwen2_checkpoint: Path, tmp_path: Path) -> None:
    model = load_model(qwen2_checkpoint, dtype)
    save_checkpoint(model.state_dict(), model.config, qwen2_checkpoint, tmp_path / "ours", dtype)
    save_file(load_file(tmp_path / "ours" / "model.safetensors"), tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "ours" / "model.safetensors").read_bytes() == (tmp_path / "theirs").read_bytes()
    save_checkpoint(model.state_dict(), model.config, qwen2_checkpoint, tmp_path / "shards", dtype, 50_000)
    for path in (tmp_path / "shards").glob("model-*.safetensors"):
        save_file(load_file(path), tmp_path / "theirs", metadata={"format": "pt"})
        assert path.read_bytes() == (tmp_path / "theirs").read_bytes()


def test_pieces_may_come_in_any_order_and_from_any_thread(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.randn(3 + i, 50) for i in range(4)} | {
        "empty": torch.empty(0, 5),
        "one": torch.tensor(2.0),
    }
    layout = {name: (tuple(tensor.shape), code_of(tensor.dtype)) for name, tensor in sorted(tensors.items())}
    pieces = [
        (name, start, memory_of(tensor)[start : start + 70])
        for name, tensor in tensors.items()
        for start in range(0, max(tensor.nbytes, 1), 70)
    ]
    random.Random(0).shuffle(pieces)
    with closing(SafetensorsFile(tmp_path / "ours", layout)) as file, ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda piece: file.write(*piece), pieces))
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert file.size == (tmp_path / "ours").stat().st_size


def test_a_file_that_is_there_is_not_written_over(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("keep")
    (tmp_path / "model.safetensors").symlink_to(victim)
    with (
        pytest.raises(FileExistsError),
        closing(SafetensorsFile(tmp_path / "model.safetensors", {"t": ((1,), "U8")})) as file,
    ):
        file.write("t", 0, memoryview(b"x"))
    assert victim.read_text() == "keep"


@pytest.mark.parametrize("code", DTYPES)
def test_the_table_of_types_is_what_torch_and_the_library_say(code: str, tmp_path: Path) -> None:
    name, size = DTYPES[code]
    tensor = torch.zeros(3, dtype=getattr(torch, name))
    assert (tensor.element_size(), code_of(tensor.dtype), CODES[name]) == (size, code, code)
    save_file({"t": tensor}, tmp_path / "file")
    assert read_header(tmp_path / "file")["t"].code == code
