"""The softmax of one row of logits, turned into the gradient of its loss in place: one Triton program per row."""

import triton
import triton.language as tl

# At least as many elements as a row's stride may exceed its columns by (`chunks.ALIGNED_BYTES`).
PADDING = tl.constexpr(128)


@triton.jit
def _top_and_sums(
    logits_ptr,
    row_stride,
    inverse,
    HOT: tl.constexpr,
    COLD_TOO: tl.constexpr,
    POLICY: tl.constexpr,
    BLOCK_V: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Return a row's maximum and, of d = x - maximum, the sum of exp(d * inverse), and with COLD_TOO that of exp(d).

    They are kept together over one pass (arXiv 1805.02867). `inverse`, 1 over a temperature, is read with HOT alone.
    """
    top = -float("inf")
    total = 0.0
    cold_total = 0.0
    for start in tl.range(0, row_stride, BLOCK_V, num_stages=NUM_STAGES):
        columns = start + tl.arange(0, BLOCK_V)
        mask = columns < row_stride
        x = tl.load(logits_ptr + columns, mask=mask, other=-float("inf"), eviction_policy=POLICY).to(tl.float32)
        new_top = tl.maximum(top, tl.max(x, 0))
        shift = tl.where(new_top == -float("inf"), 0.0, new_top)  # nothing but -inf so far: no inf - inf
        if HOT:
            total = total * tl.exp((top - shift) * inverse) + tl.sum(tl.exp((x - shift) * inverse), 0)
        else:
            total = total * tl.exp(top - shift) + tl.sum(tl.exp(x - shift), 0)
        if COLD_TOO:
            cold_total = cold_total * tl.exp(top - shift) + tl.sum(tl.exp(x - shift), 0)
        top = new_top
    return top, total, cold_total


@triton.jit
def softmax_rows(
    logits_ptr,
    target_ptr,
    scale_ptr,
    nll_ptr,
    n_columns,
    row_stride,
    threshold,
    ignore_index,
    SCALE_STRIDE: tl.constexpr,
    WANT_GRADIENT: tl.constexpr,
    FILTER: tl.constexpr,
    BLOCK_V: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    reverse_logprobs_ptr=None,
    reverse_alpha_ptr=None,
    REVERSE: tl.constexpr = False,
):
    """Compute the loss of one row, then scale * (softmax - onehot) in place of its logits. One program per row.

    With FILTER, rows that are ignored or of at most `threshold` keep their logits, which nobody reads again. With
    REVERSE the gradient has the factor of `ReverseRows.gradient_factor`.

    A row is read and written up to its stride, so that all goes 16 bytes at a time whatever the number of columns;
    what lies past the columns is made -inf, and then 0. The L2 cache is asked to keep what will be read again, and
    to give up first what was written.
    """
    POLICY: tl.constexpr = "evict_last" if WANT_GRADIENT else "evict_first"
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * row_stride
    target = tl.load(target_ptr + row)
    if target == ignore_index:
        tl.store(nll_ptr + row, 0.0)
        if WANT_GRADIENT and not FILTER:
            for start in range(0, row_stride, BLOCK_V):
                columns = start + tl.arange(0, BLOCK_V)
                zeros = tl.zeros((BLOCK_V,), logits_ptr.dtype.element_ty)
                tl.store(logits_ptr + columns, zeros, mask=columns < row_stride)
        return

    in_range = (target >= 0) & (target < n_columns)
    # Before the reductions: their barriers keep a fast warp from writing over it while a slow one has yet to read it.
    target_logit = tl.load(logits_ptr + target, mask=in_range, other=float("nan")).to(tl.float32)
    padding = n_columns + tl.arange(0, PADDING)
    tl.store(logits_ptr + padding, -float("inf"), mask=padding < row_stride)
    tl.debug_barrier()  # so that all threads read it
    top, total, _ = _top_and_sums(logits_ptr, row_stride, 1.0, False, False, POLICY, BLOCK_V, NUM_STAGES)
    # The logits' difference first: exact where the target is (near) the top, as it is in a trained model.
    nll = (top - target_logit) + tl.log(total)
    tl.store(nll_ptr + row, nll)

    if WANT_GRADIENT:
        if FILTER and nll <= threshold:
            return
        scale = tl.load(scale_ptr + row * SCALE_STRIDE)
        scale = tl.where(in_range, scale, float("nan"))
        if REVERSE:
            alpha = tl.load(reverse_alpha_ptr + row)
            factor = alpha * (nll + tl.load(reverse_logprobs_ptr + row)) + (1.0 - alpha)
            scale *= tl.where(alpha == 0, 1.0, factor)
        target_column = target.to(tl.int32)
        share = 1.0 / total
        # Backwards: the end of the row was read last, and is the likeliest to be still in the cache.
        last = (row_stride - 1) // BLOCK_V * BLOCK_V
        for back in tl.range(0, row_stride, BLOCK_V, num_stages=NUM_STAGES):
            columns = last - back + tl.arange(0, BLOCK_V)
            mask = columns < row_stride
            x = tl.load(logits_ptr + columns, mask=mask, other=-float("inf"), eviction_policy="evict_first")
            x = x.to(tl.float32)
            gradient = scale * (tl.exp(x - top) * share - tl.where(columns == target_column, 1.0, 0.0))
            gradient = gradient.to(logits_ptr.dtype.element_ty)
            tl.store(logits_ptr + columns, gradient, mask=mask, eviction_policy="evict_first")


@triton.jit
def soft_softmax_rows(
    logits_ptr,
    target_ptr,
    scale_ptr,
    nll_ptr,
    n_columns,
    row_stride,
    ids_ptr,
    probs_ptr,
    tail_ptr,
    entropy_ptr,
    alpha_ptr,
    ignore_index,
    temperature,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HOT: tl.constexpr,
    MIXED: tl.constexpr,
    SCALE_STRIDE: tl.constexpr,
    WANT_GRADIENT: tl.constexpr,
    BLOCK_V: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Do as `softmax_rows` for a row's distribution over K tokens, see `SoftTargets` and `SoftRows`.

    In a row with a tail the K logits are read and made -inf first, so that one pass gives the tail's softmax: 1 -
    sum(p) would lose a small tail. The K tokens' own gradients are written last, in float32 until then. HOT: the
    temperature is not 1. MIXED: there is a hard term, alone in rows whose alpha is 0. A row without a
    tail has the bits of `softmax_rows` for K = 1.
    """
    POLICY: tl.constexpr = "evict_last" if WANT_GRADIENT else "evict_first"
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * row_stride
    target = tl.load(target_ptr + row)
    if target == ignore_index:
        tl.store(nll_ptr + row, 0.0)
        if WANT_GRADIENT:
            for start in range(0, row_stride, BLOCK_V):
                columns = start + tl.arange(0, BLOCK_V)
                zeros = tl.zeros((BLOCK_V,), logits_ptr.dtype.element_ty)
                tl.store(logits_ptr + columns, zeros, mask=columns < row_stride)
        return

    k = tl.arange(0, BLOCK_K)
    id_K = tl.load(ids_ptr + row * K + k, mask=k < K, other=-1).to(tl.int32)
    present = id_K >= 0
    q_K = tl.load(probs_ptr + row * K + k, mask=k < K, other=0.0)
    q_tail = tl.load(tail_ptr + row)
    alpha = tl.load(alpha_ptr + row)
    has_tail = q_tail > 0
    apart = tl.where(present, q_tail, 0.0) > 0  # entries that are kept out of the rest
    logit_K = tl.load(logits_ptr + id_K, mask=present, other=-float("inf")).to(tl.float32)
    if MIXED:
        in_range = (target >= 0) & (target < n_columns)
        hard_logit = tl.load(logits_ptr + target, mask=in_range, other=float("nan")).to(tl.float32)
    tl.debug_barrier()  # so that all threads have read them
    padding = n_columns + tl.arange(0, PADDING)
    tl.store(logits_ptr + padding, -float("inf"), mask=padding < row_stride)
    tl.store(logits_ptr + id_K, tl.full((BLOCK_K,), -float("inf"), tl.float32), mask=apart)
    tl.debug_barrier()  # so that all threads read what was written

    inverse = 1.0 / temperature
    # The rest: without the K tokens in a row with a tail, else all.
    rest_top, rest_total, rest_cold = _top_and_sums(
        logits_ptr, row_stride, inverse, HOT, HOT and MIXED, POLICY, BLOCK_V, NUM_STAGES
    )
    top = tl.where(has_tail, tl.maximum(rest_top, tl.max(logit_K, 0)), rest_top)
    below, below_K = rest_top - top, logit_K - top
    if HOT:
        below, below_K = below * inverse, below_K * inverse
    exp_K = tl.exp(below_K)
    total = rest_total * tl.exp(below) + tl.sum(tl.where(apart, exp_K, 0.0), 0)
    log_total = tl.log(total)
    loss = tl.sum(tl.where(q_K == 0, 0.0, q_K * (log_total - below_K)), 0)
    loss += tl.where(has_tail, q_tail * (log_total - below - tl.log(rest_total)), 0.0)
    loss -= tl.load(entropy_ptr + row)
    if HOT or MIXED:
        loss *= alpha * temperature * temperature
    if MIXED:
        cold_total, cold_log_total = total, log_total
        if HOT:
            cold_exp_K = tl.exp(logit_K - top)
            cold_total = rest_cold * tl.exp(rest_top - top) + tl.sum(tl.where(apart, cold_exp_K, 0.0), 0)
            cold_log_total = tl.log(cold_total)
        loss += (1 - alpha) * ((top - hard_logit) + cold_log_total)
    tl.store(nll_ptr + row, loss)

    if WANT_GRADIENT:
        scale = tl.load(scale_ptr + row * SCALE_STRIDE)
        q_sum = tl.sum(q_K, 0)
        scale = tl.where(q_sum == q_sum, scale, float("nan"))  # no distribution
        share = 1.0 / total
        # Weights of p and of q; where the hard term has the same softmax, its weight is that of both.
        p_weight, q_weight = 1.0, 1.0
        if HOT or MIXED:
            q_weight = alpha * temperature
        if HOT:
            p_weight = q_weight
        # Within the tail: q_tail times a token's share in it, by which no p_tail is divided.
        per_tail = tl.where(rest_total == 0, 0.0, q_tail / rest_total)
        factor = p_weight * (tl.exp(below) * share) - q_weight * per_tail
        base = tl.where(has_tail & (rest_top == -float("inf")), 0.0, rest_top)
        if HOT and MIXED:
            cold_factor = (1 - alpha) * tl.exp(rest_top - top) / cold_total
        last = (row_stride - 1) // BLOCK_V * BLOCK_V
        for back in tl.range(0, row_stride, BLOCK_V, num_stages=NUM_STAGES):
            columns = last - back + tl.arange(0, BLOCK_V)
            mask = columns < row_stride
            x = tl.load(logits_ptr + columns, mask=mask, other=-float("inf"), eviction_policy="evict_first")
            x = x.to(tl.float32) - base
            gradient = tl.exp(x * inverse if HOT else x) * factor
            if HOT and MIXED:
                gradient += tl.exp(x) * cold_factor
            gradient = (scale * gradient).to(logits_ptr.dtype.element_ty)
            tl.store(logits_ptr + columns, gradient, mask=mask, eviction_policy="evict_first")

        tl.debug_barrier()  # before what was just written is written over
        gradient_K = p_weight * (exp_K * share) - q_weight * q_K
        if MIXED:
            is_hard_K = id_K == target
            gradient_K -= tl.where(is_hard_K, 1 - alpha, 0.0)
            if HOT:
                gradient_K += (1 - alpha) * (cold_exp_K / cold_total)
                hard = tl.exp((hard_logit - base) * inverse) * factor + tl.exp(hard_logit - base) * cold_factor
            else:
                hard = tl.exp(hard_logit - base) * factor
        gradient_K = (scale * gradient_K).to(logits_ptr.dtype.element_ty)
        tl.store(logits_ptr + id_K, gradient_K, mask=present)
        if MIXED:
            among = tl.max(is_hard_K.to(tl.int32), 0) == 1  # its gradient is then written already
            hard = (scale * (hard - (1 - alpha))).to(logits_ptr.dtype.element_ty)
            tl.store(logits_ptr + target, hard, mask=in_range & (among == 0))
