#!/usr/bin/env bash
# Ablation over the merge: assistants merged at five weights of the fine-tuned model, and the students that they teach.
#
#   bash scripts/reproduce_ablation_merge.sh --model-size 7b --data-dir DIR [--gpus 8]
#   bash scripts/reproduce_ablation_merge.sh --micro
#
# Uses what reproduce_table1.sh has made in the same folder, and merges, generates, trains and evaluates five times more.
# For length and accuracy of the merged models alone, without students, `micota length-sweep` is much cheaper.
#
# Needs, 3b and 7b: what reproduce_table1.sh needs. Estimates of `micota plan` for 8 H100 and all stages, those shared
# with the main table among them, under the assumptions that it prints; not measured, as these were never run by us:
#   3b: about 6.5 hours, 750 GB of disk and 170 GB of models from the hub
#   7b: about 8.7 hours, 820 GB of disk and 180 GB of models from the hub
# micro: a CPU with 2 cores, about 15 minutes after the main table.
. "$(dirname "${BASH_SOURCE[0]}")/reproduction.sh"
read_options "$@"
density=0.5
[ "$size" = micro ] && density=0.8
arms="long: long" models=() corpora=()
for weight in 0.9 0.7 0.5 0.3 0.1; do
    name="mid-w${weight/0./0}"
    parameters="{weight: $weight, density: $density}"
    models+=("models.$name={merge: {mergekit: {merge_method: dare_ties, base_model: assistant, models: [{model: assistant-long, parameters: $parameters}], dtype: bfloat16}}}")
    corpora+=("corpora.$name={generate: {model: $name}}")
    arms+=", $name: $name"
done
# What is published is about the arm `mid`, which is not among these.
run_recipe claims=null "${models[@]}" "${corpora[@]}" "arms={$arms, short: short}" "align=[long, mid-w09, mid-w07, mid-w05, mid-w03, mid-w01, short]"
