"""The merge methods: for each, what its file may say and how its task vectors are thinned out and put together.

A method is an entry of `METHODS`, read by the check of a file (mergekit.py), by the arithmetic (tensor_merge.py) and by
the model card. A new one touches this file and its test, and kernels.py if it needs arithmetic of its own.

Sources: the papers named in `METHODS`; slerp: Shoemake 1985. Where implementations differ, the order of operations is
mergekit 0.1.5's: sparsify -> rescale -> weight -> sign consensus -> sum -> normalize -> lambda -> add to the base.

Recipes are checked against this table without numba: functions import the kernels when a tensor is merged.
"""

import hashlib
import math
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from micota_fast.errors import InputError
from micota_fast.merge.settings import Parameter, Scalar, number, truth

if TYPE_CHECKING:
    from micota_fast.merge.kernels import Drops

Combine = Literal["weighted sum", "task vectors", "agreeing task vectors"]
Rescale = Literal["l1", "density", "none"]
Pass = tuple[int, Callable[[int, int], Any]]
"""A number of elements, and what to do with a chunk of them, from `start` to `stop`."""
DropsOf = Callable[[int, int], "Drops"]
"""Which elements of each task vector are dropped from the chunk `start` to `stop`."""
Floats = NDArray[np.float32]

_L1_FLOOR = 1e-7  # mergekit leaves a task vector alone whose sum of magnitudes is below this, before or after masking
_NORM_FLOOR = 1e-8  # and does not normalize a tensor of a lesser norm
WEIGHT_FLOOR = 1e-8  # nor by weights of a lesser sum
_COLLINEAR = 0.9995  # cosine beyond which slerp is linear


@dataclass(frozen=True)
class Scalars:
    """The parameters of one tensor; `of_models` by name, each in the order of the inputs."""

    of_models: Mapping[str, tuple[float, ...]]
    normalize: bool = False
    rescale: Rescale = "none"
    lambda_: float = 1.0

    @property
    def weights(self) -> tuple[float, ...]:
        return self.of_models["weight"]

    @property
    def densities(self) -> tuple[float, ...]:
        return self.of_models["density"]


class TensorInPasses(Protocol):
    """One tensor of every model, as a method sees it (`tensor_merge.TensorMerge`)."""

    name: str
    seed: int
    scalars: Sequence[Scalars]  # one for each result; all but the weights is the same in all
    size: int  # elements that all models have
    row_length: int  # of a matrix, its inputs; of a vector, all of it

    def run(self, start: int, stop: int, kernel: Callable[..., int], *arguments: Any) -> None:
        """Run a pass of `kernels` over the chunk. Raises InputError naming the model that is not finite."""


@dataclass(frozen=True)
class MethodSpec:
    """A merge method.

    Args:
        title, url: its name and source, for people.
        combine: how weighted task vectors, or the models themselves ("weighted sum"), make the result.
        of_models: parameters that each model may set, or the file for all of them.
        of_file: parameters that only the file sets.
        weight: the parameter that gives the models' weights.
        starts_at_base: the base model is where the merge starts; otherwise it is one of the models to merge.
        one_model: exactly one model is merged into the base.
        normalize, rescale: defaults.
        sparsify: passes that decide which elements of the task vectors are dropped. Called where a density is below 1.
        weigh: passes that turn the file's weights into those of the sum, float32 [results, models].
        mistake: says what is wrong with the parameters of a tensor, if anything.
    """

    title: str
    url: str
    combine: Combine
    of_models: tuple[str, ...] = ("weight",)
    of_file: tuple[str, ...] = ("normalize", "lambda", "int8_mask")
    weight: str = "weight"
    starts_at_base: bool = True
    one_model: bool = False
    normalize: bool = False
    rescale: Rescale = "none"
    sparsify: Callable[[TensorInPasses], Generator[Pass, list[Any], DropsOf]] | None = None
    weigh: Callable[[TensorInPasses], Generator[Pass, list[Any], Floats]] | None = None
    mistake: Callable[[Scalars], str | None] | None = None


# -- linear


def _weights_cancel(scalars: Scalars) -> str | None:
    if scalars.normalize and abs(sum(scalars.weights)) < WEIGHT_FLOOR:
        return "the weights sum to 0, so `normalize: true` cannot divide by their sum"
    return None


