"""Log-probabilities of long prompts: exact at every place, and never all in memory at once."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from micota_fast.serve import logprobs
from micota_fast.serve.logprobs import prompt_logprobs

V, H, TOP = 50, 8, 5


class Largest(TorchDispatchMode):
    """Notes the most elements that a tensor of the block has."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for each in out if isinstance(out, tuple | list) else (out,):
            if isinstance(each, Tensor):
                self.elements = max(self.elements, each.numel())
        return out


@pytest.mark.parametrize("tokens", [1, 2, 5, 6, 7, 41])
def test_a_prompt_that_takes_several_chunks_has_the_log_probabilities_of_one_softmax(
    tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logprobs, "CHUNK_ELEMENTS", 5 * V)  # five places at a time
    generator = torch.Generator().manual_seed(tokens)
    hidden_TH = torch.randn(tokens, H, generator=generator, dtype=torch.float64)
    weight_VH = torch.randn(V, H, generator=generator, dtype=torch.float64)
    ids = torch.randint(V, (tokens,), generator=generator).tolist()
    with Largest() as largest:
        chosen, tops = prompt_logprobs(hidden_TH, weight_VH, ids, TOP)
    assert largest.elements <= max(5 * V, weight_VH.numel())
    assert chosen[0] == [None, ids[0], None]
    assert tops[0] is None
    want_TV = (hidden_TH @ weight_VH.T).log_softmax(-1)
    assert [entry[1] for entry in chosen] == ids
    assert [entry[0] for entry in chosen[1:]] == pytest.approx(want_TV[range(tokens - 1), ids[1:]].tolist(), abs=1e-12)
    for place, want_V in zip(tops[1:], want_TV[:-1], strict=True):
        assert place is not None
        want = want_V.topk(TOP)
        assert place.ids.tolist() == want.indices.tolist()
        assert place.logprobs.tolist() == pytest.approx(want.values.tolist(), abs=1e-12)
