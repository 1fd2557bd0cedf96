"""The smallest run of the small world that still has all of it."""

SMALL = [
    "seeds=[1]",
    "problems.train.limit=24",
    "train.max_steps=4",
    "train.checkpoint_every=1",
    "generate.max_new_tokens=384",
    "evaluate.max_new_tokens=384",
    "evaluate.benchmarks=[{name: press-4, path: ../micro/problems/press-4.jsonl, limit: 12}]",
]
