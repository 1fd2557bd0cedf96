"""Continuous batching: requests join and leave the running batch at every step, each with its own sampling.

One thread runs `Engine.run`: new prompts are prefilled packed, then one decode step advances all running requests by a
token. Others talk to it by `submit` and `abort`, and hear from it by each request's `on_update`.

What fails for one request ends that request: a step that fails for several is done again for each of them alone. The
engine ends only if it cannot even run a single token.
"""

import collections
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from micota_fast.chat.encoding import Chat
from micota_fast.model.decoder import Decoder
from micota_fast.serve.kv_cache import round_up
from micota_fast.serve.logprobs import Likeliest, TokenLogprob, prompt_logprobs, token_logprobs
from micota_fast.serve.runner import Runner
from micota_fast.serve.sampling import SamplingParams, sample

log = logging.getLogger(__name__)

PREFILL_TOKENS = 8192  # packed into one forward pass; a longer prompt goes alone
CHECK_TAIL_BYTES = 16  # decoded beyond a stop string's own length, for characters that tokens cut


class EngineDead(Exception):
    """The engine's thread has ended with an error; nothing will be answered any more."""


@dataclass(eq=False)
class Request:
    """One prompt and its answer in the making. Made by `Engine.request`."""

    rid: str
    input_ids: list[int]
    params: SamplingParams
    on_update: Callable[["Request"], None]  # in the engine's thread; on every token if `stream`, and at the end
    stream: bool = False
    return_logprob: bool = False
    logprob_start_len: int = -1  # first prompt position whose log-probability is returned; -1: none
    top_logprobs_num: int = 0

    stop_ids: frozenset[int] = frozenset()
    suppressed_ids: Tensor | None = None  # stop ids that cannot be chosen before `min_new_tokens`
    stop_tail: int = 0  # newest tokens whose text may hold a stop string that the last of them completes
    output_ids: list[int] = field(default_factory=list)
    finish_reason: dict[str, Any] | None = None
    retractions: int = 0
    input_logprobs: list[TokenLogprob] = field(default_factory=list)
    output_logprobs: list[TokenLogprob] = field(default_factory=list)
    input_top_logprobs: list[Likeliest | None] = field(default_factory=list)
    output_top_logprobs: list[Likeliest] = field(default_factory=list)
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
        # One request must always fit.
        self.runner = Runner(model, kv_tokens, round_up(self.context_length))
        self.kv_tokens = self.runner.kv_tokens

        self._wake = threading.Condition()
        self._incoming: collections.deque[Request] = collections.deque()
        self._aborted: set[Request] = set()
        self._stopping = False
        self.error: BaseException | None = None

        self._waiting: collections.deque[Request] = collections.deque()
        self._prefilling: list[Request] = []
        self.running: list[Request] = []  # slot b of the cache belongs to running[b]
        self._lengths = np.zeros(max_running, dtype=np.int64)  # tokens in each slot's cache
        self._last_ids = torch.zeros(
            max_running, dtype=torch.int64, device=self.runner.device
        )  # newest, not yet in the cache
        self.decode_tokens = 0
        self.decode_steps = 0

    # -- from other threads ------------------------------------------------------------------------------------------

    def request(self, rid: str, input_ids: list[int], params: SamplingParams, **options: Any) -> Request:
        """Complete a request, which the request parser has checked, with what follows from the model."""
        request = Request(rid, input_ids, params, **options)
        if not params.ignore_eos:  # in SGLang it switches stop_token_ids off, too
            request.stop_ids = params.stop_token_ids | set(self.chat.eos_ids)
            if params.min_new_tokens:
                request.suppressed_ids = torch.tensor(
                    list(request.stop_ids), dtype=torch.int64, device=self.runner.device
                )
        if params.stop:  # a token holds a byte at least
            request.stop_tail = max(len(s.encode()) for s in params.stop) + CHECK_TAIL_BYTES
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
        running = len(self.running)
        return {
            "num_running_reqs": running,
            "num_waiting_reqs": len(self._waiting) + len(self._incoming),
            "num_used_tokens": int(self._lengths[:running].sum()),
        }

    # -- the engine's thread -----------------------------------------------------------------------------------------

    def run(self) -> None:
        """Work until `stop` is called.

        An error that is not one request's ends the engine: it is kept in `error`, all requests are aborted.
        """
        try:
            with torch.inference_mode():
                while self._collect():
                    self._admit()
                    if self.running:
                        self._decode()
        except BaseException as error:
            log.exception("the engine has failed")
            with self._wake:
                self.error = error
        for request in (*self.running, *self._prefilling, *self._waiting, *self._incoming):
            message = f"the engine has failed: {self.error!r}" if self.error else "the server is shutting down"
            self._finish(request, _abort(message, 500))

    def _collect(self) -> bool:
        """Take over what other threads have left; wait if there is nothing to do. False: stop."""
        with self._wake:
            while not (self._incoming or self._aborted or self.running or self._waiting or self._stopping):
                self._wake.wait()
            self._waiting.extend(self._incoming)
            self._incoming.clear()
            aborted, self._aborted = self._aborted, set()
            if self._stopping:
                return False
        if aborted:
            for request in [r for r in self._waiting if r in aborted]:
                self._finish(request, _abort("aborted by the client"))
            self._waiting = collections.deque(r for r in self._waiting if r not in aborted)
            for slot in reversed([b for b, r in enumerate(self.running) if r in aborted]):
                self._finish(self.running[slot], _abort("aborted by the client"))
                self._release(slot)
        return True

    def _admit(self) -> None:
        """Prefill waiting requests while there is room, PREFILL_TOKENS at a time."""
        while self._waiting and len(self.running) < self.max_running:
            batch: list[Request] = []
            tokens = 0
            longest = int(self._lengths[: len(self.running)].max(initial=0))
            while self._waiting and len(self.running) + len(batch) < self.max_running:
                length = self._waiting[0].length
                padded = round_up(max(longest, length) + 1) * (len(self.running) + len(batch) + 1)
                if (batch and tokens + length > PREFILL_TOKENS) or padded > self.kv_tokens:
                    break
                longest, tokens = max(longest, length), tokens + length
                batch.append(self._waiting.popleft())
            if not batch:
                return
            self._prefilling = batch
            self._prefill(batch)
            self._prefilling = []

    def _prefill(self, batch: list[Request]) -> None:
        """Run whole prompts, and choose the first token of each; where that fails, one by one."""
        first = len(self.running)
        prompts = [r.input_ids + r.output_ids for r in batch]  # with output: retracted before
        try:
            hidden_TH, logits_BV = self.runner.prompts(prompts, first, int(self._lengths[:first].max(initial=0)))
        except Exception as error:
            if len(batch) > 1:
                for request in batch:
                    self._prefill([request])
                return
            if not self.runner.works():
                raise
            self._finish(batch[0], _fault(batch[0], error))
            return
        faults: dict[int, BaseException] = {}
        start = 0
        for row, request in enumerate(batch):
            if request.return_logprob and request.logprob_start_len >= 0 and not request.input_logprobs:
                try:
                    self._keep_prompt_logprobs(request, hidden_TH[start : start + len(request.input_ids)])
                except Exception as error:
                    faults[row] = error
            start += len(prompts[row])
        self.running += batch
        self._lengths[first : first + len(batch)] = [len(prompt) for prompt in prompts]
        self._advance(first, logits_BV, faults)

    def _decode(self) -> None:
        """One more token of each running request; where that fails, one by one."""
        self._make_room()
        B = len(self.running)
        faults: dict[int, BaseException] = {}
        try:
            logits_BV = self.runner.tokens(self._last_ids[:B], self._lengths[:B], 0)
        except Exception:
            if not self.runner.works():
                raise
            V = self.model.config.vocab_size
            logits_BV = torch.zeros(B, V, dtype=torch.float64, device=self._last_ids.device)
            for b in range(B):
                try:
                    alone = slice(b, b + 1)
                    logits_BV[b] = self.runner.tokens(self._last_ids[alone], self._lengths[alone], b)[0]
                except Exception as error:
                    faults[b] = error
        self._lengths[:B] += 1
        self.decode_tokens += B
        self.decode_steps += 1
        self._advance(0, logits_BV, faults)

    def _make_room(self) -> None:
        """Grow the cache for one more token each; put the youngest back in the queue if they cannot all fit."""
        while True:
            longest = int(self._lengths[: len(self.running)].max()) + 1
            if round_up(longest) * len(self.running) <= self.kv_tokens:
                break
            slot = max(range(len(self.running)), key=lambda b: self.running[b].created)
            request = self.running[slot]
            request.retractions += 1
            self._release(slot)
            self._waiting.appendleft(request)
        self.runner.cache.reserve(len(self.running), longest, len(self.running))

    def _advance(self, first: int, logits_BV: Tensor, faults: dict[int, BaseException]) -> None:
        """Give each running request from slot `first` on its next token; let go of those that end with it.

        Args:
            first: slot of the first.
            logits_BV: of each.
            faults: rows that have failed already, and of what.
        """
        requests = self.running[first:]
        finite_B = logits_BV.amax(-1).isfinite()  # NaN is the largest of all
        for row, r in enumerate(requests):
            if r.suppressed_ids is not None and len(r.output_ids) < r.params.min_new_tokens:
                logits_BV[row, r.suppressed_ids] = -torch.inf
        ids_B = self._sample(logits_BV, requests, faults)
        self._last_ids[first : first + len(requests)] = ids_B
        ids, finite = torch.stack((ids_B, finite_B.long())).tolist()
        ended = []
        for row, (request, token_id) in enumerate(zip(requests, ids, strict=True)):
            try:
                if row in faults:
                    raise faults[row]
                if not finite[row]:
                    raise FloatingPointError(f"the logits of token {len(request.output_ids)} are not finite")
                reason = self._take(request, token_id, logits_BV[row])
            except BaseException as error:  # a panic of the tokenizer is no Exception
                reason = _fault(request, error)
            if reason is not None:
                self._finish(request, reason)
                ended.append(first + row)
            elif request.stream:
                _notify(request)
        for slot in reversed(ended):
            self._release(slot)

    def _sample(self, logits_BV: Tensor, requests: list[Request], faults: dict[int, BaseException]) -> Tensor:
        """The next ids, int64 `[B]`; where that fails, row by row."""

        def chosen(rows: slice) -> Tensor:
            some = requests[rows]
            return sample(logits_BV[rows], [r.params for r in some], [len(r.output_ids) for r in some])

        try:
            return chosen(slice(None))
        except Exception:
            ids_B = torch.zeros(len(requests), dtype=torch.int64, device=self.runner.device)
            for row in range(len(requests)):
                try:
                    ids_B[row] = chosen(slice(row, row + 1))[0]
                except Exception as error:
                    faults.setdefault(row, error)
            return ids_B

    def _take(self, request: Request, token_id: int, logits_V: Tensor) -> dict[str, Any] | None:
        """Add a token to an answer. Returns why the answer ends with it; None: it continues."""
        params = request.params
        if params.max_new_tokens == 0:  # only the prompt was to be run
            return {"type": "length", "length": 0}
        if request.return_logprob:
            temperature = 1.0 if params.greedy else params.temperature
            chosen, top = token_logprobs(logits_V, token_id, temperature, request.top_logprobs_num)
            request.output_logprobs.append(chosen)
            if top is not None:
                request.output_top_logprobs.append(top)
        request.output_ids.append(token_id)
        if token_id in request.stop_ids:
            return {"type": "stop", "matched": token_id}
        if params.stop and len(request.output_ids) >= params.min_new_tokens:
            tail = self.chat.decode(request.output_ids[-request.stop_tail :], params.skip_special_tokens)
            found = [(tail.find(s), s) for s in params.stop if s in tail]
            if found:
                return {"type": "stop", "matched": min(found)[1]}
        if len(request.output_ids) >= params.max_new_tokens:
            return {"type": "length", "length": len(request.output_ids)}
        return None

    def _keep_prompt_logprobs(self, request: Request, hidden_TH: Tensor) -> None:
        start = request.logprob_start_len
        if start < len(request.input_ids):
            request.input_logprobs, request.input_top_logprobs = prompt_logprobs(
                hidden_TH[start:], self.model.lm_head_weight, request.input_ids[start:], request.top_logprobs_num
            )

    def _finish(self, request: Request, reason: dict[str, Any]) -> None:
        if request.finish_reason is None:
            request.finish_reason = reason
            _notify(request)

    def _release(self, slot: int) -> None:
        """Free a slot: the last running request moves into it."""
        last = len(self.running) - 1
        if slot != last:
            self.runner.cache.move(last, slot, int(self._lengths[last]))
            self.running[slot] = self.running[last]
            self._lengths[slot] = self._lengths[last]
            self._last_ids[slot] = self._last_ids[last]
        self.running.pop()


def _notify(request: Request) -> None:
    try:
        request.on_update(request)
    except Exception:
        log.exception("nobody could be told of request %s", request.rid)


def _fault(request: Request, error: BaseException) -> dict[str, Any]:
    """The end of a request of which `error` is the fault."""
    log.error("request %s has failed", request.rid, exc_info=error)
    return _abort(f"request {request.rid} has failed: {error!r}", 500)


def _abort(message: str, status_code: int | None = None) -> dict[str, Any]:
    return {"type": "abort", "message": message, "status_code": status_code, "err_type": None}
