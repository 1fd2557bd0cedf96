"""What happens to thoughts in the rows of a training, counted for its log."""

from collections import Counter

from micota_fast.chat.thoughts import CLOSE, OPEN


class ThoughtCounts:
    """Counts of assistants' texts with a thought, and of what a chat template adds to them; of a row, or of many."""

    def __init__(self) -> None:
        self._texts: Counter[str] = Counter()
        self._inserted: Counter[str] = Counter()
        self._unopened = 0

    def take_text(self, before: str, after: str) -> None:
        """Count one text, given as the row has it and as it is trained on."""
        if CLOSE not in before:
            return
        self._texts["kept, each in one pair of tags" if CLOSE in after else "stripped or put into other tags"] += 1

    def take_place(self, inserted: str, unopened: bool) -> None:
        """Count what the template puts before one text, and whether the thought that its prompt opens is missing."""
        if inserted:
            self._inserted[inserted] += 1
        self._unopened += unopened

    def add(self, other: "ThoughtCounts") -> None:
        """Add the counts of other texts."""
        self._texts += other._texts
        self._inserted += other._inserted
        self._unopened += other._unopened

    def lines(self) -> list[str]:
        """Return what the log says; nothing if no row has a thought and the template adds nothing."""
        found = []
        if self._texts:
            found.append("thoughts: " + ", ".join(f"{n:,} {kind}" for kind, n in sorted(self._texts.items())))
        for text, number in sorted(self._inserted.items()):
            empty = "an empty thought, " if text in (OPEN + CLOSE, CLOSE) else ""
            found.append(f"the chat template inserts {empty}{text[:60]!r}, in no message, before {number:,} answers")
        if self._unopened:
            found.append(
                f"WARNING: {self._unopened:,} answers have no thought, but the template's generation prompt opens one: "
                f"they are trained after a prompt without {OPEN}, and the model will be asked with it"
            )
        return found
