"""What bench/train.py runs next to our trainer, one process per run: `python train_peers.py JOB.json RESULT.json`.

Imports nothing of ours, so an interpreter that has TRL and not us can run it. A job names its `program` and what that
needs (see `train_contestants.py`, which writes them); the result is the seconds of each pass over the documents, what
was counted in them, and the peak of this process's memory.
"""

import importlib.metadata
import importlib.util
import itertools
import json
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Job = dict[str, Any]
Result = dict[str, Any]

IGNORE_INDEX = -100
GEMM_SIZE = 2048


def main() -> None:
    """Do the job and write its result."""
    job: Job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    result = PROGRAMS[job["program"]](job)
    Path(sys.argv[2]).write_text(json.dumps(result), encoding="utf-8")


def gemm(job: Job) -> Result:
    """The most FLOP/s that one large matrix product reaches here, of ten."""
    x = torch.randn(GEMM_SIZE, GEMM_SIZE).to(getattr(torch, job["dtype"]))
    seconds = []
    for _ in range(12):
        started = time.perf_counter()
        torch.mm(x, x)
        seconds.append(time.perf_counter() - started)
    return {"flop_per_s": 2 * GEMM_SIZE**3 / min(seconds[2:])}


class Passes:
    """Marks the end of each pass over the documents; memory is that of the process up to the last one."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.marks = [self._now()]

    def ended(self) -> None:
        self.marks.append(self._now())

    def result(self) -> Result:
        (wall, cpu), of_pass = (
            zip(*self.marks, strict=True),
            lambda marks: [b - a for a, b in itertools.pairwise(marks)],
        )
        return {"pass_s": of_pass(wall), "pass_cpu_s": of_pass(cpu), "peak_rss_bytes": peak_rss_bytes()}

    def _now(self) -> tuple[float, float]:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter(), time.process_time()


def peak_rss_bytes(process: int | str = "self") -> int | None:
    """The most memory that a process has had resident (VmHWM); None if there is no /proc."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return None
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def plain(job: Job) -> Result:
    """The loop one writes by hand around transformers' model: packs, and SDPA called once for each document."""
    import torch.nn.functional as F
    from transformers import AttentionInterface, AutoModelForCausalLM

    def attend(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: float, **given: Any) -> Any:
        documents = zip(*(x.split(given["lengths"], dim=2) for x in (q, k, v)), strict=True)
        outs = [
            F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True)
            for q, k, v in documents
        ]
        return torch.cat(outs, dim=2).transpose(1, 2), None

    AttentionInterface.register("sdpa_per_document", attend)
    model = AutoModelForCausalLM.from_pretrained(
        job["model"], dtype=torch.float32, attn_implementation="sdpa_per_document"
    ).to(job["device"])
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=job["lr"], betas=tuple(job["betas"]), weight_decay=0.0, fused=True
    )
    documents, order = json.loads(Path(job["documents"]).read_text()), random.Random(0)
    losses: list[Tensor] = []
    passes = Passes(job["device"])
    for _ in range(job["passes"]):
        losses = []
        packs = order.sample(job["packs"], len(job["packs"]))
        for first in range(0, len(packs), job["packs_per_step"]):
            step = packs[first : first + job["packs_per_step"]]
            supervised = sum(len(documents[d]) - 1 for pack in step for d in pack)
            total = torch.zeros((), device=job["device"])
            for pack in step:
                ids = torch.tensor([token for d in pack for token in documents[d]], device=job["device"])
                targets = torch.tensor(
                    [t for d in pack for t in (*documents[d][1:], IGNORE_INDEX)], device=job["device"]
                )
                positions = torch.cat([torch.arange(len(documents[d]), device=job["device"]) for d in pack])
                with torch.autocast(job["device"], torch.bfloat16, enabled=job["dtype"] == "bfloat16"):
                    logits = model(
                        input_ids=ids[None],
                        position_ids=positions[None],
                        lengths=[len(documents[d]) for d in pack],
                        use_cache=False,
                    ).logits[0]
                loss = F.cross_entropy(logits.float(), targets, ignore_index=IGNORE_INDEX, reduction="sum") / supervised
                loss.backward()
                total += loss.detach()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(total)
        passes.ended()
    return passes.result() | {
        "loss": float(torch.stack(losses).mean()),
        "attention": "SDPA per document",
        "peer_versions": versions("torch", "transformers"),
    }


