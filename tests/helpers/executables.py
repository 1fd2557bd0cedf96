"""Stand-ins for programs that the scripts call."""

from pathlib import Path


def executable(path: Path, text: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path
