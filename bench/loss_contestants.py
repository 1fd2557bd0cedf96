"""The losses that bench/loss.py compares: ours, torch's, and other projects' as their documentation has them called."""

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from loss_cases import IGNORE_INDEX, Case, Inputs
from torch import Tensor

from micota_fast.kernels import SoftTargets, linear_cross_entropy
from micota_fast.kernels.reference import dense_linear_cross_entropy

ROW_FILTER = 1e-3
GEMMS = "bare GEMMs"
OURS = "micota"

Forward = Callable[[Inputs], Tensor]
# What a student is trained on: a token; a distribution's likeliest tokens and a bucket of all others; half and half, at
# a temperature of 2; all of a distribution.
Target = Literal["token", "top", "mixed", "all"]


@dataclass(frozen=True)
class Contestant:
    """A way to the mean loss over the supervised tokens.

    Attributes:
        package: the distribution it comes from.
        load: imports it and returns the forward pass; ImportError if it is not there.
        needs_gpu: it is written in Triton or CUDA alone.
        trained_only: takes part in cases with trained-like logits alone.
        target: cases with a teacher are for the others than "token", next to the bare products and our loss of tokens.
    """

    name: str
    package: str
    load: Callable[[], Forward]
    needs_gpu: bool = False
    trained_only: bool = False
    target: Target = "token"

    def takes_part(self, case: Case) -> bool:
        """Whether this case is for it."""
        if case.top == 0 and self.target != "token":
            return False
        if case.top and self.target == "token" and self.name not in (GEMMS, OURS):
            return False
        return case.logits != "random" or not self.trained_only


def available(device: str) -> tuple[dict[str, Forward], dict[str, str]]:
    """Forward passes by contestant's name, and why the others are absent."""
    present: dict[str, Forward] = {}
    absent: dict[str, str] = {}
    for contestant in CONTESTANTS:
        try:
            forward = contestant.load()
        except Exception as error:  # a package may be broken in more ways than by not being there
            absent[contestant.name] = f"{type(error).__name__}: {error}".splitlines()[0]
            continue
        if contestant.needs_gpu and device != "cuda":
            absent[contestant.name] = "needs an NVIDIA GPU"
        else:
            present[contestant.name] = forward
    return present, absent


def backward(name: str, output: Tensor, given: Inputs) -> None:
    """The second half; of the bare products the two that give the gradients, with the logits in place of theirs."""
    if name != GEMMS:
        output.backward()
        return
    hidden = given.hidden.detach()[: given.n_supervised]
    given.hidden.grad, given.weight.grad = torch.empty_like(given.hidden), torch.mm(output.T, hidden)
    torch.mm(output, given.weight.detach(), out=given.hidden.grad[: given.n_supervised])


def _gemms() -> Forward:
    """hidden @ weight.T over as many rows as are supervised: the first of the three products without which no loss."""
    return lambda given: torch.mm(given.hidden.detach()[: given.n_supervised], given.weight.detach().T)


def _micota(row_filter: float) -> Forward:
    return lambda given: linear_cross_entropy(
        given.hidden,
        given.weight,
        given.targets,
        normalizer=given.n_supervised,
        n_supervised=given.n_supervised,
        row_filter=row_filter,
    )


def targets_of(given: Inputs, target: Target) -> Tensor | SoftTargets:
    """What a contestant of this kind is given, with `given.targets` for the rows to leave out."""
    if target == "token":
        return given.targets
    assert given.teacher is not None
    if target == "all":
        logprobs = (given.teacher.hidden @ given.weight.detach().T).float().log_softmax(1)
        ids = torch.arange(len(given.weight), device=logprobs.device).expand(logprobs.shape)
        return SoftTargets(ids, logprobs, given.targets)
    soft = SoftTargets(given.teacher.ids, given.teacher.logprobs, given.targets, tail="bucket")
    return soft if target == "top" else replace(soft, temperature=2.0, alpha=0.5)


