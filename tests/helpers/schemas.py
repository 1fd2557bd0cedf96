"""Whether a file is what its schema says."""

import json
from pathlib import Path

from micota_fast.common.schema import load, to_json


def check_schema(kind: type, path: Path) -> None:
    """Assert that a stage's file is read without loss: it has all keys of the schema and no others."""
    assert to_json(load(kind, path)) == json.loads(path.read_text())
