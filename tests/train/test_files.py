"""A corpus trains to the same weights in every form of its file, and few rows are warned of."""

import gzip
import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from helpers.training_runs import result, train_config
from micota_fast.train.loop import train
from micota_fast.train.prepare import few_steps


def test_a_list_and_parquet_train_to_the_bytes_of_their_lines(
    qwen2_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = train_config(qwen2_checkpoint, tmp_path, epochs=1, max_steps=2)
    train(lines)
    expected = result(lines)
    del expected[0]["README.md"]  # it names the file
    said = capsys.readouterr().out
    assert "WARNING: 2 optimizer steps will hardly change the model; raise `max_steps`" in said
    rows = [json.loads(line) for line in Path(lines.data).read_text().splitlines()]
    renamed = [{"question": row["problem"], "output": row["completion"], "id": int(row["id"])} for row in rows]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "parquet")
    (tmp_path / "list").write_bytes(gzip.compress(json.dumps(renamed, indent=1).encode()))
    columns = {"problem": "question", "completion": "output"}
    for form in ("parquet", "list"):
        config = train_config(qwen2_checkpoint, tmp_path, epochs=1, max_steps=2)
        config.data, config.out = str(tmp_path / form), str(tmp_path / f"out of {form}")
        config.columns = columns if form == "list" else {}
        train(config)
        model, metrics, summary, names = result(config)
        del model["README.md"]
        assert (model, metrics, names) == (expected[0], expected[1], expected[3])
        assert summary == expected[2], "the identity too: it is the content that counts"


@pytest.mark.parametrize(
    ("options", "steps", "packs", "said"),
    [
        ({"epochs": 2, "packs_per_step": 8}, 10, 40, r"10 optimizer steps .*`packs_per_step: 4` \(now 8\)"),
        ({"epochs": 2, "packs_per_step": 8}, 2, 1, r"2 optimizer steps .*`packs_per_step: 1` and `epochs: 20` make 20"),
        (
            {"epochs": 1, "packs_per_step": 8},
            1,
            7,
            r"1 optimizer step will .*`epochs: 3` make 21, .*`pack_tokens` \(now 256",
        ),
        ({"epochs": 9, "max_steps": 5}, 5, 40, "5 optimizer steps .*raise `max_steps`"),
        ({"epochs": 2, "packs_per_step": 2}, 20, 20, None),
    ],
)
def test_what_makes_it_longer(
    options: dict[str, int], steps: int, packs: int, said: str | None, qwen2_checkpoint: Path, tmp_path: Path
) -> None:
    config = train_config(qwen2_checkpoint, tmp_path, **options)
    found = few_steps(config, steps, packs)
    assert (found is None) == (said is None)
    assert re.search(said or "", found or ""), found