def _micota_soft(target: Target) -> Forward:
    return lambda given: linear_cross_entropy(
        given.hidden,
        given.weight,
        targets_of(given, target),
        normalizer=given.n_supervised,
        n_supervised=given.n_supervised,
    )


def _dense() -> Forward:
    return lambda given: dense_linear_cross_entropy(
        given.hidden, given.weight, given.targets, normalizer=given.n_supervised
    )


def _torch() -> Forward:
    """torch >= 2.13; the options' defaults are its own choice of chunks and precision for device and dtype."""
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        raise ImportError(f"torch {torch.__version__} has no chunked linear_cross_entropy; 2.13 has")
    options = torch.nn.LinearCrossEntropyOptions()
    return lambda given: torch.nn.functional.linear_cross_entropy(
        given.hidden, given.weight, given.targets, ignore_index=IGNORE_INDEX, options=options
    )


def _liger(accum_dtype: torch.dtype | None) -> Forward:
    """Sums the weight's gradient in the weight's type unless told otherwise."""
    loss = importlib.import_module("liger_kernel.transformers.functional").liger_fused_linear_cross_entropy
    return lambda given: loss(
        given.hidden, given.weight, given.targets, ignore_index=IGNORE_INDEX, accum_dtype=accum_dtype
    )


def _liger_cute() -> Forward:
    """Liger 0.8.5 in CuTe DSL, for the GPU at hand; Hopper has a function of its own. Read, not run."""
    package = "liger_kernel.ops.cutedsl.ops"
    chip = torch.cuda.get_device_capability()[0] if torch.cuda.is_available() else 9
    if chip == 9:
        hopper = importlib.import_module(f"{package}.fused_linear_cross_entropy_sm90")
        loss = hopper.LigerFusedLinearCrossEntropySM90Function.apply
        return lambda given: loss(given.hidden, given.weight, given.targets, IGNORE_INDEX, "mean")
    if chip != 10:
        raise ImportError("its kernels are for Hopper (sm_90) and Blackwell (sm_100)")
    blackwell = importlib.import_module(f"{package}.fused_linear_cross_entropy").LigerFusedLinearCrossEntropyFunction
    return lambda given: blackwell.apply(given.hidden, given.weight, given.targets, None, None, IGNORE_INDEX)[0]


def _cce(exact: bool) -> Forward:
    """Filters small gradients by default. Exact: neither filtered nor summed in bfloat16.

    The release on PyPI (25.1.1) has no such choice; there exact is without the filter alone.
    """
    loss = importlib.import_module("cut_cross_entropy").linear_cross_entropy
    options: dict[str, object] = {}
    if exact:
        presets = "accum_c_fp32" in inspect.signature(loss).parameters
        options = {"impl": "cce_exact"} if presets else {"filter_eps": None}
    return lambda given: loss(given.hidden, given.weight, given.targets, ignore_index=IGNORE_INDEX, **options)


def _quack() -> Forward:
    loss = importlib.import_module("quack.linear_cross_entropy").chunked_linear_cross_entropy
    return lambda given: loss(given.hidden, given.weight, given.targets, ignore_index=IGNORE_INDEX)


def _trl() -> Forward:
    """As TRL 1.16's trainer calls it: supervised rows alone, 32,768 entries of the vocabulary at a time."""
    log_prob = importlib.import_module("trl.kernels").ChunkedLogProbFunction

    def forward(given: Inputs) -> Tensor:
        kept = given.targets != IGNORE_INDEX
        chosen = given.hidden[kept], given.weight, None, given.targets[kept]
        return -log_prob.apply(*chosen, 1.0, 32768, None, 1.0, ())[0].sum() / given.n_supervised

    return forward


