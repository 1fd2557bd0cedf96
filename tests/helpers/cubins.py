"""What a kernel that Triton has compiled for a GPU that is not here takes of it: registers, stack, shared memory."""

import re
import subprocess
from pathlib import Path
from typing import Any

# Bytes of shared memory that a block may have, by compute capability; CUDA C++ programming guide, compute capabilities.
SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}


def inspect_cubin(compiled: Any, folder: Path, listed: bool = False) -> dict[str, Any]:
    """Return what cuobjdump, which comes with Triton, says of a compiled kernel.

    Args:
        compiled: by Triton.
        folder: for a file.
        listed: whether to list the instructions, which takes longer than to compile.

    Returns:
        "registers" of a thread; "spilled", bytes of stack and local memory of a thread; "shared", bytes of a block,
        fixed and at launch; "instructions", their names in order, or None.
    """
    from triton.backends import nvidia

    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    command = [Path(nvidia.__file__).parent / "bin" / "cuobjdump", "--dump-resource-usage", cubin]
    command += ["--dump-sass"] if listed else []
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", text)
    assert used is not None, text[:2000]
    registers, stack, shared, local = map(int, used.groups())
    names = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", text, re.MULTILINE)
    return {
        "registers": registers,
        "spilled": stack + local,
        "shared": shared + compiled.metadata.shared,
        "instructions": names if listed else None,
    }
