#!/usr/bin/env bash
# MiCoTA's main table (arXiv 2507.01887): the student untouched and trained on short, long, mixed and mid CoT, on AIME
# 2024, AMC 2023, Olympiad, MATH-500 and GSM8K. The abstract claims for mid CoT +3.93 points on the average for
# Qwen2.5-3B-Instruct and +3.47 for 7B, over the untouched student.
#
#   bash scripts/reproduce_table1.sh --model-size 7b --data-dir DIR [--gpus 8]
#   bash scripts/reproduce_table1.sh --micro
#
# Called again, it goes on from where it stopped. The table is in RUN/report/table.md, all numbers in report.json.
#
# Needs, 3b and 7b: one machine with 8 GPUs of 80 GB, an interpreter with SGLang in $SGLANG_PYTHON; `micota plan RECIPE`
# works out hours and disk, `micota doctor RECIPE` looks whether they are there. Never run by us: no GPU was to be had.
# micro: a CPU with 2 cores, about 10 minutes, 200 MB.
. "$(dirname "${BASH_SOURCE[0]}")/reproduction.sh"
read_options "$@"
run_recipe
