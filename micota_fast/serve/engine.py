"""Continuous batching: requests join and leave the running batch at every step, each with its own sampling.

One thread runs `Engine.run`: new prompts are prefilled packed, then one decode step advances all running requests by a
token. Others talk to it by `submit` and `abort`, and hear from it by each request's `on_update`.
"""

import collections
import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from micota_fast.chat.encoding import Chat
from micota_fast.model.attention import PackedAttention, choose_backend
from micota_fast.model.decoder import Decoder
from micota_fast.serve.kv_cache import KVCache, choose_decode_backend, round_up
from micota_fast.serve.sampling import BadRequest, SamplingParams, sample

log = logging.getLogger(__name__)

PREFILL_TOKENS = 8192  # packed into one forward pass; a longer prompt goes alone
KV_MEMORY_SHARE = 0.5  # of the memory that is free once the model is loaded
CHECK_TAIL_BYTES = 16  # decoded beyond a stop string's own length, for characters that tokens cut

TokenLogprob = list[Any]  # [logprob | None, id, None]: SGLang's triple, its third place being text we leave out


class EngineDead(Exception):
    """The engine's thread has ended with an error; nothing will be answered any more."""


@dataclass(eq=False)
class Request:
    """One prompt and its answer in the making. Made by `Engine.request`, which checks it."""

    rid: str
    input_ids: list[int]
    params: SamplingParams
    on_update: Callable[["Request"], None]  # in the engine's thread; on every token if `stream`, and at the end
    stream: bool = False
    return_logprob: bool = False
    logprob_start_len: int = -1  # first prompt position whose log-probability is returned; -1: none
    top_logprobs_num: int = 0

    stop_ids: frozenset[int] = frozenset()
    output_ids: list[int] = field(default_factory=list)
    finish_reason: dict[str, Any] | None = None
    retractions: int = 0
    input_logprobs: list[TokenLogprob] = field(default_factory=list)
    output_logprobs: list[TokenLogprob] = field(default_factory=list)
    input_top_logprobs: list[list[TokenLogprob] | None] = field(default_factory=list)
    output_top_logprobs: list[list[TokenLogprob]] = field(default_factory=list)
    created: float = field(default_factory=time.perf_counter)

    @property
    def length(self) -> int:
        """Tokens of prompt and answer so far."""
        return len(self.input_ids) + len(self.output_ids)


