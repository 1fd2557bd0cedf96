"""How fast can the loss be at most, by shape and GPU? Paper only: nothing is measured here.

    .venv/bin/python bench/roofline.py [--gpu h100 ...] [--tokens 8192 16384] [--parts]

`micota_fast/planning/roofline.py` has the model: FLOPs at the data sheet's peak, bytes at its bandwidth, one part after
another. Per case: the least time of forward and backward, that of the three products which no exact loss can do
without, and their ratio, which is what bench/loss.py measures as "of GEMMs". No product reaches the peak: "at 70%" is
the ratio if they reach 70% of it, which is assumed. --parts: the parts of each case.
"""

import argparse

from loss_cases import SHAPES

from micota_fast.common.gpu_specs import GPUS
from micota_fast.planning.roofline import loss_parts, loss_seconds

REACHED = 0.7  # of the peak, by the products: assumed


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", nargs="+", choices=GPUS, default=["h100", "a100", "b200"], metavar="GPU")
    parser.add_argument("--tokens", nargs="+", type=int, default=[8192, 16384], metavar="N", help="supervised ones")
    parser.add_argument("--parts", action="store_true", help="a line per part of the loss as well")
    arguments = parser.parse_args()
    print("| GPU | shape | tokens | loss, ms | products, ms | loss / products | at 70% |")
    print("| :-- | :-- | --: | --: | --: | --: | --: |")
    for name in arguments.gpu:
        gpu = GPUS[name]
        for model, (h, v) in SHAPES.items():
            if v < 100_000:
                continue  # for a CPU
            for n in arguments.tokens:
                whole, products = loss_seconds(n, h, v, gpu)
                reached = products / REACHED
                ratio = (whole - products + reached) / reached
                figures = f"{1e3 * whole:.1f} | {1e3 * products:.1f} | {whole / products:.2f} | {ratio:.2f}"
                print(f"| {name} | {model} | {n:,} | {figures} |")
                for part in loss_parts(n, h, v, gpu) if arguments.parts else []:
                    bound = "FLOP/s" if part.flops / gpu.flops >= part.bytes / gpu.bandwidth else "bytes"
                    print(f"| | {part.name} | | {1e3 * part.seconds(gpu):.2f} | | by {bound} | |")


if __name__ == "__main__":
    main()
