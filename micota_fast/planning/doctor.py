"""`micota doctor`: checks this machine for a recipe. Starts nothing and leaves nothing behind.

Everything that may not answer (a driver, an interpreter, the network) is asked under a time limit.
"""

from collections.abc import Iterator
from pathlib import Path

from micota_fast.config.recipe import Recipe
from micota_fast.pipeline.prompt_agreement import prompt_differences
from micota_fast.planning import checks_machine, checks_recipe
from micota_fast.planning.needs import Finding, Needs


def check(recipe: Recipe, path: Path, folder: Path) -> int:
    """Print one line per check, with a fix; returns the exit status: 1 if there are errors, else 0.

    Raises:
        InputError: the recipe itself is wrong.
    """
    counts = {"ok": 0, "warning": 0, "error": 0}
    needs = Needs(recipe, path, folder)
    for finding in _findings(needs):
        counts[finding.level] += 1
        print(finding, flush=True)
    words = [f"{n} {level}{'s' * (n != 1)}" for level, n in counts.items() if n and level != "ok"]
    print(f"{recipe.name}: {', '.join(reversed(words)) or 'ready to run on this machine'}")
    return int(counts["error"] > 0)


def _findings(needs: Needs) -> Iterator[Finding]:
    """Yield all findings, in the report's order."""
    yield from checks_recipe.files(needs)
    for difference in prompt_differences(needs.stages):
        yield Finding("warning", "prompts", difference)
    if needs.unplanned:
        yield Finding("warning", "needs", f"not known: {needs.unplanned}", "fix that, and run this again")
    yield from checks_recipe.packages(needs)
    yield from checks_machine.gpus(needs)
    yield from checks_machine.attention(needs)
    yield from checks_recipe.engines(needs)
    yield from checks_machine.ports(needs)
    yield from checks_machine.host(needs)
    yield from checks_machine.disk(needs)
    yield from checks_recipe.hub(needs)
