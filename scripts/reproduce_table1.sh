#!/usr/bin/env bash
# MiCoTA's main table (arXiv 2507.01887): the student untouched and trained on short, long, mixed and mid CoT, on AIME
# 2024, AMC 2023, Olympiad, MATH-500 and GSM8K. The abstract claims for mid CoT +3.93 points on the average for
# Qwen2.5-3B-Instruct and +3.47 for 7B, over the untouched student.
#
#   bash scripts/reproduce_table1.sh --model-size 7b --data-dir DIR [--gpus 8]
#   bash scripts/reproduce_table1.sh --micro
#
# Run it again to resume. The table is in RUN/report/table.md, all numbers in report.json.
#
# Needs, 3b and 7b: one machine with 8 GPUs of 80 GB, an interpreter with SGLang in $SGLANG_PYTHON; `micota doctor RECIPE`
# looks whether they are there. Estimates of `micota plan` for 8 H100, under the assumptions that it prints; not
# measured, as these were never run by us:
#   3b: about 4.5 hours, 620 GB of disk and 170 GB of models from the hub
#   7b: about 5.7 hours, 650 GB of disk and 180 GB of models from the hub
# micro: a CPU with 2 cores, about 10 minutes, 200 MB.
. "$(dirname "${BASH_SOURCE[0]}")/reproduction.sh"
read_options "$@"
run_recipe