def trl(job: Job) -> Result:
    """TRL's SFTTrainer on the same tokens, packed (best-fit decreasing) or padded."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    documents = json.loads(Path(job["documents"]).read_text())
    flash = job["device"] == "cuda" and importlib.util.find_spec("flash_attn")
    attention = "flash_attention_2" if flash else "sdpa"
    config = SFTConfig(
        output_dir=job["out"],
        model_init_kwargs={"dtype": "float32", "attn_implementation": attention},
        max_length=job["pack_tokens"],
        packing=job["packing"],
        packing_strategy="bfd",
        per_device_train_batch_size=job["micro_batch"],
        gradient_accumulation_steps=job["accumulation"],
        gradient_checkpointing=job["activation_checkpointing"],
        use_liger_kernel=job["liger"],
        bf16=job["dtype"] == "bfloat16",
        use_cpu=job["device"] == "cpu",
        num_train_epochs=job["passes"],
        learning_rate=job["lr"],
        lr_scheduler_type="constant",
        adam_beta1=job["betas"][0],
        adam_beta2=job["betas"][1],
        logging_strategy="epoch",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    adapters = None
    if lora := job.get("lora"):
        from peft import LoraConfig

        adapters = LoraConfig(
            r=lora["rank"], lora_alpha=lora["alpha"], target_modules=lora["targets"], lora_dropout=lora["dropout"]
        )
    passes = Passes(job["device"])
    seen = {"tokens": 0, "supervised": 0, "padding": 0}

    class OfEachPass(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            passes.marks = []
            passes.ended()

        def on_epoch_end(self, *_: Any, **__: Any) -> None:
            passes.ended()

    trainer = SFTTrainer(
        job["model"],
        args=config,
        train_dataset=Dataset.from_dict({"input_ids": documents}),
        callbacks=[OfEachPass()],
        peft_config=adapters,
    )
    collate: Callable[[Any], Any] = trainer.data_collator

    def counted(rows: Any) -> Any:
        batch = collate(rows)
        real = int(batch["attention_mask"].sum()) if "attention_mask" in batch else batch["input_ids"].numel()
        seen["tokens"] += real
        seen["padding"] += batch["input_ids"].numel() - real
        seen["supervised"] += int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())  # the first one has no predecessor
        return batch

    trainer.data_collator = counted
    trainer.train()
    result = passes.result()
    tokens = sum(map(len, documents))
    expected = {"tokens": tokens * job["passes"], "supervised": (tokens - len(documents)) * job["passes"]}
    if {key: seen[key] for key in expected} != expected:
        raise RuntimeError(f"TRL has trained on {seen}, which is not all documents in each pass: {expected}")
    result |= {
        "loss": next(row["loss"] for row in reversed(trainer.state.log_history) if "loss" in row),
        "attention": trainer.model.config._attn_implementation,
        "padding": seen["padding"] / (seen["padding"] + seen["tokens"]),
        "peer_versions": versions("torch", "transformers", "trl", "peft", "accelerate", "liger-kernel", "flash-attn"),
    }
    if job["packing"]:
        result["leak"] = leak(trainer, collate)
    return result


def leak(trainer: Any, collate: Callable[[Any], Any]) -> float:
    """How much the logits of a document differ in a pack behind another one and alone, relative (L2).

    Rounding where documents do not see each other. The batch is the trainer's own, and so is the way to call the model.
    """
    row = next(row for row in trainer.train_dataset if len(row["seq_lengths"]) > 1)
    first, second = row["seq_lengths"][:2]
    alone = {"input_ids": row["input_ids"][first : first + second], "seq_lengths": [second]}
    model = trainer.model.eval()

    def logits(rows: list[Any]) -> Tensor:
        batch = trainer._prepare_inputs(collate(rows))
        batch.pop("labels")
        with torch.no_grad(), trainer.compute_loss_context_manager():
            return model(**batch, use_cache=False).logits[0].float()

    packed, lone = logits([row])[first : first + second], logits([alone])
    return float((packed - lone).norm() / lone.norm())


def versions(*packages: str) -> dict[str, str | None]:
    """Of what is installed with this interpreter."""
    found: dict[str, str | None] = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


PROGRAMS: dict[str, Callable[[Job], Result]] = {"gemm": gemm, "plain": plain, "trl": trl}

if __name__ == "__main__":
    main()
