"""What somebody probably meant who wrote a name that is not known: the field's other spellings, and the closest one."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

# Names of TRL, transformers, LLaMA-Factory, axolotl, vLLM and lm-evaluation-harness -> ours, which take the same value.
SAME_KEYS = {
    "adam_epsilon": "eps",
    "api_base": "url",
    "base_model": "model",
    "base_url": "url",
    "block_size": "pack_tokens",
    "cutoff_len": "pack_tokens",
    "cutoff_length": "pack_tokens",
    "data_parallel_size": "dp",
    "data_path": "data",
    "dataset": "data",
    "dataset_name": "data",
    "endpoint": "url",
    "epoch": "epochs",
    "eval_dataset": "validation_data",
    "eval_steps": "validate_every",
    "gradient_clip": "max_grad_norm",
    "gradient_clip_val": "max_grad_norm",
    "gradient_clipping": "max_grad_norm",
    "hub_model_id": "push_to_hub",
    "learning_rate": "lr",
    "logging_steps": "log_every",
    "lora_dim": "rank",
    "lora_r": "rank",
    "max_completion_length": "max_new_tokens",
    "max_examples": "limit",
    "max_gen_toks": "max_new_tokens",
    "max_length": "pack_tokens",
    "max_model_len": "context_length",
    "max_num_seqs": "max_running",
    "max_output_tokens": "max_new_tokens",
    "max_samples": "limit",
    "max_seq_len": "pack_tokens",
    "max_seq_length": "pack_tokens",
    "max_tokens": "max_new_tokens",
    "model_name": "model",
    "model_name_or_path": "model",
    "model_path": "model",
    "n": "samples",
    "n_samples": "samples",
    "nproc_per_node": "nproc",
    "num_epochs": "epochs",
    "num_examples": "limit",
    "num_generations": "samples",
    "num_problems": "limit",
    "num_processes": "nproc",
    "num_return_sequences": "samples",
    "num_train_epochs": "epochs",
    "output": "out",
    "output_dir": "out",
    "output_path": "out",
    "pretrained": "model",
    "random_seed": "seed",
    "repeats": "samples",
    "request_timeout": "request_timeout_s",
    "save_steps": "checkpoint_every",
    "save_total_limit": "keep_checkpoints",
    "sequence_len": "pack_tokens",
    "server_url": "url",
    "system_instruction": "system",
    "system_message": "system",
    "system_prompt": "system",
    "temp": "temperature",
    "tensor_parallel_size": "tp",
    "timeout": "request_timeout_s",
    "torch_compile": "compile",
    "torch_dtype": "dtype",
    "train_file": "data",
}
# The same, of another unit, type or scope: a value for theirs is none for ours.
RELATED_KEYS = {
    "adam_beta1": "betas",
    "adam_beta2": "betas",
    "api_key": "key_env",
    "apply_chat_template": "use_template",
    "attn_implementation": "attention",
    "backend": "engine",
    "batch_size": "packs_per_step",
    "best_of": "samples",
    "bf16": "dtype",
    "datasets": "data",
    "deepspeed": "shard",
    "device_map": "device",
    "do_sample": "temperature",
    "early_stopping_patience": "early_stop",
    "enable_thinking": "template_kwargs",
    "eval_strategy": "validate_every",
    "evaluation_strategy": "validate_every",
    "fewshot": "prompt",
    "finetuning_type": "lora",
    "flash_attention": "attention",
    "flash_attn": "attention",
    "fp16": "dtype",
    "freeze_parameters": "freeze",
    "fsdp": "shard",
    "fsdp_config": "shard",
    "global_batch_size": "packs_per_step",
    "gpu_memory_utilization": "args",
    "gradient_accumulation_steps": "packs_per_step",
    "gradient_checkpointing": "activation_checkpointing",
    "kv_cache_dtype": "args",
    "log_samples": "out",
    "logging_dir": "tensorboard",
    "lr_scheduler_type": "min_lr_ratio",
    "max_num_batched_tokens": "args",
    "mem_fraction_static": "args",
    "metric": "rule",
    "metrics": "rule",
    "micro_batch_size": "packs_per_step",
    "num_fewshot": "prompt",
    "openai_api_key": "key_env",
    "optim": "optimizer_states",
    "peft": "lora",
    "peft_config": "lora",
    "per_device_train_batch_size": "packs_per_step",
    "prompt_template": "prompt",
    "quantization": "args",
    "reasoning_parser": "args",
    "report_to": "wandb",
    "save_strategy": "checkpoint_every",
    "stop_sequences": "stop",
    "stop_strings": "stop",
    "task": "benchmarks",
    "tasks": "benchmarks",
    "teacher": "models",
    "teacher_model": "models",
    "teacher_model_name_or_path": "models",
    "until": "stop",
    "use_peft": "lora",
    "val_set_size": "validation_data",
    "val_size": "validation_data",
    "wandb_project": "wandb",
    "warmup": "warmup_ratio",
    "warmup_steps": "warmup_ratio",
}
OTHER_KEYS = SAME_KEYS | RELATED_KEYS
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
    Another project's name whose meaning no option has is not taken for a similar one of ours.

    Args:
        word: as it was written, with _ or -.
        keys: dotted keys of the options.
    """
    plain = word.lower().replace("-", "_")
    here = [key for key in keys if "." not in key]
    for name in (plain, OTHER_KEYS.get(plain, plain)):
        if name in here:
            return name
    near = difflib.get_close_matches(plain, here, n=1, cutoff=0.85)
    if near and plain not in OTHER_KEYS:  # `seed` of a recipe is `seeds`
        return near[0]
    for name in (plain, OTHER_KEYS.get(plain, plain)):
        for key in sorted(keys, key=lambda key: key.count(".")):
            if key.endswith(f".{name}"):
                return key
    return None if plain in OTHER_KEYS else closest(plain, keys)


def did_you_mean(word: str, known: Iterable[str], then: str, others: Mapping[str, str] = MappingProxyType({})) -> str:
    """Return `then`, the end of a message, after the question "did you mean `NAME`?" if a known name is close."""
    meant = closest(word, known, others)
    return f"did you mean `{meant}`? {then[0].upper()}{then[1:]}" if meant else then
