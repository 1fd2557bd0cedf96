"""By which rule the answers were judged, and what the other rules say of the same answers."""

from collections.abc import Sequence

from micota_fast.report.inputs import Inputs, Results
from micota_fast.report.summary import BASE, percent
from micota_fast.report.tables import ABSENT, Cell, Table

MEANINGS = {
    "strict": "strict: math-verify on the answer's box, mathematically equal answers count",
    "paper": "paper: the string rules of the authors' evaluation",
    "judge": "judge: as paper, and a model is asked about what those reject",
}


def protocols_table(inputs: Inputs) -> Table | None:
    """Average accuracy of each arm by every protocol; None where the results name none."""
    protocol = inputs.base.protocol
    if protocol is None:
        return None
    arms = {BASE: [inputs.base], **inputs.arms}
    others = [name for name in MEANINGS if name != protocol]
    there = [protocol, *(name for name in others if any(_average(runs, name) is not None for runs in arms.values()))]
    rows = tuple((Cell(arm), *(_cell(_average(runs, name)) for name in there)) for arm, runs in arms.items())
    columns = (Cell("Arm"), *(Cell(name, "counts in all other tables" if name == protocol else "") for name in there))
    notes = (
        "Average accuracy (%), mean over seeds, of the same answers. "
        + "; ".join(MEANINGS[name] for name in there)
        + ".",
    )
    return Table("The answers by each protocol", columns, rows, notes)


def _average(runs: Sequence[Results], protocol: str) -> float | None:
    of_runs = [of.protocols.get(protocol) for run in runs for of in run.benchmarks.values()]
    known = [accuracy for accuracy in of_runs if accuracy is not None]
    return sum(known) / len(known) if len(known) == len(of_runs) else None


def _cell(accuracy: float | None) -> Cell:
    return Cell(ABSENT, muted=True) if accuracy is None else Cell(percent(accuracy))
