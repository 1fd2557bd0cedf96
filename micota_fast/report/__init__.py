"""The report: what the arms scored, with what certainty, and what the corpora look like to the student.

`build.run` reads the files that the other stages wrote and writes `table.md`, `report.json` and `report.html`.
"""
