"""Rows of other tools: each is read as it is meant, or refused by name, and never read as something else."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from micota_fast.data.rows import to_messages
from micota_fast.errors import InputError
from micota_fast.sources.columns import renamed

SHAPES = yaml.safe_load(Path(__file__).with_name("row_shapes.yaml").read_text())


class RecipeChat:
    """What `to_messages` takes of a Chat: the recipe's prompt and system message."""

    def system_messages(self) -> list[dict[str, str]]:
        return [{"role": "system", "content": "S"}]

    def prompt_messages(self, problem: str) -> list[dict[str, str]]:
        return [*self.system_messages(), {"role": "user", "content": f"Q({problem})"}]


def message(short: str | list[str]) -> dict[str, str]:
    if isinstance(short, list):
        return dict(zip(("role", "content"), short, strict=True))
    if short == "S":
        return {"role": "system", "content": short}
    return {"role": "user" if short.startswith("Q(") else "assistant", "content": short}


@pytest.mark.parametrize("shape", SHAPES, ids=[shape["name"] for shape in SHAPES])
def test_a_shape_is_read_right_or_refused_by_name(shape: dict[str, Any]) -> None:
    columns = shape.get("columns", {})

    def read() -> Any:
        return to_messages(renamed(shape["row"], columns), RecipeChat(), columns)  # type: ignore[arg-type]

    assert ("reads" in shape) != ("refused" in shape)
    if "reads" in shape:
        assert read() == [message(short) for short in shape["reads"]]
        return
    with pytest.raises(InputError, match=shape["refused"]):
        read()


def test_the_shapes_are_many_and_named_once() -> None:
    names = [shape["name"] for shape in SHAPES]
    assert len(set(names)) == len(names) >= 48
