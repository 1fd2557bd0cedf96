#!/usr/bin/env bash
# Ablation over the length of the CoT: students trained on long, mid and short CoT in several proportions.
#
#   bash scripts/reproduce_ablation_length.sh --model-size 7b --data-dir DIR [--gpus 8]
#   bash scripts/reproduce_ablation_length.sh --micro
#
# Uses the corpora of reproduce_table1.sh where that has run in the same folder, and trains and evaluates five more
# students a seed: for 7b on 8 GPUs of 80 GB see `micota plan`; micro: about 8 minutes on 2 cores. The report of the main
# table is set aside and comes back when its script is called again.
. "$(dirname "${BASH_SOURCE[0]}")/reproduction.sh"
read_options "$@"
run_recipe \
    'corpora.long-1-mid-1={mix: {long: 1, mid: 1}}' \
    'corpora.long-1-mid-4={mix: {long: 1, mid: 4}}' \
    'corpora.mid-1-short-1={mix: {mid: 1, short: 1}}' \
    'corpora.mid-1-short-4={mix: {mid: 1, short: 4}}' \
    'corpora.all={mix: {long: 1, mid: 1, short: 1}}' \
    'arms={long: long, long-1-mid-1: long-1-mid-1, long-1-mid-4: long-1-mid-4, mid: mid, all: all, mid-1-short-1: mid-1-short-1, mid-1-short-4: mid-1-short-4, short: short, mix: mix}'
