"""Fine-tuning on packed documents, in one process or under torchrun: `python -m micota_fast.train CONFIG.yaml`.

`micota_fast.train(config)` calls `micota_fast.train.loop.train`.
"""

from micota_fast.common.importing import make_callable

make_callable(__name__, f"{__name__}.loop:train")
