"""The least time of the loss: what its parts compute and move, by hand for shapes that need one chunk and several."""

import pytest
import torch

from micota_fast.common.gpu_specs import GPUS
from micota_fast.kernels.chunks import Plan
from micota_fast.planning.roofline import Part, loss_parts, loss_seconds


def test_one_chunk_writes_the_gradient_once() -> None:
    n, h, v = 64, 128, 1024
    assert Plan.of(n, h, v, torch.bfloat16, "cuda").chunk_rows >= n
    assert loss_parts(n, h, v, GPUS["h100"]) == [
        Part("logits", 2 * n * h * v, 2 * (n * h + v * h + n * v), product=True),
        Part("softmax", 0, 2 * 2 * n * v),
        Part("d hidden", 2 * n * h * v, 2 * (n * v + v * h + n * h), product=True),
        Part("d weight", 2 * n * h * v, 2 * (n * v + n * h + v * h), product=True),
    ]


def test_several_chunks_read_the_weight_again_and_sum_its_gradient_in_float32() -> None:
    n, h, v = 16_384, 3584, 152_064
    assert Plan.of(n, h, v, torch.bfloat16, "cuda").chunk_rows == 4096
    parts = {part.name: part for part in loss_parts(n, h, v, GPUS["h100"])}
    assert parts["logits"].bytes == 2 * (n * h + 4 * v * h + n * v)
    assert parts["d weight"].bytes == 2 * (n * v + n * h) + 7 * 4 * v * h
    assert parts["d weight rounded"].bytes == 6 * v * h


@pytest.mark.parametrize(
    ("gpu", "v", "reads_and_writes"),
    [("h100", 151_936, 2), ("a100", 151_936, 2), ("b200", 262_144, 2), ("h100", 262_144, 3), ("a10g", 151_936, 3)],
)
def test_the_second_read_of_a_row_is_free_if_the_rows_of_all_sms_fit_in_the_cache(
    gpu: str, v: int, reads_and_writes: int
) -> None:
    parts = {part.name: part for part in loss_parts(1024, 896, v, GPUS[gpu])}
    assert parts["softmax"].bytes == reads_and_writes * 2 * 1024 * v


def test_a_frozen_output_matrix_has_two_products() -> None:
    parts = {frozen: loss_parts(16_384, 3584, 152_064, GPUS["h100"], frozen=frozen) for frozen in (True, False)}
    assert parts[True] == parts[False][:3]
    assert [part.name for part in parts[False][3:]] == ["d weight", "d weight rounded"]


def test_a_part_is_bound_by_what_takes_longer() -> None:
    gpu = GPUS["h100"]
    assert Part("", 989e12, 1).seconds(gpu) == 1
    assert Part("", 989e12, 6.7e12).seconds(gpu) == 2


@pytest.mark.parametrize(("h", "least", "most"), [(896, 1.2, 1.3), (2048, 1.1, 1.15), (4096, 1.04, 1.06)])
def test_the_smaller_the_hidden_size_the_more_the_softmax_weighs(h: int, least: float, most: float) -> None:
    whole, products = loss_seconds(8192, h, 151_936, GPUS["h100"])
    assert least < whole / products < most
