"""The loss's kernels compiled for GPUs that are not here: registers, spills, shared memory and instructions.

One process compiles what the production code launches, with the arguments, types and specialisations that Triton's JIT
derives from them; of a GPU it has the name alone. Tests read what it found in the cubins.
"""

import json
import os
import re
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest

from helpers.cubins import SHARED_LIMIT
from micota_fast.kernels.reverse_targets import ReverseRows
from micota_fast.kernels.soft_targets import SoftRows
from micota_fast.kernels.triton_chunk import NUM_WARPS

CHIPS = {80: "A100", 90: "H100", 100: "B200"}  # compute capability
# What multiplies tiles of bfloat16 into float32 on tensor cores.
TENSOR_CORES = {80: r"HMMA\.16816\.F32\.BF16", 90: r"HGMMA\.64x\d+x16\.F32\.BF16", 100: r"UTCHMMA"}
FLAGS = ("WANT_GRADIENT", "FILTER", "REVERSE", "FIRST", "HOT", "MIXED", "K")
MOST = 128  # tokens of a distribution
PADDED, ODD = 2 * 8192, 2 * 8192 + 7  # columns: of a vocabulary padded as they are, and of one that is not


@dataclass(frozen=True)
class Kernel:
    """A kernel as compiled for one chip."""

    name: str
    chip: int
    dtype: str
    columns: int
    flags: dict[str, Any]
    registers: int
    spilled: int  # bytes of stack and local memory of a thread
    shared: int  # bytes of a block, fixed and at launch
    instructions: list[str] | None  # where they were listed, which takes longer than to compile

    def __str__(self) -> str:
        return f"{self.name} {self.dtype} {self.columns} {self.flags}"

    def count(self, pattern: str) -> int:
        assert self.instructions is not None
        return sum(1 for name in self.instructions if re.fullmatch(pattern, name))


