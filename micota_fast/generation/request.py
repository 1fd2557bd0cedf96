"""What is asked of a server, whatever its API: the sampling, and the seed of each answer."""

import hashlib
from typing import Any

from micota_fast.config.generation import SamplingSettings

REPLY_BYTES = 1 << 20  # of a reply besides what grows with its tokens


def derive_seed(seed: int, problem_id: str, sample: int) -> int:
    """Return the sampling seed of one answer: 31 bits that depend on nothing but the arguments."""
    digest = hashlib.sha256(f"{seed}\0{problem_id}\0{sample}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def sampling_params(config: SamplingSettings) -> dict[str, Any]:
    """Return the sampling of every request by SGLang's names, seeds left out; also a part of fingerprints."""
    params: dict[str, Any] = {"max_new_tokens": config.max_new_tokens, "temperature": config.temperature}
    if config.temperature > 0:
        params |= {"top_p": config.top_p, "top_k": config.top_k}
    if config.stop:
        params["stop"] = list(config.stop)
    return params
