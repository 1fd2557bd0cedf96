"""TRL's DistillationTrainer on given answers, in the environment that has it.

`PYTHON trl_distillation.py JOB.json` trains `student` towards `teacher` on `rows`, `[prompt ids, completion ids]` in
the order of their steps, with the options `args` of `DistillationConfig`; `out` gets weights and `losses.json`.

TRL's trainer answers its prompts itself, so the two methods that tokenise and generate are replaced. Batches, forward
passes, the divergence, accumulation, clipping and AdamW are TRL's.
"""

import json
import sys
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DistillationConfig, DistillationTrainer


class OnGivenAnswers(DistillationTrainer):  # type: ignore[misc]
    rows: list[tuple[list[int], list[int]]]

    def _tokenize_prompts(self, prompts: list[str]) -> tuple[Any, None, dict[str, Any]]:
        self.asked = [int(number) for number in prompts]
        return [self.rows[number][0] for number in self.asked], None, {}

    def _generate_single_turn(self, *_: Any, **__: Any) -> list[list[int]]:
        return [self.rows[number][1] for number in self.asked]


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(job[name], dtype="float32") for name in ("student", "teacher")
    )
    trainer = OnGivenAnswers(
        student,
        teacher,
        args=DistillationConfig(**job["args"]),
        train_dataset=Dataset.from_dict({"prompt": [str(number) for number in range(len(job["rows"]))]}),
        processing_class=AutoTokenizer.from_pretrained(job["student"], padding_side="left"),
    )
    trainer.rows = job["rows"]
    trainer.train()
    student.save_pretrained(job["out"])
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    (Path(job["out"]) / "losses.json").write_text(json.dumps(losses))


if __name__ == "__main__":
    main()