# -- slerp


def _place_on_arc(tensor: TensorInPasses) -> Generator[Pass, list[Any], Floats]:
    """Weights of the base and of the model, from the angle between the two."""
    from micota_fast.merge import kernels

    def products(start: int, stop: int) -> NDArray[np.float64]:
        sums = np.empty(3)
        tensor.run(start, stop, kernels.products, sums)
        return sums

    parts = yield tensor.size, products
    aa, bb, ab = (math.fsum(part[i] for part in parts) for i in range(3))
    norms = [norm if norm > _NORM_FLOOR else 1.0 for norm in (math.sqrt(aa), math.sqrt(bb))]
    cosine = min(1.0, max(-1.0, ab / norms[0] / norms[1]))
    pairs = []
    for each in tensor.scalars:
        (t,) = each.weights
        if abs(cosine) > _COLLINEAR:
            pairs.append((1 - t, t))
        else:
            angle = math.acos(cosine)
            pairs.append((math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)))
    return np.array(pairs, np.float32)


# -- DARE: at random


def mask_key(seed: int, tensor: str, index: int) -> tuple[int, int]:
    """Return the key of the random stream (`kernels.random_words`) that masks a tensor of input number `index`.

    It is a digest of these three alone. So the mask depends neither on the order of tensors, nor on threads, nor on how
    checkpoints are sharded, and two inputs of one merge have independent masks.
    """
    digest = hashlib.sha256(f"{seed}\0{tensor}\0{index}".encode()).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")


def keep_limit(density: float) -> int:
    """Return the number below which a share `density` of all 32-bit words lies."""
    return min(round(density * 2**32), 2**32 - 1)


def _drop_at_random(tensor: TensorInPasses) -> Generator[Pass, list[Any], DropsOf]:
    from micota_fast.merge import kernels

    shared = tensor.scalars[0]
    drops = kernels.keep_all(len(shared.densities))
    for k, density in enumerate(shared.densities):
        if density < 1:
            drops.kinds[k] = kernels.AT_RANDOM
            drops.keys[k] = mask_key(tensor.seed, tensor.name, k)
            drops.limits[k] = keep_limit(density)
    drops.scales[:] = yield from _scales(tensor, lambda start, stop: drops)
    return lambda start, stop: drops


def _scales(tensor: TensorInPasses, drops_of: DropsOf) -> Generator[Pass, list[Any], Floats]:
    """What the elements that stay are multiplied by, [task vectors], as `rescale` says; a pass where that is l1."""
    from micota_fast.merge import kernels

    shared = tensor.scalars[0]
    count = len(shared.densities)
    if shared.rescale != "l1":
        return np.array([_density_scale(shared, density) for density in shared.densities], np.float32)

    def magnitudes(start: int, stop: int) -> NDArray[np.float64]:
        sums = np.zeros((count, 2))
        tensor.run(start, stop, kernels.magnitudes, drops_of(start, stop), sums)
        return sums

    parts = yield tensor.size, magnitudes
    scales = np.ones(count, np.float32)
    for k, density in enumerate(shared.densities):
        if density < 1:
            scales[k] = _l1_scale(*(math.fsum(part[k, i] for part in parts) for i in range(2)))
    return scales


def _density_scale(scalars: Scalars, density: float) -> float:
    return 1 / density if scalars.rescale == "density" and 0 < density < 1 else 1.0


def _l1_scale(before: float, after: float) -> float:
    return before / after if before >= _L1_FLOOR and after >= _L1_FLOOR else 1.0


# -- TIES: the smallest


class _Within(NamedTuple):
    """What a chunk has of each task vector's bin, as a histogram, and sums of magnitudes: all, and in higher bins."""

    start: int
    counts: NDArray[np.uint32]  # [task vectors, 2^FINE_BITS]
    sums: NDArray[np.float64]


