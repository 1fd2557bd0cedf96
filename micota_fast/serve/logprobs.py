"""Log-probabilities of an answer's tokens and of its prompt's, in float64, a piece of the prompt at a time."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

CHUNK_ELEMENTS = 1 << 23  # of float64: 64 MB, and as much again for their softmax

IMPOSSIBLE = -9999.0  # JSON has no infinity; OpenAI writes this

TokenLogprob = list[Any]  # [logprob | None, id, None]: SGLang's triple, its third place being text we leave out


@dataclass(frozen=True, slots=True, eq=False)
class Likeliest:
    """The likeliest tokens at one place, in arrays: an answer may have millions of them."""

    logprobs: NDArray[np.float64]  # [k], falling
    ids: NDArray[np.int64]  # [k]

    def triples(self) -> list[TokenLogprob]:
        """As SGLang writes them."""
        return [[value, i, None] for value, i in zip(self.logprobs.tolist(), self.ids.tolist(), strict=True)]


def token_logprobs(
    logits_V: Tensor, token_id: int, temperature: float, top: int
) -> tuple[TokenLogprob, Likeliest | None]:
    """Of a token that was chosen, and of the `top` likeliest, under the distribution at `temperature`."""
    logprobs_V = _log_softmax(logits_V.double() / temperature)
    likeliest = _likeliest(logprobs_V[None], top)[0] if top else None
    return [logprobs_V[token_id].item(), token_id, None], likeliest


def prompt_logprobs(
    hidden_TH: Tensor, lm_head_weight: Tensor, ids: list[int], top: int
) -> tuple[list[TokenLogprob], list[Likeliest | None]]:
    """Of the tokens of a prompt, each given those before it; the first has none, as in SGLang.

    Args:
        hidden_TH: of the prompt's tokens, the last of which predicts nothing in it.
        lm_head_weight: `[V, H]`.
        ids: the T tokens.
        top: how many of the likeliest at each place.

    Returns:
        One triple for each token, and for each token the likeliest ones in its place (an empty list if `top` is 0).
    """
    chosen: list[TokenLogprob] = [[None, ids[0], None]]
    tops: list[Likeliest | None] = [None]
    rows = max(1, CHUNK_ELEMENTS // lm_head_weight.shape[0])
    for start in range(0, len(ids) - 1, rows):
        targets = ids[start + 1 : start + 1 + rows]
        logits_TV = F.linear(hidden_TH[start : start + len(targets)], lm_head_weight).double()
        if not logits_TV.isfinite().all():
            raise FloatingPointError("the logits of the prompt's tokens are not finite")
        logprobs_TV = _log_softmax(logits_TV)
        targets_T1 = torch.tensor(targets, device=hidden_TH.device)[:, None]
        values = logprobs_TV.gather(1, targets_T1)[:, 0].tolist()
        chosen += [[value, i, None] for value, i in zip(values, targets, strict=True)]
        if top:
            tops += _likeliest(logprobs_TV, top)
    return chosen, tops if top else []


def _log_softmax(logits: Tensor) -> Tensor:
    return logits.log_softmax(-1).nan_to_num(neginf=IMPOSSIBLE)


def _likeliest(logprobs_TV: Tensor, top: int) -> list[Likeliest]:
    found = logprobs_TV.topk(top)
    values, ids = found.values.cpu().numpy(), found.indices.cpu().numpy()
    return [Likeliest(v, i) for v, i in zip(values, ids, strict=True)]
