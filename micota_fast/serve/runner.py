"""The model and its cache of keys and values: prompts and tokens in, logits out."""

import logging
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from micota_fast.model.attention import PackedAttention, choose_backend
from micota_fast.model.decoder import Decoder
from micota_fast.serve.kv_cache import KVCache, choose_decode_backend

log = logging.getLogger(__name__)

KV_MEMORY_SHARE = 0.5  # of the memory that is free once the model is loaded


class Runner:
    """Runs the sequences that lie in the slots of a cache.

    Args:
        model: in the compute dtype and on the device it is to run on.
        kv_tokens: tokens of all slots together, padding included; None: what KV_MEMORY_SHARE of the free memory holds.
        min_kv_tokens: the least number of those.
    """

    def __init__(self, model: Decoder, kv_tokens: int | None, min_kv_tokens: int) -> None:
        self.model = model
        weight = model.lm_head_weight
        self.device, self._dtype = weight.device, weight.dtype
        decode_backend, why_decode = choose_decode_backend(self.device, self._dtype)
        self._prefill_backend, why_prefill = choose_backend("auto", self.device, self._dtype, model.config.head_dim)
        log.info("decode attention: %s (%s)", decode_backend, why_decode)
        log.info("prefill attention: %s (%s)", self._prefill_backend, why_prefill)
        self.cache = KVCache(model.config, self.device, self._dtype, decode_backend)
        if kv_tokens is None:
            kv_tokens = int(KV_MEMORY_SHARE * _free_bytes(self.device)) // self.cache.bytes_per_token()
        self.kv_tokens = self.cache.max_tokens = max(kv_tokens, min_kv_tokens)

    def prompts(self, prompts: list[list[int]], first: int, longest: int) -> tuple[Tensor, Tensor]:
        """Run whole prompts, packed; their keys and values go to the slots from `first` on.

        Args:
            prompts: ids of each.
            first: slots below it are in use.
            longest: tokens of the longest sequence in those.

        Returns:
            Hidden states `[T, H]` of all tokens and logits `[B, V]` of each prompt's last one.
        """
        B, lengths = len(prompts), [len(prompt) for prompt in prompts]
        self.cache.reserve(first + B, max(*lengths, longest) + 1, first)
        cu_seqlens = np.cumsum([0, *lengths])
        position_ids_T = torch.from_numpy(np.concatenate([np.arange(n) for n in lengths])).to(self.device)
        slots_T = torch.from_numpy(np.repeat(np.arange(first, first + B), lengths)).to(self.device)
        input_ids_T = torch.tensor([i for prompt in prompts for i in prompt], device=self.device)
        packed = self._packed(cu_seqlens, lengths)
        hidden_TH = self.model(input_ids_T, position_ids_T, self.cache.prefill(slots_T, position_ids_T, packed))
        return hidden_TH, self._logits(hidden_TH[torch.from_numpy(cu_seqlens[1:] - 1).to(self.device)])

    def tokens(self, ids_B: Tensor, lengths: NDArray[np.int64], first: int) -> Tensor:
        """Run one more token of each of the B slots from `first` on, of which `lengths[b]` tokens are in the cache.

        Returns:
            Logits `[B, V]`.
        """
        attend = self.cache.decode(lengths, first)
        return self._logits(self.model(ids_B, torch.from_numpy(lengths).to(self.device), attend))

    def works(self) -> bool:
        """Whether it can still run a single token."""
        try:
            one = torch.zeros(1, dtype=torch.int64, device=self.device)
            self._logits(self.model(one, one, self._packed(np.array([0, 1]), [1]))).sum().item()
        except Exception:
            return False
        return True

    def _packed(self, cu_seqlens: NDArray[np.int64], lengths: list[int]) -> PackedAttention:
        cu = torch.from_numpy(cu_seqlens.astype(np.int32))
        return PackedAttention(cu, lengths, self._prefill_backend, self.device)

    def _logits(self, hidden_BH: Tensor) -> Tensor:
        logits_BV = F.linear(hidden_BH, self.model.lm_head_weight)
        return logits_BV if self._dtype == torch.float64 else logits_BV.float()


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:  # counts what the page cache would give back, which sysconf does not
        meminfo = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return int(meminfo["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