def _drop_smallest(tensor: TensorInPasses) -> Generator[Pass, list[Any], DropsOf]:
    """Of each task vector the largest magnitudes stay, at least one unless the density is 0; of equals the first."""
    from micota_fast.merge import kernels

    shared = tensor.scalars[0]
    count = len(shared.densities)
    coarse = yield from _histograms(tensor)
    bins = []  # in which the smallest magnitude that stays lies, and how many of the bin stay
    for counts, density in zip(coarse, shared.densities, strict=True):
        keep = max(1, int(density * tensor.size)) if density > 0 else 0
        at_least = counts[::-1].cumsum()[::-1]  # how many lie in a bin or above it
        bin_ = int(np.flatnonzero(at_least >= keep)[-1])
        bins.append((bin_, keep - int(at_least[bin_] - counts[bin_])))

    def count_within(start: int, stop: int) -> _Within:
        counts = np.zeros((count, 1 << kernels.FINE_BITS), np.uint32)
        sums = np.zeros((count if shared.rescale == "l1" else 0, 2))
        tensor.run(start, stop, kernels.count_within, np.array([bin_ for bin_, _ in bins]), counts, sums)
        return _Within(start, counts, sums)

    parts: list[_Within] = yield tensor.size, count_within
    drops = {part.start: kernels.keep_all(count) for part in parts}
    for k, (density, (bin_, keep)) in enumerate(zip(shared.densities, bins, strict=True)):
        if density >= 1:
            continue
        counts = np.zeros(1 << kernels.FINE_BITS, np.int64)
        for part in parts:
            counts += part.counts[k]
        at_least = counts[::-1].cumsum()[::-1]
        enough = np.flatnonzero(at_least >= keep)
        last = int(enough[-1]) if enough.size else 0  # else zeros stay, too, and none of them matters
        stay = counts[last:].copy()
        stay[0] = spare = min(int(counts[last]), keep - int(at_least[last] - counts[last]))
        scale = _density_scale(shared, density)
        if shared.rescale == "l1":
            bits = np.arange(last, 1 << kernels.FINE_BITS, dtype=np.uint32) + np.uint32(bin_ << kernels.FINE_BITS)
            in_bin = (bits.view(np.float32).astype(np.float64) * stay)[stay > 0]
            kept = math.fsum(part.sums[k, 1] for part in parts) + math.fsum(in_bin)
            scale = _l1_scale(math.fsum(part.sums[k, 0] for part in parts), kept)
        limit = (bin_ << kernels.FINE_BITS) + last
        for part in parts:
            equal = int(part.counts[k, last])
            here = drops[part.start]
            here.kinds[k], here.scales[k] = kernels.SMALLEST, scale
            here.limits[k], here.spares[k] = limit, min(spare, equal)
            if spare >= equal and limit > 0:  # all that equal the limit stay; only zeros equal a limit of 0
                here.limits[k], here.spares[k] = limit - 1, 0
            spare -= min(spare, equal)
    return lambda start, stop: drops[start]


def _histograms(tensor: TensorInPasses) -> Generator[Pass, list[Any], NDArray[np.int64]]:
    """Histograms of the task vectors' magnitudes, [task vectors, 2^COARSE_BITS]."""
    from micota_fast.merge import kernels

    total = np.zeros((len(tensor.scalars[0].densities), 1 << kernels.COARSE_BITS), np.int64)
    lock = threading.Lock()

    def count(start: int, stop: int) -> None:
        counts = np.zeros(total.shape, np.uint32)
        tensor.run(start, stop, kernels.count_magnitudes, counts)
        with lock:
            np.add(total, counts, out=total)

    yield tensor.size, count
    return total


# -- Model Breadcrumbs: the smallest and the largest


