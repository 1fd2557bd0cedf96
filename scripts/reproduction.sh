# Sourced by the reproduce_*.sh of the paper's tables: reads their options and runs a recipe with changes.
#
# Options, the same for all:
#   --model-size 3b|7b|micro   the student (default 7b); micro: the small world on a CPU, in minutes; --micro for short
#   --gpus N                   GPUs of this machine that training and serving use (default: all that nvidia-smi lists)
#   --data-dir DIR             holds math_train.jsonl and the benchmarks' files (`micota benchmarks DIR` fetches those)
#   --out DIR                  the run's folder (default runs/RECIPE): what other scripts have made there is used again
#   --dry-run                  print every command and every stage, and do nothing
#   --set KEY=VALUE            further changes of the recipe, as for `micota run`; may be repeated
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

# The header of the script that was called is its help: from its second line to the first that is not a comment.
show_help() { sed -n '2,/^[^#]/{/^#/s/^# \{0,1\}//p}' "$0"; sed -n '3,/^\./{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; }

bad_usage() { echo "error: $*; --help lists the options" >&2; exit 2; }

read_options() {
    size=7b gpus="" data_dir="" run="" dry="" changes=()
    while [ $# -gt 0 ]; do
        case "$1" in
            --model-size | --gpus | --data-dir | --out | --set)
                [ $# -gt 1 ] || bad_usage "$1 needs a value"
                case "$1" in
                    --model-size) size="$2" ;;
                    --gpus) gpus="$2" ;;
                    --data-dir) data_dir="$2" ;;
                    --out) run="$2" ;;
                    --set) changes+=(--set "$2") ;;
                esac
                shift 2
                ;;
            --micro) size=micro; shift ;;
            --dry-run) dry=1; shift ;;
            -h | --help) show_help; exit 0 ;;
            *) bad_usage "$1 is not an option" ;;
        esac
    done
    case "$size" in
        micro) recipe=micro ;;
        3b | 7b) recipe="micota-qwen2.5-$size" ;;
        *) bad_usage "--model-size must be 3b, 7b or micro, not $size" ;;
    esac
    run="${run:-$ROOT/runs/$recipe}"
    if [ "$size" = micro ]; then
        [ -z "$gpus$data_dir" ] || bad_usage "micro needs neither --gpus nor --data-dir"
        return
    fi
    [ -n "$data_dir" ] || bad_usage "--data-dir is required for $size"
    [ -f "$data_dir/math_train.jsonl" ] || bad_usage "$data_dir holds no math_train.jsonl"
    data_dir="$(cd "$data_dir" && pwd)"
    gpus="${gpus:-$( (nvidia-smi --list-gpus 2>/dev/null || true) | wc -l)}"
    [[ "$gpus" =~ ^[1-9][0-9]*$ ]] || { [ -n "$dry" ] && gpus=8; } || bad_usage "no GPUs found here; --gpus N"
    local models=() model
    if [ "$gpus" -gt 1 ]; then # the recipes serve these over two GPUs
        for model in teacher short-teacher; do models+=(--set "models.$model.serve.replicas=$((gpus / 2))"); done
    fi
    changes=(
        --set "data_dir=$data_dir" --set "launch.nproc=$gpus"
        --set "generate.serve.replicas=$gpus" --set "evaluate.serve.replicas=$gpus" "${models[@]}" "${changes[@]}"
    )
}

# Runs the recipe with the changes of the command line and those given here (KEY=VALUE each).
run_recipe() {
    local change command
    [ -n "$dry" ] || prepare_environment report
    command=("$VENV/bin/micota" run "$recipe" --out "$run")
    for change in "$@"; do command+=(--set "$change"); done
    command+=("${changes[@]}")
    if [ -n "$dry" ]; then
        printf '%q ' "${command[@]}"
        printf '\n'
        if [ -x "$VENV/bin/micota" ]; then
            "${command[@]}" --dry-run
        else
            echo "(the stages can be listed once $VENV exists; without --dry-run it is made first)"
        fi
        return
    fi
    "${command[@]}" || fail "the run stopped; the message is above. Run the same command to resume"
}
