"""Fine-tuning on packed documents, in one process or under torchrun: `python -m micota_fast.train CONFIG.yaml`."""
