"""What somebody probably meant who wrote a name that is not known: the field's other spellings, and the closest one."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

# Names of TRL, transformers, LLaMA-Factory, axolotl, vLLM and lm-evaluation-harness -> ours.
OTHER_KEYS = {
    "adam_beta1": "betas",
    "adam_beta2": "betas",
    "adam_epsilon": "eps",
    "attn_implementation": "attention",
    "base_model": "model",
    "batch_size": "packs_per_step",
    "bf16": "dtype",
    "cutoff_len": "pack_tokens",
    "data_path": "data",
    "dataset": "data",
    "dataset_name": "data",
    "datasets": "data",
    "epoch": "epochs",
    "eval_dataset": "validation_data",
    "eval_steps": "validate_every",
    "flash_attn": "attention",
    "flash_attention": "attention",
    "fp16": "dtype",
    "freeze_parameters": "freeze",
    "global_batch_size": "packs_per_step",
    "gradient_accumulation_steps": "packs_per_step",
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_clipping": "max_grad_norm",
    "data_parallel_size": "dp",
    "early_stopping_patience": "early_stop",
    "learning_rate": "lr",
    "logging_steps": "log_every",
    "lr_scheduler_type": "min_lr_ratio",
    "max_length": "pack_tokens",
    "max_model_len": "context_length",
    "max_num_seqs": "max_running",
    "max_seq_len": "pack_tokens",
    "max_seq_length": "pack_tokens",
    "micro_batch_size": "packs_per_step",
    "model_name": "model",
    "model_name_or_path": "model",
    "model_path": "model",
    "n_samples": "samples",
    "num_epochs": "epochs",
    "num_return_sequences": "samples",
    "num_train_epochs": "epochs",
    "output": "out",
    "output_dir": "out",
    "output_path": "out",
    "per_device_train_batch_size": "packs_per_step",
    "random_seed": "seed",
    "report_to": "wandb",
    "save_steps": "checkpoint_every",
    "save_total_limit": "keep_checkpoints",
    "sequence_len": "pack_tokens",
    "system_prompt": "system",
    "tasks": "benchmarks",
    "temp": "temperature",
    "tensor_parallel_size": "tp",
    "torch_compile": "compile",
    "torch_dtype": "dtype",
    "train_file": "data",
    "wandb_project": "wandb",
    "warmup_steps": "warmup_ratio",
}
# In a generation, whose names the training does not have.
OTHER_KEYS |= dict.fromkeys(("max_tokens", "max_completion_length", "max_gen_toks"), "max_new_tokens")
OTHER_VALUES = {
    "bf16": "bfloat16",
    "flash_attention_2": "flash",
    "flash_attention_3": "flash",
    "fp32": "float32",
    "gpu": "cuda",
    "torch.bfloat16": "bfloat16",
}
OTHER_VERBS = {
    "check": "doctor",
    "clean": "prune",
    "decontaminate": "contamination",
    "download": "benchmarks",
    "estimate": "plan",
    "eval": "evaluate",
    "export-parquet": "export",
    "finetune": "train",
    "fine-tune": "train",
    "fit": "train",
    "infer": "generate",
    "inference": "generate",
    "launch": "run",
    "mergekit": "merge",
    "perplexity": "align",
    "pipeline": "run",
    "sample": "generate",
    "server": "serve",
    "sft": "train",
    "sweep": "length-sweep",
}


def closest(word: str, known: Iterable[str], others: Mapping[str, str] = MappingProxyType({})) -> str | None:
    """Return the known name that `word` stands for: by the table of other names, else the most similar one, or None."""
    names = {name.lower(): name for name in known}
    plain = word.lower()
    if same := names.get(plain) or names.get(others.get(plain, plain)):
        return same
    near = difflib.get_close_matches(plain, names, n=1, cutoff=0.7)
    return names[near[0]] if near else None


def closest_key(word: str, keys: Sequence[str]) -> str | None:
    """Return the option that `word` stands for, or None.

    An option at the top counts before one of a section, and the same name, or ours for another project's, before a
    similar one: `max_tokens` of a generation is `max_new_tokens`, not `accept.max_tokens`; `lr` of a recipe `train.lr`.

    Args:
        word: as it was written, with _ or -.
        keys: dotted keys of the options.
    """
    plain = word.lower().replace("-", "_")
    here = [key for key in keys if "." not in key]
    for name in (plain, OTHER_KEYS.get(plain, plain)):
        if name in here:
            return name
    if near := difflib.get_close_matches(plain, here, n=1, cutoff=0.85):  # `seed` of a recipe is `seeds`
        return near[0]
    for name in (plain, OTHER_KEYS.get(plain, plain)):
        for key in sorted(keys, key=lambda key: key.count(".")):
            if key.endswith(f".{name}"):
                return key
    return closest(plain, keys)


def did_you_mean(word: str, known: Iterable[str], then: str, others: Mapping[str, str] = MappingProxyType({})) -> str:
    """Return `then`, the end of a message, after the question "did you mean `NAME`?" if a known name is close."""
    meant = closest(word, known, others)
    return f"did you mean `{meant}`? {then[0].upper()}{then[1:]}" if meant else then
