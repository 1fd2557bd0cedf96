"""The report: what the arms scored, with what certainty, and what the corpora look like to the student.

`report.run` reads the files that the other stages wrote and writes `report.html`, `answers.html` (every problem with
the answers of all arms), the tables as Markdown, LaTeX and CSV, all numbers as `report.json`, and the plots as SVG and
PNG.
"""
