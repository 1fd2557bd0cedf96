#!/usr/bin/env bash
# The analysis of alignment (arXiv 2507.01887, the perplexity of long, mid and short CoT under the untrained student):
# how likely and how long each corpus is, next to the accuracy that training on it brings.
#
#   bash scripts/reproduce_alignment.sh --model-size 7b --data-dir DIR [--gpus 8]
#   bash scripts/reproduce_alignment.sh --micro
#
# It is part of the main table's run and takes its corpora from there: needs what reproduce_table1.sh needs, and nothing
# more once that has run: on 8 H100 about 4.5 hours (3b) or 5.7 (7b), 620 or 650 GB of disk and 170 or 180 GB of models
# by the estimates of `micota plan`, not measured; micro: 2 cores, about 10 minutes, 200 MB. Prints RUN/align/*.json in short; the plots are in RUN/report/report.html.
. "$(dirname "${BASH_SOURCE[0]}")/reproduction.sh"
read_options "$@"
run_recipe
[ -n "$dry" ] && exit
"$VENV/bin/python" - "$run" << 'PYTHON'
import json, pathlib, sys

run = pathlib.Path(sys.argv[1])
report = json.loads((run / "report" / "report.json").read_text())
print(f"{'corpus':12} {'nats an answer':>14} {'perplexity':>10} {'mean tokens':>12} {'accuracy of its arm':>20}")
for path in sorted((run / "align").glob("*.json")):
    corpus = json.loads(path.read_text())
    if "corpus" not in corpus:  # what the stage says of its making
        continue
    arm = report["arms"].get(corpus["corpus"])
    accuracy = f"{100 * arm['average']['mean']:.1f}%" if arm else "no arm"
    nats = corpus["learnability"]["nats_per_answer"]["mean"]
    print(f"{corpus['corpus']:12} {nats:14.1f} {corpus['perplexity']:10.3f} {corpus['tokens']['mean']:12.1f} {accuracy:>20}")
PYTHON
