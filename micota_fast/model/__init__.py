"""Decoders of the Qwen2, Qwen3 and Llama families on packed tokens, in and out of Hugging Face checkpoints."""
