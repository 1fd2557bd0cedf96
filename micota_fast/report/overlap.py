"""Which benchmark problems the training corpora hold: the sentence and the table."""

from collections.abc import Mapping

from micota_fast.report.inputs import Overlap
from micota_fast.report.tables import Cell, Table


def found_text(overlaps: Mapping[str, Mapping[str, Overlap]]) -> str:
    """The finding in a sentence."""
    held = {
        corpus: [name for name, overlap in of_corpus.items() if overlap.rows] for corpus, of_corpus in overlaps.items()
    }
    named = [f"{corpus} ({', '.join(names)})" for corpus, names in held.items() if names]
    if not named:
        return "No text of a benchmark was found in the training corpora."
    return f"Text of benchmarks was found in {', '.join(named)}: accuracy there may be memory."


def contamination_table(overlaps: Mapping[str, Mapping[str, Overlap]]) -> Table:
    """Corpora by benchmarks."""
    sizes = {name: overlap.problems for of_corpus in overlaps.values() for name, overlap in of_corpus.items()}
    columns = (Cell("Corpus"), *(Cell(name, f"n = {n}") for name, n in sizes.items()))
    rows = tuple((Cell(corpus), *(_cell(of_corpus[name]) for name in sizes)) for corpus, of_corpus in overlaps.items())
    notes = (
        "Problems of the benchmark that some row of the corpus holds word for word / shares 13 words in a row with "
        "(letters, digits and the signs before numbers count, case and punctuation do not), and how many rows of the "
        "corpus do either.",
        "A hit is no proof, as problems share phrases; no hit is none either: a paraphrase shares no 13 words, and "
        "problems of fewer words are looked for whole only.",
    )
    return Table("Benchmark problems in the training corpora", columns, rows, notes)


def _cell(overlap: Overlap) -> Cell:
    if not overlap.rows:
        return Cell("0 / 0", muted=True)
    return Cell(f"{overlap.exact:,} / {overlap.shared:,}", f"{overlap.rows:,} row{'s' if overlap.rows > 1 else ''}")