def _drop_outliers(tensor: TensorInPasses) -> Generator[Pass, list[Any], DropsOf]:
    """Drop the largest magnitudes, a share `gamma`, and as many of the smallest as leave the share `density`.

    If the density leaves fewer than gamma to drop, all that are dropped are the largest. Of equal magnitudes the first
    counts as the smallest.
    """
    from micota_fast.merge import kernels

    shared, size = tensor.scalars[0], tensor.size
    count = len(shared.densities)
    keep = [int(density * size) for density in shared.densities]
    first = [max(0, size - n - int(gamma * size)) for n, gamma in zip(keep, shared.of_models["gamma"], strict=True)]
    # Places in the order by magnitude: of the smallest that stays, and of the first that is dropped beyond.
    places_K2 = np.array([(low, low + n) for low, n in zip(first, keep, strict=True)])
    coarse = yield from _histograms(tensor)
    bins_K2, places_K2 = _bins(coarse, places_K2)
    fine = np.zeros((2, count, 1 << kernels.FINE_BITS), np.int64)
    lock = threading.Lock()

    def count_within(start: int, stop: int) -> None:
        for i in range(2):
            counts = np.zeros(fine[i].shape, np.uint32)
            tensor.run(start, stop, kernels.count_within, bins_K2[:, i].copy(), counts, np.empty((0, 2)))
            with lock:
                np.add(fine[i], counts, out=fine[i])

    yield tensor.size, count_within
    edges_K2 = np.zeros((count, 2), np.uint32)  # magnitudes at the two places
    equal_K2 = np.zeros((count, 2), np.int64)  # how many that equal them come before
    for k in range(count):
        for i in range(2):
            bin_, place = int(bins_K2[k, i]), int(places_K2[k, i])
            if bin_ == len(coarse[k]):  # beyond the largest
                edges_K2[k, i] = 1 << (kernels.COARSE_BITS + kernels.FINE_BITS)
                continue
            place -= int(coarse[k, bin_] - fine[i, k].sum())  # zeros, which the histogram leaves out, come first
            within, places = _bins(fine[i, k : k + 1], np.array([[place]]))
            edges_K2[k, i] = (bin_ << kernels.FINE_BITS) + int(within[0, 0]) if place >= 0 else 0
            equal_K2[k, i] = int(places[0, 0]) if place >= 0 else 0

    def count_equal(start: int, stop: int) -> tuple[int, NDArray[np.int64]]:
        counts = np.zeros((count, 2), np.int64)
        tensor.run(start, stop, kernels.count_equal, edges_K2, counts)
        return start, counts

    chunks: list[tuple[int, NDArray[np.int64]]] = yield tensor.size, count_equal
    drops = {}
    for start, counts_K2 in chunks:
        drops[start] = here = kernels.keep_all(count)
        before_K2 = equal_K2.clip(0, counts_K2)
        equal_K2 -= before_K2
        for k, density in enumerate(shared.densities):
            if density < 1:
                here.kinds[k] = kernels.OUTSIDE
                here.limits[k], here.uppers[k] = edges_K2[k]
                here.skips[k], here.spares[k] = before_K2[k]
                if edges_K2[k, 0] == edges_K2[k, 1]:
                    here.spares[k] -= here.skips[k]
    scales = yield from _scales(tensor, lambda start, stop: drops[start])
    for here in drops.values():
        here.scales[:] = scales
    return lambda start, stop: drops[start]