def _trl_top() -> Forward:
    """TRL 1.16's loss of the likeliest tokens that a server has sent, as its AsyncDistillationTrainer calls it."""
    package = "trl.experimental.async_distillation.async_distillation_trainer"
    module = importlib.import_module(package)

    def forward(given: Inputs) -> Tensor:
        assert given.teacher is not None
        kept = given.targets != IGNORE_INDEX
        ids, logprobs = given.teacher.ids[kept], given.teacher.logprobs[kept]
        loss = module._chunked_jsd_loss(
            given.hidden[kept],
            given.weight,
            lm_head_bias=None,
            logit_scale=1.0,
            final_logit_softcapping=None,
            target_ids=ids,
            teacher_target_logps=logprobs,
            valid_candidate_mask=torch.ones_like(ids, dtype=torch.bool),
            beta=0.0,
            temperature=1.0,
            add_tail_bucket=True,
            teacher_id_idx=None,
            num_teachers=0,
            chunk_size=module._CHUNKED_LM_HEAD_CHUNK_SIZE,
        )[0]
        return loss / given.n_supervised

    return forward


def _trl_chunked_kl() -> Forward:
    """TRL 1.16's DistillationTrainer: KL to the whole teacher, whose logits it makes as well, twice."""
    divergence = importlib.import_module("trl.kernels.chunked_divergence").ChunkedDivergenceFunction

    def forward(given: Inputs) -> Tensor:
        assert given.teacher is not None
        kept = given.targets != IGNORE_INDEX
        weight = given.weight.detach()
        loss, _ = divergence.apply(
            given.hidden[kept], given.weight, None, given.teacher.hidden[kept], weight, None, 0.0
        )
        return loss.sum() / given.n_supervised

    return forward


def _trl_jsd() -> Forward:
    """The generalized JSD of TRL's GKDTrainer with beta 0, which is KL, on dense logits of both models."""
    jsd = importlib.import_module("trl.experimental.gkd").GKDTrainer.generalized_jsd_loss

    def forward(given: Inputs) -> Tensor:
        assert given.teacher is not None
        with torch.no_grad():
            teacher = given.teacher.hidden @ given.weight.T
        return jsd(given.hidden @ given.weight.T, teacher, labels=given.targets, beta=0.0)

    return forward


def _liger_jsd() -> Forward:
    """Liger's fused JSD with beta 0, which is KL to the whole teacher, whose logits it makes as well."""
    jsd = importlib.import_module("liger_kernel.transformers.functional").liger_fused_linear_jsd

    def forward(given: Inputs) -> Tensor:
        assert given.teacher is not None
        teacher = given.teacher.hidden, given.weight.detach()
        return jsd(given.hidden, given.weight, *teacher, given.targets, 0.0, IGNORE_INDEX, accum_dtype=torch.float32)

    return forward


CONTESTANTS = (
    Contestant(GEMMS, "torch", _gemms),
    Contestant(OURS, "micota-fast", lambda: _micota(0.0)),
    Contestant(f"micota, filter {ROW_FILTER:g}", "micota-fast", lambda: _micota(ROW_FILTER), trained_only=True),
    Contestant("dense torch", "torch", _dense),
    Contestant("torch chunked", "torch", _torch),
    Contestant("liger", "liger-kernel", lambda: _liger(None), needs_gpu=True),
    Contestant("liger, fp32 dW", "liger-kernel", lambda: _liger(torch.float32), needs_gpu=True),
    Contestant("liger, CuTe DSL", "liger-kernel", _liger_cute, needs_gpu=True),
    Contestant("cce", "cut-cross-entropy", lambda: _cce(exact=False), needs_gpu=True),
    Contestant("cce, exact", "cut-cross-entropy", lambda: _cce(exact=True), needs_gpu=True),
    Contestant("quack", "quack-kernels", _quack, needs_gpu=True),
    Contestant("trl", "trl", _trl),
    Contestant("micota, top", "micota-fast", lambda: _micota_soft("top"), target="top"),
    Contestant("micota, top mixed", "micota-fast", lambda: _micota_soft("mixed"), target="mixed"),
    Contestant("trl, top", "trl", _trl_top, target="top"),
    Contestant("trl, chunked KL", "trl", _trl_chunked_kl, target="all"),
    Contestant("trl, JSD", "trl", _trl_jsd, target="all"),
    Contestant("liger, JSD", "liger-kernel", _liger_jsd, needs_gpu=True, target="all"),
)
