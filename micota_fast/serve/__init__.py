"""Inference servers: our own decoder behind SGLang's HTTP API, and real SGLang processes."""