def _bins(counts_KB: NDArray[np.int64], places_KN: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """In which bin of a histogram an element lies whose place in ascending order is known, and its place in there.

    Beyond the last element the bin is the number of bins.
    """
    up_to = counts_KB.cumsum(axis=1)
    bins = np.array([np.searchsorted(row, places, "right") for row, places in zip(up_to, places_KN, strict=True)])
    below = np.pad(up_to, ((0, 0), (1, 0)))
    return bins, places_KN - np.take_along_axis(below, bins, axis=1)


# -- DELLA: at random, the larger the likelier to stay


def _drop_by_rank(tensor: TensorInPasses) -> Generator[Pass, list[Any], DropsOf]:
    """Drop at random; within each row of a matrix the probability to stay rises with the magnitude's rank.

    It rises from density - epsilon to density + epsilon. As ranks need whole rows, each pass sorts them again.
    """
    from micota_fast.merge import kernels

    shared = tensor.scalars[0]
    drops = kernels.keep_all(len(shared.densities))
    for k, density in enumerate(shared.densities):
        if density < 1:  # a density of 0 drops all, at random words below 0
            drops.kinds[k] = kernels.CHOSEN if density > 0 else kernels.AT_RANDOM
            drops.keys[k] = mask_key(tensor.seed, tensor.name, k)
    densities_K, epsilons_K = np.array(shared.densities), np.array(shared.of_models["epsilon"])

    def drops_of(start: int, stop: int) -> "Drops":
        here = drops._replace(stays=np.empty((len(densities_K), stop - start), np.uint8))
        row = tensor.row_length
        low, high = start // row * row, -(-stop // row) * row
        tensor.run(low, high, kernels.choose_by_rank, row, start, here, densities_K, epsilons_K)
        return here

    drops.scales[:] = yield from _scales(tensor, drops_of)
    return drops_of


def _share_out_of_bounds(scalars: Scalars) -> str | None:
    for density, epsilon in zip(scalars.densities, scalars.of_models["epsilon"], strict=True):
        if 0 < density < 1 and not 0 < density - epsilon <= density + epsilon < 1:
            return (
                f"`density` {density:g} with `epsilon` {epsilon:g}: density - epsilon and density + epsilon must lie "
                "between 0 and 1"
            )
    return None


def _rescale(key: str, value: Any) -> Scalar:
    if value in (True, False):
        return "l1" if value else "none"
    if value not in ("l1", "density"):
        raise InputError(f"`{key}` must be true, false, l1 or density, not {value!r}")
    return str(value)


PARAMETERS = {
    "weight": Parameter(number()),
    "density": Parameter(number(0, 1), 1.0),
    "gamma": Parameter(number(0, 1), 0.01),
    "epsilon": Parameter(number(0, 1), 0.15),
    "t": Parameter(number()),
    "normalize": Parameter(truth),
    "rescale": Parameter(_rescale),
    "lambda": Parameter(number(), 1.0),
    "int8_mask": Parameter(truth, False),
}
"""Every parameter of a file, by name."""

_SPARSE = ("weight", "density")
_OF_FILE = ("normalize", "lambda", "int8_mask", "rescale")
METHODS: dict[str, MethodSpec] = {
    "linear": MethodSpec(
        "Linear",
        "https://arxiv.org/abs/2203.05482",
        "weighted sum",
        of_file=("normalize",),
        starts_at_base=False,
        normalize=True,
        mistake=_weights_cancel,
    ),
    "task_arithmetic": MethodSpec("Task Arithmetic", "https://arxiv.org/abs/2212.04089", "task vectors"),
    "slerp": MethodSpec(
        "SLERP",
        "https://en.wikipedia.org/wiki/Slerp",
        "weighted sum",
        of_models=(),
        of_file=("t",),
        weight="t",
        one_model=True,
        weigh=_place_on_arc,
    ),
    "ties": MethodSpec(
        "TIES",
        "https://arxiv.org/abs/2306.01708",
        "agreeing task vectors",
        _SPARSE,
        _OF_FILE,
        normalize=True,
        sparsify=_drop_smallest,
    ),
    "dare_linear": MethodSpec(
        "Linear DARE",
        "https://arxiv.org/abs/2311.03099",
        "task vectors",
        _SPARSE,
        _OF_FILE,
        rescale="l1",
        sparsify=_drop_at_random,
    ),
    "dare_ties": MethodSpec(
        "DARE TIES",
        "https://arxiv.org/abs/2311.03099",
        "agreeing task vectors",
        _SPARSE,
        _OF_FILE,
        rescale="l1",
        sparsify=_drop_at_random,
    ),
    "breadcrumbs": MethodSpec(
        "Model Breadcrumbs",
        "https://arxiv.org/abs/2312.06795",
        "task vectors",
        (*_SPARSE, "gamma"),
        _OF_FILE,
        sparsify=_drop_outliers,
    ),
    "breadcrumbs_ties": MethodSpec(
        "Model Breadcrumbs with TIES",
        "https://arxiv.org/abs/2312.06795",
        "agreeing task vectors",
        (*_SPARSE, "gamma"),
        _OF_FILE,
        sparsify=_drop_outliers,
    ),
    "della": MethodSpec(
        "DELLA",
        "https://arxiv.org/abs/2406.11617",
        "agreeing task vectors",
        (*_SPARSE, "epsilon"),
        _OF_FILE,
        normalize=True,
        rescale="l1",
        sparsify=_drop_by_rank,
        mistake=_share_out_of_bounds,
    ),
    "della_linear": MethodSpec(
        "Linear DELLA",
        "https://arxiv.org/abs/2406.11617",
        "task vectors",
        (*_SPARSE, "epsilon"),
        _OF_FILE,
        rescale="l1",
        sparsify=_drop_by_rank,
        mistake=_share_out_of_bounds,
    ),
}
