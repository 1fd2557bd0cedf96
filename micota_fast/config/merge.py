"""Options of `merge` and `length-sweep`; "ours" marks what the method's sources leave open."""

from dataclasses import dataclass

from micota_fast.config.checks import at_least
from micota_fast.config.generation import COLUMNS, PROBLEMS, SamplingSettings
from micota_fast.config.loader import option
from micota_fast.errors import InputError

REFINEMENTS = 3  # merges besides those at `weights`, at most, that look for `target_median_tokens`


@dataclass(kw_only=True)
class MergeConfig:
    """`micota merge`: a mergekit configuration in, a checkpoint out."""

    config: str = option(doc="mergekit YAML file; its model names are folders (relative to it) or hub names")
    out: str = option(doc="folder of the merged checkpoint; it appears complete or not at all")
    seed: int = option(0, doc="seed of DARE's mask")
    weights: list[float] = option(
        [],
        doc="merge once per weight (slerp: t) of the one merged model, into OUT/weight-W; []: the weight in the file",
    )
    push_to_hub: str | None = option(
        None,
        doc="upload the finished model to this hub repository (ORG/NAME), which is private if it is new; null: no "
        "upload",
        operational=True,
    )

    def __post_init__(self) -> None:
        if self.push_to_hub is not None and self.weights:
            raise InputError(
                "`push_to_hub` uploads one model, but `weights` makes several: choose one, and leave `weights` out"
            )


@dataclass(kw_only=True)
class LengthSweepSettings:
    """At which merge weights answers are sampled, and how."""

    weights: list[float] = option(
        [0.2, 0.4, 0.6, 0.8, 1.0],
        doc="weights of the one model that is merged into its base (slerp: t); each replaces the weight in the file",
        source="ours",
    )
    limit: int | None = option(
        200,
        doc="only the first N problems; null: all",
        source="ours: the median's 95% interval then reaches from the 43rd to the 58th percentile",
    )
    generate: SamplingSettings = option(SamplingSettings(), doc="how answers are sampled and served")
    timeout_s: float = option(10.0, doc="time limit for comparing one pair of answers, in seconds", source="ours")
    workers: int = option(2, doc="grading processes", operational=True)
    keep_models: bool = option(
        False, doc="keep the model of each weight; otherwise it is deleted when its answers exist", operational=True
    )

    def __post_init__(self) -> None:
        at_least(self, timeout_s=0.1, workers=1)
        if self.limit is not None:
            at_least(self, limit=1)
        if len(self.weights) < 2 or len(set(self.weights)) < len(self.weights):
            raise InputError("`weights` must list at least two, all different")
        if self.generate.url is not None:
            raise InputError("`generate.url`: a server that already runs serves one model, but a sweep makes several")
        if self.generate.top_logprobs:
            raise InputError(
                "`generate.top_logprobs`: nothing trains on a sweep's answers, so their scores are not kept; leave it "
                "out (it is for `micota generate`)"
            )
        if self.generate.api != "sglang":
            raise InputError("`generate.api`: the servers that a sweep starts have SGLang's native API")


@dataclass(kw_only=True)
class LengthSweepConfig(LengthSweepSettings):
    """`micota length-sweep`: merges at several weights, with length and accuracy of the answers at each."""

    config: str = option(doc="mergekit YAML file of one model that is merged into its base")
    problems: str = option(doc=PROBLEMS)
    columns: dict[str, str] = option({}, doc=COLUMNS, newer=True)
    out: str = option(doc="folder: sweep.json, sweep.md, sweep.svg, sweep.png, one folder per weight")
    seed: int = option(0, doc="seed of DARE's mask")
    target_median_tokens: int | None = option(
        None, doc="also write OUT/model, the merge whose answers have this median length; null: no such merge"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target_median_tokens is not None:
            at_least(self, target_median_tokens=1)