class Engine:
    """A model and its running requests.

    Args:
        model: in the compute dtype and on the device it is to run on.
        chat: its tokenizer and stop ids.
        max_running: requests decoded at once; further ones wait.
        context_length: tokens of prompt and answer together; None: the checkpoint's.
        kv_tokens: tokens of all caches together, padding included; None: what KV_MEMORY_SHARE of the free memory
            holds. When running requests outgrow it, the youngest go back to the queue and are computed again later.
    """

    def __init__(
        self,
        model: Decoder,
        chat: Chat,
        *,
        max_running: int = 128,
        context_length: int | None = None,
        kv_tokens: int | None = None,
    ) -> None:
        self.model, self.chat = model, chat
        self.max_running = max_running
        limit = model.config.max_position_embeddings
        self.context_length = min(context_length or limit, limit)
        weight = model.lm_head_weight
        self._device, self._dtype = weight.device, weight.dtype
        decode_backend, why_decode = choose_decode_backend(self._device, self._dtype)
        self._prefill_backend, why_prefill = choose_backend("auto", self._device, self._dtype, model.config.head_dim)
        log.info("decode attention: %s (%s)", decode_backend, why_decode)
        log.info("prefill attention: %s (%s)", self._prefill_backend, why_prefill)
        self._cache = KVCache(model.config, self._device, self._dtype, decode_backend)
        if kv_tokens is None:
            kv_tokens = int(KV_MEMORY_SHARE * _free_bytes(self._device)) // self._cache.bytes_per_token()
        self.kv_tokens = max(kv_tokens, round_up(self.context_length))  # one request must always fit
        self._stop_bytes: dict[tuple[str, ...], int] = {}

        self._wake = threading.Condition()
        self._incoming: collections.deque[Request] = collections.deque()
        self._aborted: set[Request] = set()
        self._stopping = False
        self.error: BaseException | None = None

        self._waiting: collections.deque[Request] = collections.deque()
        self._prefilling: list[Request] = []
        self._running: list[Request] = []  # slot b of the cache belongs to _running[b]
        self._lengths = np.zeros(max_running, dtype=np.int64)  # tokens in each slot's cache
        self._last_ids = torch.zeros(
            max_running, dtype=torch.int64, device=self._device
        )  # newest, not yet in the cache
        self.decode_tokens = 0
        self.decode_steps = 0

    # -- from other threads ------------------------------------------------------------------------------------------

    def request(self, rid: str, input_ids: list[int], params: SamplingParams, **options: Any) -> Request:
        """Check a request and complete it with what follows from the model.

        Raises:
            BadRequest: empty prompt, an id outside the vocabulary, or more than the context holds.
        """
        if not input_ids:
            raise BadRequest("the prompt is empty")
        vocab_size = self.model.config.vocab_size
        for token_id in input_ids:
            if not 0 <= token_id < vocab_size:
                raise BadRequest(f"input id {token_id} is outside the vocabulary of {vocab_size} ids")
        asked = len(input_ids) + params.max_new_tokens
        if asked > self.context_length:
            raise BadRequest(
                f"a prompt of {len(input_ids)} tokens and {params.max_new_tokens} new ones exceed the context length "
                f"{self.context_length}"
            )
        request = Request(rid, input_ids, params, **options)
        if request.logprob_start_len > len(input_ids):
            raise BadRequest(
                f"logprob_start_len {request.logprob_start_len} exceeds the {len(input_ids)} prompt tokens"
            )
        if not params.ignore_eos:  # in SGLang it switches stop_token_ids off, too
            request.stop_ids = params.stop_token_ids | set(self.chat.eos_ids)
        return request

    def submit(self, request: Request) -> None:
        """Queue a request.

        Raises:
            EngineDead: the engine's thread has ended.
        """
        with self._wake:
            if self.error is not None or self._stopping:
                raise EngineDead(f"the engine has stopped: {self.error!r}")
            self._incoming.append(request)
            self._wake.notify()

    def abort(self, request: Request) -> None:
        """End a request early, wherever it is; one that has ended is left alone."""
        with self._wake:
            self._aborted.add(request)
            self._wake.notify()

    def stop(self) -> None:
        """Make `run` return after the step it is in."""
        with self._wake:
            self._stopping = True
            self._wake.notify()

    def load(self) -> dict[str, int]:
        """Number of running and waiting requests, and tokens in the cache."""
        running = len(self._running)
        return {
            "num_running_reqs": running,
            "num_waiting_reqs": len(self._waiting) + len(self._incoming),
            "num_used_tokens": int(self._lengths[:running].sum()),
        }

    # -- the engine's thread -----------------------------------------------------------------------------------------

    def run(self) -> None:
        """Work until `stop` is called. An error ends the engine: it is kept in `error`, all requests are aborted."""
        try:
            with torch.inference_mode():
                while self._collect():
                    self._admit()
                    if self._running:
                        self._decode()
        except BaseException as error:
            log.exception("the engine has failed")
            with self._wake:
                self.error = error
        for request in (*self._running, *self._prefilling, *self._waiting, *self._incoming):
            message = f"the engine has failed: {self.error!r}" if self.error else "the server is shutting down"
            self._finish(request, _abort(message, 500))

    def _collect(self) -> bool:
        """Take over what other threads have left; wait if there is nothing to do. False: stop."""
        with self._wake:
            while not (self._incoming or self._aborted or self._running or self._waiting or self._stopping):
                self._wake.wait()
            self._waiting.extend(self._incoming)
            self._incoming.clear()
            aborted, self._aborted = self._aborted, set()
            if self._stopping:
                return False
        if aborted:
            for request in [r for r in self._waiting if r in aborted]:
                self._waiting.remove(request)
                self._finish(request, _abort("aborted by the client"))
            for slot in reversed([b for b, r in enumerate(self._running) if r in aborted]):
                self._finish(self._running[slot], _abort("aborted by the client"))
                self._release(slot)
        return True

    def _admit(self) -> None:
        """Prefill waiting requests while there is room, PREFILL_TOKENS at a time."""
        while self._waiting and len(self._running) < self.max_running:
            batch: list[Request] = []
            tokens = 0
            longest = int(self._lengths[: len(self._running)].max(initial=0))
            while self._waiting and len(self._running) + len(batch) < self.max_running:
                length = self._waiting[0].length
                padded = round_up(max(longest, length) + 1) * (len(self._running) + len(batch) + 1)
                if (batch and tokens + length > PREFILL_TOKENS) or padded > self.kv_tokens:
                    break
                longest, tokens = max(longest, length), tokens + length
                batch.append(self._waiting.popleft())
            if not batch:
                return
            self._prefilling = batch
            self._prefill(batch)

    def _prefill(self, batch: list[Request]) -> None:
        first = len(self._running)
        prompts = [r.input_ids + r.output_ids for r in batch]  # with output: retracted before
        lengths = [len(p) for p in prompts]
        self._cache.reserve(first + len(batch), max(lengths) + 1, first)
        device = self._device
        cu_seqlens = np.cumsum([0, *lengths])
        position_ids_T = torch.from_numpy(np.concatenate([np.arange(n) for n in lengths])).to(device)
        slots_T = torch.from_numpy(np.repeat(np.arange(first, first + len(batch)), lengths)).to(device)
        input_ids_T = torch.tensor([i for p in prompts for i in p], device=device)
        packed = PackedAttention(torch.from_numpy(cu_seqlens.astype(np.int32)), lengths, self._prefill_backend, device)
        attend = self._cache.prefill(slots_T, position_ids_T, packed)
        hidden_TH = self.model(input_ids_T, position_ids_T, attend)
        for request, start in zip(batch, cu_seqlens, strict=False):
            if request.return_logprob and request.logprob_start_len >= 0 and not request.input_logprobs:
                self._keep_prompt_logprobs(request, hidden_TH[start : start + len(request.input_ids)])
        self._running += batch
        self._prefilling = []
        self._lengths[first : first + len(batch)] = lengths
        self._advance(first, hidden_TH[torch.from_numpy(cu_seqlens[1:] - 1).to(device)])

    def _decode(self) -> None:
        self._make_room()
        B = len(self._running)
        lengths = self._lengths[:B]
        attend = self._cache.decode(lengths)
        position_ids_B = torch.from_numpy(lengths).to(self._device)
        hidden_BH = self.model(self._last_ids[:B], position_ids_B, attend)
        lengths += 1
        self.decode_tokens += B
        self.decode_steps += 1
        self._advance(0, hidden_BH)

    def _make_room(self) -> None:
        """Grow the cache for one more token each; put the youngest back in the queue if they cannot all fit."""
        while True:
            longest = int(self._lengths[: len(self._running)].max()) + 1
            if round_up(longest) * len(self._running) <= self.kv_tokens:
                break
            slot = max(range(len(self._running)), key=lambda b: self._running[b].created)
            request = self._running[slot]
            request.retractions += 1
            self._release(slot)
            self._waiting.appendleft(request)
        self._cache.reserve(len(self._running), longest, len(self._running))

    def _advance(self, first: int, hidden_BH: Tensor) -> None:
        """Give each running request from slot `first` on its next token; let go of those that end with it."""
        requests = self._running[first:]
        logits_BV = F.linear(hidden_BH, self.model.lm_head_weight)
        if self._dtype != torch.float64:
            logits_BV = logits_BV.float()
        for row, r in enumerate(requests):
            if len(r.output_ids) < r.params.min_new_tokens and r.stop_ids:
                logits_BV[row, [i for i in r.stop_ids if i < logits_BV.shape[1]]] = -torch.inf
        ids_B = sample(logits_BV, [r.params for r in requests], [len(r.output_ids) for r in requests])
        self._last_ids[first : first + len(requests)] = ids_B
        ids = ids_B.tolist()
        with_logprobs = [row for row, r in enumerate(requests) if r.return_logprob]
        if with_logprobs:
            self._keep_logprobs(requests, with_logprobs, logits_BV, ids)
        ended = []
        for row, (request, token_id) in enumerate(zip(requests, ids, strict=True)):
            request.output_ids.append(token_id)
            reason = self._finish_reason(request, token_id)
            if reason is not None:
                self._finish(request, reason)
                ended.append(first + row)
            elif request.stream:
                request.on_update(request)
        for slot in reversed(ended):
            self._release(slot)

    def _finish_reason(self, request: Request, token_id: int) -> dict[str, Any] | None:
        if token_id in request.stop_ids:
            return {"type": "stop", "matched": token_id}
        if request.params.stop and len(request.output_ids) >= request.params.min_new_tokens:
            matched = self._match_stop(request)
            if matched is not None:
                return {"type": "stop", "matched": matched}
        if len(request.output_ids) >= request.params.max_new_tokens:
            return {"type": "length", "length": len(request.output_ids)}
        return None

    def _match_stop(self, request: Request) -> str | None:
        """The stop string that the newest token completes. A token holds a byte at least: a tail of ids suffices."""
        stop = request.params.stop
        size = self._stop_bytes.get(stop)
        if size is None:
            size = self._stop_bytes[stop] = max(len(s.encode()) for s in stop) + CHECK_TAIL_BYTES
        tail = self.chat.decode(request.output_ids[-size:], request.params.skip_special_tokens)
        found = [(tail.find(s), s) for s in stop if s in tail]
        return min(found)[1] if found else None

    def _finish(self, request: Request, reason: dict[str, Any]) -> None:
        request.finish_reason = reason
        request.on_update(request)

    def _release(self, slot: int) -> None:
        """Free a slot: the last running request moves into it."""
        last = len(self._running) - 1
        if slot != last:
            self._cache.move(last, slot, int(self._lengths[last]))
            self._running[slot] = self._running[last]
            self._lengths[slot] = self._lengths[last]
            self._last_ids[slot] = self._last_ids[last]
        self._running.pop()

    # -- log-probabilities -------------------------------------------------------------------------------------------

    def _keep_logprobs(self, requests: list[Request], rows: list[int], logits_BV: Tensor, ids: list[int]) -> None:
        """Of the tokens just chosen: under the distribution at the request's temperature, before top_k and top_p."""
        for row in rows:
            request = requests[row]
            temperature = 1.0 if request.params.greedy else request.params.temperature
            logprobs_V = (logits_BV[row].double() / temperature).log_softmax(-1)
            request.output_logprobs.append([logprobs_V[ids[row]].item(), ids[row], None])
            if request.top_logprobs_num:
                request.output_top_logprobs.append(_top(logprobs_V, request.top_logprobs_num))

    def _keep_prompt_logprobs(self, request: Request, hidden_TH: Tensor) -> None:
        """Of the prompt from `logprob_start_len` on; the first entry has none, as in SGLang."""
        start = request.logprob_start_len
        ids = request.input_ids[start:]
        if not ids:
            return
        logits_TV = F.linear(hidden_TH[start:-1], self.model.lm_head_weight).double()
        logprobs_TV = logits_TV.log_softmax(-1)
        targets_T1 = torch.tensor(ids[1:], dtype=torch.int64, device=self._device)[:, None]
        values = logprobs_TV.gather(1, targets_T1)[:, 0].tolist()
        request.input_logprobs = [[None, ids[0], None]] + [[v, i, None] for v, i in zip(values, ids[1:], strict=True)]
        if request.top_logprobs_num:
            request.input_top_logprobs = [None, *(_top(row, request.top_logprobs_num) for row in logprobs_TV)]


def _top(logprobs_V: Tensor, k: int) -> list[TokenLogprob]:
    top = logprobs_V.topk(min(k, len(logprobs_V)))
    return [[value, i, None] for value, i in zip(top.values.tolist(), top.indices.tolist(), strict=True)]


def _abort(message: str, status_code: int | None = None) -> dict[str, Any]:
    return {"type": "abort", "message": message, "status_code": status_code, "err_type": None}


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:  # counts what the page cache would give back, which sysconf does not
        meminfo = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return int(meminfo["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