def compile_all(out: Path) -> None:
    """Write the kernels to `out`; in a process whose Triton compiles, and does not interpret."""
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    from helpers.cubins import inspect_cubin
    from micota_fast.kernels import in_place, triton_chunk

    chip, call, found = 0, {}, {}

    class Driver:
        """All that compilation asks of a GPU."""

        def get_current_device(self) -> int:
            return chip  # Triton keeps what it compiles by device

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", chip, 32)

    run = JITFunction.run

    def compile_only(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        compiled = run(kernel, *args, grid=grid, warmup=True, **options)
        flags = {name: options[name] for name in FLAGS if name in options}
        if compiled.hash not in found:
            facts = inspect_cubin(compiled, out.parent, call["listed"])
            what = {"name": kernel.__name__, "chip": chip, "flags": flags, **call["what"]}
            found[compiled.hash] = asdict(Kernel(**what, **facts))

    triton.runtime.driver.set_active(Driver())
    JITFunction.run = compile_only
    torch.mm = lambda *args, **options: None  # cuBLAS's part

    def launch(dtype: torch.dtype, columns: int, listed: bool = False, **how: Any) -> None:
        call.update(what={"dtype": str(dtype).removeprefix("torch."), "columns": columns}, listed=listed)
        rows, h, aligned = 64, 64, -(-columns // 64) * 64
        how = {"threshold": 0.0, "scale": torch.ones(()), "first": True, "grad_CH": None, "grad_VH": None} | how
        how.setdefault("soft", None)
        triton_chunk.triton_chunk(
            torch.zeros(rows, h, dtype=dtype),
            torch.zeros(columns, h, dtype=dtype),
            torch.zeros(rows, dtype=torch.int64),
            logits_CV=torch.zeros(rows, aligned, dtype=dtype)[:, :columns],
            ignore_index=-100,
            nll_C=torch.zeros(rows),
            **how,
        )

    def distributions(k: int, temperature: float, mixed: bool) -> SoftRows:
        parts = torch.zeros(64, k, dtype=torch.int64), torch.zeros(64, k), *(torch.zeros(64) for _ in range(3))
        return SoftRows(*parts, temperature, mixed)

    for chip in CHIPS:  # noqa: B007 (Driver reads it)
        for dtype in (torch.float32, torch.bfloat16):
            hidden, weight = torch.zeros(64, 64, dtype=dtype), torch.zeros(PADDED, 64, dtype=dtype)
            # Listed: the loss as trained with, and the products with the row filter.
            launch(dtype, PADDED, listed=True, grad_VH=weight)
            launch(dtype, PADDED, listed=True, grad_CH=hidden, grad_VH=weight, threshold=0.1)
            if dtype == torch.bfloat16:
                odd = torch.zeros(ODD, 64, dtype=dtype)
                launch(dtype, ODD, listed=True, grad_VH=odd)
                launch(dtype, ODD, listed=True, grad_CH=hidden, grad_VH=odd, threshold=0.1)
            reverse = ReverseRows(torch.zeros(64), torch.zeros(64))
            launch(dtype, PADDED, listed=True, grad_VH=weight, reverse=reverse)
            launch(dtype, PADDED)
            launch(dtype, PADDED, grad_VH=weight, scale=torch.ones(64))
            launch(dtype, PADDED, grad_CH=hidden, threshold=0.1, scale=torch.ones(64))
            launch(dtype, PADDED, grad_VH=weight.float(), threshold=0.1)
            launch(dtype, PADDED, grad_VH=weight.float(), threshold=0.1, first=False)
            in_place.multiply_in_place(hidden, torch.ones(()))
            launch(dtype, PADDED, listed=True, grad_VH=weight, soft=distributions(MOST, 2.0, True))
            if dtype == torch.bfloat16:
                for temperature, mixed in ((1.0, False), (2.0, False), (1.0, True)):
                    launch(dtype, PADDED, listed=True, grad_VH=weight, soft=distributions(MOST, temperature, mixed))
                launch(dtype, PADDED, soft=distributions(MOST, 2.0, True))
                launch(dtype, PADDED, grad_VH=weight, soft=distributions(1, 1.0, False))
    out.write_text(json.dumps(list(found.values())))


pytestmark = pytest.mark.slow  # every kernel is compiled first


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> list[Kernel]:
    out = tmp_path_factory.mktemp("compiled") / "kernels.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, __file__, out], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [Kernel(**kernel) for kernel in json.loads(out.read_text())]


@pytest.mark.parametrize("chip", CHIPS)
def test_every_kernel_fits_and_spills_nothing(kernels: list[Kernel], chip: int) -> None:
    here = [kernel for kernel in kernels if kernel.chip == chip]
    for kernel in here:
        assert kernel.spilled == 0, kernel
        assert 0 < kernel.registers <= 255, kernel
        assert kernel.shared <= SHARED_LIMIT[chip], kernel
    both = ("bfloat16", "float32")
    assert {(k.name, k.dtype, *k.flags.values()) for k in here} == {
        *(
            ("softmax_rows", dtype, *how)
            for dtype in both
            for how in ((False, False, False), (True, False, False), (True, True, False), (True, False, True))
        ),
        *(("grad_hidden_kernel", dtype) for dtype in both),
        *(("grad_weight_kernel", dtype, first) for dtype in both for first in (True, False)),
        *(("multiply_kernel", dtype) for dtype in both),
        *(("soft_softmax_rows", dtype, True, True, True, MOST) for dtype in both),
        *(
            ("soft_softmax_rows", "bfloat16", True, *how, MOST)
            for how in ((False, False), (True, False), (False, True))
        ),
        ("soft_softmax_rows", "bfloat16", False, True, True, MOST),
        ("soft_softmax_rows", "bfloat16", True, False, False, 1),
    }


@pytest.mark.parametrize("chip", CHIPS)
def test_an_sm_has_room_for_one_row_at_a_time(kernels: list[Kernel], chip: int) -> None:
    """So that the rows that are read twice stay in the L2 cache; an SM of each of these chips has 65,536 registers."""
    twice = [k for k in kernels if k.chip == chip and k.dtype == "bfloat16" and k.flags.get("WANT_GRADIENT")]
    assert len(twice) >= 9
    for kernel in twice:
        assert 2 * kernel.registers * 32 * NUM_WARPS > 65_536, kernel


@pytest.mark.parametrize("chip", CHIPS)
def test_products_of_bfloat16_run_on_tensor_cores(kernels: list[Kernel], chip: int) -> None:
    products = [k for k in kernels if k.chip == chip and k.name.startswith("grad_") and k.instructions]
    assert len(products) == 6
    for kernel in products:
        if kernel.dtype == "bfloat16":
            assert kernel.count(TENSOR_CORES[chip] + r".*"), kernel
        else:  # in full: on tensor cores its factors would be rounded
            assert kernel.count(r"FFMA2?.*"), kernel
            assert not kernel.count(r"(HMMA|HGMMA|UTC\w*MMA).*"), kernel
        # Tiles come by asynchronous copies of 16 bytes, whatever the vocabulary.
        assert kernel.count(r"LDGSTS\.E\.BYPASS(\.LTC128B)?\.128") >= 2, kernel
        assert not kernel.count(r"LDG\.E\.U16"), kernel


@pytest.mark.parametrize("chip", CHIPS)
def test_rows_are_read_and_written_16_bytes_at_a_time(kernels: list[Kernel], chip: int) -> None:
    """Read by asynchronous copies. Apart from single values: target, its logit, scale; loss, padding.

    Of the reverse KL also the teacher's log-probability and share; of distributions also tokens, probabilities and
    logits, one per thread, tail, entropy and share; and the tokens' gradients.
    """
    rows = [k for k in kernels if k.chip == chip and "softmax_rows" in k.name and k.instructions]
    assert len(rows) == 6 + 2 + 5
    for kernel in rows:
        reads, writes = (3, 3) if kernel.name == "softmax_rows" else (9, 6)
        reads += 2 if kernel.flags.get("REVERSE") else 0
        assert kernel.count(r"LDGSTS\.E\.BYPASS(\.LTC128B)?\.128") >= 4, kernel
        assert kernel.count(r"LDG\.E(\.U16|\.64)?") <= reads, kernel
        assert kernel.count(r"STG\.E(\.EF)?\.128") >= 2, kernel
        assert kernel.count(r"STG\.E(\.EF)?(\.U16|\.64)?") <= writes, kernel


@pytest.mark.parametrize("chip", CHIPS)
def test_the_logit_of_the_target_is_read_before_any_warp_may_write_over_it(kernels: list[Kernel], chip: int) -> None:
    """That is before the first barrier: the interpreter, which has one thread, cannot see such a race."""
    for kernel in kernels:
        if kernel.chip == chip and kernel.name == "softmax_rows" and kernel.dtype == "bfloat16" and kernel.instructions:
            names = kernel.instructions
            barrier, row = (
                next(i for i, name in enumerate(names) if name.startswith(what)) for what in ("BAR.SYNC", "LDGSTS")
            )
            assert names.index("LDG.E.U16") < barrier
            assert barrier < row, "the end of the row is read before it is filled"


@pytest.mark.parametrize("chip", CHIPS)
def test_barriers_part_what_threads_read_and_write_of_the_tokens_of_a_distribution(
    kernels: list[Kernel], chip: int
) -> None:
    """Their logits are read, made -inf, and the row is read; at the end the row is written, and then they are."""
    checked = 0
    for kernel in kernels:
        if kernel.chip == chip and kernel.name == "soft_softmax_rows" and kernel.dtype == "bfloat16":
            if not kernel.instructions:
                continue

            def at(pattern: str, names: list[str] = kernel.instructions) -> list[int]:
                return [i for i, name in enumerate(names) if re.fullmatch(pattern, name)]

            barriers, single = at(r"BAR\.SYNC.*"), at(r"STG\.E\.U16")
            rows_read, row_written = at(r"LDGSTS\..*"), at(r"STG\.E\.EF\.128")
            n_singles = 4 if kernel.flags["MIXED"] else 3  # padding, -inf; the tokens' gradients, the hard target's
            assert len(single) == n_singles, kernel
            assert max(at(r"LDG\.E\.U16")) < barriers[0] < single[0], kernel
            assert single[1] < barriers[1] < rows_read[0], kernel
            assert any(max(row_written) < barrier < single[2] for barrier in barriers), kernel
            checked += 1
    assert checked == 4


if __name__ == "__main__":
    compile_all(Path(sys.argv[1]))
