"""Both of lm-evaluation-harness's clients of a server, in the environment that has it.

`PYTHON lm_eval_run.py URL MODEL TOKENIZER TASKS` runs the tasks `generate` and `choose` of the folder TASKS and prints,
for each client and task, its metrics and samples as one JSON object. (The program `lm-eval` does the same, and spends
most of its time on the harness's own tasks first.)
"""

import json
import sys

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

CLIENTS = {
    "local-chat-completions": ("chat/completions", ["generate"]),
    "local-completions": ("completions", ["generate", "choose"]),
}


def main() -> None:
    url, model, tokenizer, tasks = sys.argv[1:]
    manager = TaskManager(include_path=tasks, include_defaults=False)
    found = {}
    for client, (endpoint, names) in CLIENTS.items():
        settings = {"model": model, "base_url": f"{url}/v1/{endpoint}", "num_concurrent": 4, "max_length": 1024}
        if client == "local-completions":
            settings |= {"tokenizer": tokenizer, "tokenizer_backend": "huggingface"}
        results = simple_evaluate(
            model=client,
            model_args=settings,
            tasks=names,
            task_manager=manager,
            apply_chat_template=True,
            bootstrap_iters=0,
        )
        found[client] = {
            name: {"metrics": results["results"][name], "samples": results["samples"][name]} for name in names
        }
    print(json.dumps(found, default=str))


if __name__ == "__main__":
    main()
