"""Benchmarks with several answers to each problem: avg@k with its clustered standard error, and pass@k."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from micota_fast.report.inputs import Results
from micota_fast.statistics.intervals import clustered_se, mean_pass_at


@dataclass(frozen=True)
class Sampled:
    """One benchmark of one arm, mean over seeds.

    `accuracy` is the mean over all answers and `standard_error` its own over draws of problems, training left out; None
    for a single problem. `pass_at` holds pass@k for k = 1, 2, 4, ... and `samples`, those of the seed with the fewest.
    """

    samples: int
    accuracy: float
    standard_error: float | None
    pass_at: dict[int, float]


def sampled(runs: Sequence[Results]) -> dict[str, Sampled]:
    """Of one arm, the benchmarks with several answers to each problem; none where graded rows are missing."""
    every = [run.graded for run in runs if run.graded is not None]
    if len(every) < len(runs):
        return {}
    found = {}
    for name in runs[0].benchmarks:
        graded = [of_run[name] for of_run in every]
        samples = min(of_run.samples for of_run in graded)
        if samples == 1:
            continue
        score_PS = np.stack([np.array(of_run.correct) / of_run.samples for of_run in graded], axis=1)
        of_runs = [mean_pass_at(of_run.correct, of_run.samples, samples) for of_run in graded]
        pass_at = {k: math.fsum(of_run[k] for of_run in of_runs) / len(of_runs) for k in of_runs[0]}
        standard_error = clustered_se(score_PS) if len(score_PS) > 1 else None
        found[name] = Sampled(samples, float(score_PS.mean()), standard_error, pass_at)
    return found
