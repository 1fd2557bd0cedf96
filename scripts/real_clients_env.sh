#!/usr/bin/env bash
# Makes an environment with programs that people point at an OpenAI-compatible server, for tests/serve/test_real_clients.py:
# the openai SDK, lm-evaluation-harness and guidellm. SGLang's bench_serving comes with scripts/sglang_cpu_env.sh. And with a
# server that is neither ours nor SGLang, transformers serve, for tests/generation/test_transformers_serve.py. And TRL, for
# tests/train/test_trl_distillation.py (1 MB: what it needs is there already).
#
#     bash scripts/real_clients_env.sh [DIR]      # DIR: .real-clients in the root of the repository
#
# About 90 s and 1.9 GB; a second call does nothing. Needs Python >= 3.11 ($PYTHON names another interpreter).
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
DIR="${1:-$ROOT/.real-clients}"
echo "openai, lm-eval and guidellm: about 90 s, 1.9 GB"
start_environment "${BASH_SOURCE[0]}" "$DIR"
install_cpu_torch # which guidellm requires
install openai==3.57.0 "lm-eval[api]==0.4.13" guidellm==0.8.1 transformers==5.24.0 datasets==5.2.0
install fastapi==0.165.0 uvicorn==0.54.0 accelerate==1.15.0 trl==1.16.0
"$DIR/bin/python" -c 'import guidellm, lm_eval.models.openai_completions, openai, fastapi, uvicorn, accelerate, trl' ||
    fail "what was installed in $DIR does not import; see above"
environment_is_complete
