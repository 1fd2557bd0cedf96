"""The engine's merge of plain arrays: every pass of a method, a chunk at a time, without files."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from micota_fast.merge import tensor_merge
from micota_fast.merge.inputs import Source
from micota_fast.merge.methods import METHODS, PARAMETERS, Scalars
from micota_fast.merge.tensor_merge import TensorMerge

Array = NDArray[np.float32]
NAME = "model.layers.0.mlp.up_proj.weight"


def source(tensor: Array, where: str = "x") -> Source:
    return Source(tensor, "F32", tensor.shape, where, -1, 0)


def merge_arrays(
    method: str,
    base: Array,
    tensors: Sequence[Array],
    weights: Sequence[float] | Sequence[Sequence[float]],
    densities: Sequence[float] | None = None,
    *,
    normalize: bool = False,
    rescale: Any = "none",
    lambda_: float = 1.0,
    seed: int = 0,
    own: Mapping[str, Sequence[float]] | None = None,
) -> Any:
    """Merge through the engine's passes. Several lists of weights give several results.

    Args:
        own: what each model sets besides weight and density; absent: the defaults.
    """
    spec = METHODS[method]
    several = isinstance(weights[0], list | tuple)
    lists: Any = weights if several else [weights]
    densities = densities or [1.0] * len(tensors)
    of_models = {name: (PARAMETERS[name].default,) * len(tensors) for name in spec.of_models}
    of_models |= {"density": tuple(densities)} | {name: tuple(values) for name, values in (own or {}).items()}
    scalars = [Scalars(of_models | {"weight": tuple(each)}, normalize, rescale, lambda_) for each in lists]
    sources = [source(t) for t in ([base, *tensors] if spec.starts_at_base else tensors)]
    results = [bytearray(sources[0].elements.nbytes) for _ in scalars]

    def writer(result: bytearray) -> Any:
        def write(offset: int, piece: memoryview) -> None:
            result[offset : offset + len(piece)] = piece

        return write

    one = TensorMerge(
        NAME,
        spec,
        scalars,
        sources,
        0,
        "F32",
        seed,
        [writer(r) for r in results],
    )
    passes = one.passes()
    size, work = next(passes)
    try:
        while True:
            starts = range(0, size, tensor_merge.CHUNK)
            size, work = passes.send([work(low, min(low + tensor_merge.CHUNK, size)) for low in starts])
    except StopIteration:
        pass
    arrays = [np.frombuffer(bytes(result), np.float32) for result in results]
    return arrays if several else arrays[0]


def f32(*values: float) -> Array:
    return np.array(values, dtype=np.float32)
