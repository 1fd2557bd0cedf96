"""Stages that may run at once, and so on the same GPUs: no stage is given GPUs of its own."""

from collections.abc import Mapping, Sequence

from micota_fast.pipeline.stage import Stage


def shared_gpus(stages: Sequence[Stage], gpus: Mapping[str, int], jobs: int) -> str | None:
    """Return a warning that stages may use the same GPUs at once; None if they cannot.

    Args:
        stages: of the run, each after those it needs.
        gpus: that each stage which is left to do uses, by name.
        jobs: stages that run at once.
    """
    if jobs == 1:
        return None
    before: dict[str, set[str]] = {}  # all stages that must be done before
    together: dict[str, str] = {}  # stage -> one that may run at the same time
    on_gpus: list[str] = []
    for stage in stages:
        before[stage.name] = set(stage.needs).union(*(before[name] for name in stage.needs))
        if not gpus.get(stage.name):
            continue
        for name in on_gpus:
            if name not in before[stage.name]:
                together.setdefault(name, stage.name)
                together.setdefault(stage.name, name)
        on_gpus.append(stage.name)
    if not together:
        return None
    first, second = next(iter(together.items()))
    more = f" (and {len(together) - 2} more)" if len(together) > 2 else ""
    return f"`launch.jobs` is {jobs}: {first} and {second}{more} may run at once, on the same GPUs"


APART = "--set launch.jobs=1 runs one stage after another; none is given GPUs of its own"
