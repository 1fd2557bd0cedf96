#!/usr/bin/env bash
# Ablation over the length of the CoT: students trained on long, mid and short CoT in several proportions.
#
#   bash scripts/reproduce_ablation_length.sh --model-size 7b --data-dir DIR [--gpus 8]
#   bash scripts/reproduce_ablation_length.sh --micro
#
# Uses the corpora of reproduce_table1.sh if that has run in the same folder, and trains and evaluates five more
# students a seed. The report of the main table is set aside and comes back when its script is called again.
#
# Needs, 3b and 7b: what reproduce_table1.sh needs. Estimates of `micota plan` for 8 H100 and all stages, those of the
# main table among them, under the assumptions that it prints; not measured, as these were never run by us:
#   3b: about 5.4 hours, 650 GB of disk and 170 GB of models from the hub
#   7b: about 7.7 hours, 730 GB of disk and 180 GB of models from the hub
# micro: a CPU with 2 cores, about 8 minutes after the main table.
. "$(dirname "${BASH_SOURCE[0]}")/reproduction.sh"
read_options "$@"
run_recipe \
    'corpora.long-1-mid-1={mix: {long: 1, mid: 1}}' \
    'corpora.long-1-mid-4={mix: {long: 1, mid: 4}}' \
    'corpora.mid-1-short-1={mix: {mid: 1, short: 1}}' \
    'corpora.mid-1-short-4={mix: {mid: 1, short: 4}}' \
    'corpora.all={mix: {long: 1, mid: 1, short: 1}}' \
    'arms={long: long, long-1-mid-1: long-1-mid-1, long-1-mid-4: long-1-mid-4, mid: mid, all: all, mid-1-short-1: mid-1-short-1, mid-1-short-4: mid-1-short-4, short: short, mix: mix}'
