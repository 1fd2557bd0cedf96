"""Decoders of the Qwen2, Qwen3 and Llama families on packed tokens, read from and written to Hugging Face checkpoints."""
