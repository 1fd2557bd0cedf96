"""The one loss of the project; imported as `micota_fast.kernels`."""

# transformers asks for Hugging Face's package of the name `kernels` and, where the repository's root is on the path,
# finds this folder. The operator defined a second time would leave the first with freed memory.
if __name__ != "kernels":
    from .linear_cross_entropy import linear_cross_entropy
    from .reverse_targets import ReverseTargets
    from .soft_targets import SoftTargets

    __all__ = ["ReverseTargets", "SoftTargets", "linear_cross_entropy"]
