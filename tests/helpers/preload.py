"""What the tests' fork server does once, so that the processes it forks start without the seconds this takes."""

import gc

import numpy as np
import torch

torch.set_num_threads(1)

import micota_fast.train.loop  # noqa: E402, F401  (after the threads are set: no pool of them may be there to fork)
from micota_fast.data.packing import pack  # noqa: E402

pack(np.array([3, 2]), 4)  # numba takes a second to load what it has compiled
gc.collect()
gc.freeze()  # the children neither scan nor copy what is there already
