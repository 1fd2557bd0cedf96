"""What a plan takes for granted: sizes of known sets, and what is assumed, with its source."""

import dataclasses
import math
import re
from dataclasses import dataclass

from micota_fast.config.checks import at_least
from micota_fast.config.loader import option
from micota_fast.errors import InputError

# Number of problems in a file that the shipped recipes name, used when the file is missing: MiCoTA's MATH without
# MATH-500. Those of the benchmarks stand with their definitions.
KNOWN_SETS = {"math_train": 12000}
FITS = 0.95  # of a GPU's memory, as in the trainer's own warning
KEPT_FREE = "for the allocator's gaps and CUDA's own memory"  # why training and reading leave the rest
KEPT_BY_SERVERS = "for what a server computes with: `serve_memory`"
REASONING = re.compile(r"R1|QwQ|reason|think", re.IGNORECASE)


def shortfall(need: float, memory: float, share: float, kept: str) -> str:
    """Say that `need` bytes exceed the share of a GPU's memory that can be used, and what the rest is kept free for."""
    needed, usable = math.ceil(need / 1e8) / 10, math.floor(share * memory / 1e8 + 1e-6) / 10  # never shown as equal
    return (
        f"{needed:.1f} GB on each GPU, which can use {usable:.1f} of its {memory / 1e9:.1f} GB "
        f"({1 - share:.0%} is kept free {kept})"
    )


@dataclass(kw_only=True)
class Assumptions:
    """What shapes do not say."""

    train_mfu: float = option(
        0.4,
        doc="FLOP utilisation of training, including what activation checkpointing recomputes",
        source="Llama 3 405B on H100: 0.38 to 0.43, arXiv 2407.21783 t. 4",
    )
    prefill_mfu: float = option(0.5, doc="model-FLOP utilisation when prompts are read", source="assumed")
    decode_bandwidth: float = option(
        0.6, doc="share of the memory's bandwidth used when answers are written", source="assumed"
    )
    serve_memory: float = option(0.85, doc="share of a GPU's memory for weights and KV cache", source="assumed")
    long_tokens: int = option(4000, doc="mean answer of a model called R1, QwQ or reasoning", source="assumed")
    short_tokens: int = option(600, doc="mean answer of any other model that is not trained here", source="assumed")
    length_cv: float = option(0.7, doc="standard deviation of answers' lengths over their mean", source="assumed")
    accepted: float = option(
        0.85,
        doc="share of answers that the filter accepts",
        source="assumed; R1-Distill-Qwen-32B solves 0.943 of MATH-500, arXiv 2501.12948",
    )
    judged: float = option(
        0.4, doc="share of answers that the judge is asked about: those read and found wrong", source="assumed"
    )
    judge_tokens: int = option(
        200, doc="tokens of a question to a judge", source="its wording, of 95, a problem and two short answers"
    )
    problem_chars: int = option(200, doc="characters of a problem whose file is missing", source="assumed")
    chars_per_token: float = option(3.0, doc="characters per token, if the tokenizer is missing", source="assumed")
    template_tokens: int = option(60, doc="tokens of a prompt besides the problem", source="assumed")
    pack_fill: float = option(0.98, doc="share of a pack that documents fill", source="a micro run's summary.json")
    text_bytes: float = option(4.0, doc="bytes on disk per token in a JSONL row", source="assumed")
    host_link: float = option(
        25e9,
        doc="bytes per second between a GPU and its host, each way, which `offload` copies over",
        source="PCIe 4.0 x16 has 31.5e9 on paper; four fifths of it assumed",
    )
    disk_rate: float = option(1e9, doc="bytes per second that a merge reads and writes", source="assumed")
    startup_s: float = option(120.0, doc="seconds until a server is ready", source="assumed")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            at_least(self, **{field.name: 0})
        for name in ("train_mfu", "prefill_mfu", "decode_bandwidth", "serve_memory", "accepted", "judged", "pack_fill"):
            if not 0 < getattr(self, name) <= 1:
                raise InputError(f"`{name}` must lie above 0 and at most at 1, not {getattr(self, name)}")
        for name in ("chars_per_token", "host_link", "disk_rate"):
            if not getattr(self, name) > 0:
                raise InputError(f"`{name}` must be above 0, not {getattr(self, name)}")
