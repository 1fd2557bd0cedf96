"""Run by an interpreter that has mergekit: its own command, with what it leaves to chance fixed.

python mergekit_runner.py CONFIG OUT MASKS PROBABILITIES
    merge; sorts are stable; random masks come from MASKS (safetensors) or, if there is no such file, are its own and
    kept there; the probabilities that they were drawn with are kept in PROBABILITIES
python mergekit_runner.py sparsify IN OUT METHOD OPTIONS
    sparsify the tensor `delta` of IN at random many times, with OPTIONS (JSON); write moments
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def merge(config: str, out: str, masks: str, probabilities_of: str) -> None:
    """`mergekit-yaml CONFIG OUT`."""
    from click.testing import CliRunner
    from mergekit.merge_methods.generalized_task_arithmetic import GeneralizedTaskArithmeticMerge as Method
    from mergekit.scripts.run_yaml import main

    argsort, sort, bernoulli, merge_group = torch.argsort, torch.sort, torch.bernoulli, Method.merge_group
    given, drawn, asked, now = load_file(masks) if Path(masks).exists() else None, {}, {}, {}

    def note(self, group, /, **parameters):
        # Which of its calls draw: those for a density below 1, in the order of the models.
        sparse = [i for i, entry in enumerate(group.non_base) if parameters["density"][entry.id] < 1]
        now.update(name=group.metadata.name, indices=iter(sparse))
        return merge_group(self, group, **parameters)

    def draw(probabilities, **options):
        own, name = bernoulli(probabilities, **options), f"{now['name']}|{next(now['indices'])}"
        asked[name] = probabilities.float()
        if given is None:
            drawn[name] = own.bool()
            return own
        return given.pop(name).to(probabilities.dtype).view_as(probabilities)

    Method.merge_group, torch.bernoulli = note, draw
    # Its sorts leave open which of equal magnitudes comes first.
    torch.argsort = lambda tensor, **options: argsort(tensor, **options, stable=True)
    torch.sort = lambda tensor, **options: sort(tensor, **options, stable=True)
    result = CliRunner().invoke(main, [config, out, "--quiet"])
    if result.exception is not None:
        raise result.exception
    assert not given, f"not asked for: {sorted(given)}"
    save_file(asked, probabilities_of)
    if given is None:
        save_file(drawn, masks)


def moments(source: str, out: str, method: str, options: str) -> None:
    """Mean and standard deviation over seeds of every element after dropping and rescaling."""
    from mergekit.sparsify import RescaleNorm, SparsificationMethod, sparsify

    delta = load_file(source)["delta"]
    runs = []
    for seed in range(2000):
        torch.manual_seed(seed)
        runs.append(
            sparsify(delta, method=SparsificationMethod(method), rescale_norm=RescaleNorm.l1, **json.loads(options))
        )
    stacked = torch.stack(runs).double()
    save_file({"mean": stacked.mean(0), "sd": stacked.std(0)}, out)


if __name__ == "__main__":
    if sys.argv[1] == "sparsify":
        moments(*sys.argv[2:])
    else:
        merge(*sys.argv[1:])
