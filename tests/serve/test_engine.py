"""The engine in this process: right tokens, whatever else is in the batch, whoever joins, leaves or is put back."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from micota_fast.chat.encoding import Chat
from micota_fast.config.generation import ChatConfig
from micota_fast.model.safetensors_io import load_model
from micota_fast.serve.engine import Engine, EngineDead, Request
from micota_fast.serve.kv_cache import KVCache, choose_decode_backend
from micota_fast.serve.sampling import SamplingParams, sample, uniform

GREEDY = {"temperature": 0.0, "ignore_eos": True}


def sampling_params(**values: Any) -> SamplingParams:
    """As the request parser makes them of JSON."""
    lists = {"stop": tuple(values.get("stop", ())), "stop_token_ids": frozenset(values.get("stop_token_ids", ()))}
    return SamplingParams(**{**values, **lists})


class Running:
    """An engine with its thread, for tests that wait for whole answers."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.thread = threading.Thread(target=engine.run)
        self.thread.start()

    def submit(self, input_ids: list[int], stream: bool = False, **params: object) -> tuple[Request, threading.Event]:
        ended = threading.Event()

        def on_update(request: Request) -> None:
            if request.finish_reason is not None:
                ended.set()

        parsed = sampling_params(**{"max_new_tokens": 16, **GREEDY, **params})
        request = self.engine.request("r", input_ids, parsed, on_update=on_update, stream=stream)
        self.engine.submit(request)
        return request, ended

    def answer(self, input_ids: list[int], **params: object) -> Request:
        request, ended = self.submit(input_ids, **params)
        assert ended.wait(240)
        return request

    def answers(self, prompts: list[list[int]], **params: object) -> list[Request]:
        submitted = [self.submit(prompt, **params) for prompt in prompts]
        assert all(ended.wait(240) for _, ended in submitted)
        return [request for request, _ in submitted]


def make_engine(checkpoint: Path, dtype: str = "float64", **options: int) -> Engine:
    return Engine(load_model(checkpoint, dtype), Chat.from_checkpoint(checkpoint, ChatConfig()), **options)


@pytest.fixture(scope="module")
def running(qwen2_checkpoint: Path) -> Iterator[Running]:
    server = Running(make_engine(qwen2_checkpoint, max_running=32))
    yield server
    server.engine.stop()
    server.thread.join(10)
    assert not server.thread.is_alive()


def prompts(count: int, low: int = 1, high: int = 90) -> list[list[int]]:
    rng = np.random.default_rng(count)
    return [rng.integers(3, 320, rng.integers(low, high)).tolist() for _ in range(count)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_greedy_equals_transformers(family: str, dtype: str, request: pytest.FixtureRequest) -> None:
    """In fp32 the very tokens of `generate`; in bf16, the path of SDPA, each token within rounding of the best."""
    from transformers import AutoModelForCausalLM

    checkpoint = request.getfixturevalue(f"{family}_checkpoint")
    reference = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    server = Running(make_engine(checkpoint, dtype))
    try:
        asked = prompts(5)
        for prompt, got in zip(asked, server.answers(asked, max_new_tokens=24), strict=True):
            ids = torch.tensor([prompt])
            if dtype == "float32":
                expected = reference.generate(ids, max_new_tokens=24, do_sample=False, eos_token_id=None)
                assert got.output_ids == expected[0, len(prompt) :].tolist()
            else:
                with torch.no_grad():
                    logits = reference(torch.tensor([prompt + got.output_ids])).logits[0, len(prompt) - 1 : -1]
                chosen = logits.gather(1, torch.tensor(got.output_ids)[:, None])[:, 0]
                assert (logits.max(-1).values - chosen).max() < 0.25
    finally:
        server.engine.stop()
        server.thread.join(10)


def test_the_batch_makes_no_difference(running: Running) -> None:
    """Greedy and seeded alike: alone, and among 60 others for 32 places, with lengths that make them come and go."""
    asked = prompts(60)
    sampled = {"temperature": 1.0, "top_p": 0.9, "sampling_seed": 5}
    alone = [running.answer(p, max_new_tokens=3 + i) for i, p in enumerate(asked[:8])]
    alone_sampled = [running.answer(p, **sampled) for p in asked[:4]]
    together = [running.submit(p, max_new_tokens=3 + i) for i, p in enumerate(asked)]
    together_sampled = [running.submit(p, **sampled) for p in asked[:4]]
    assert all(ended.wait(240) for _, ended in together + together_sampled)
    for i, ((got, _), want) in enumerate(zip(together, alone, strict=False)):
        assert got.output_ids == want.output_ids
        assert len(got.output_ids) == 3 + i
    assert [r.output_ids for r, _ in together_sampled] == [r.output_ids for r in alone_sampled]
    assert all(len(r.output_ids) == 3 + i for i, (r, _) in enumerate(together))


def test_requests_join_a_running_batch(running: Running) -> None:
    """A short request that comes later ends before a long one that is under way: it did not wait for it."""
    long, long_ended = running.submit([5, 6, 7], max_new_tokens=400)
    short = running.answer([8, 9])
    assert len(short.output_ids) == 16
    assert not long_ended.is_set()
    assert long_ended.wait(240)
    assert long.output_ids == running.answer([5, 6, 7], max_new_tokens=400).output_ids


def test_a_cache_too_small_puts_requests_back(qwen2_checkpoint: Path, running: Running) -> None:
    """512 tokens are room for 8 requests of one block: they outgrow it, some are recomputed, none comes out unlike."""
    server = Running(make_engine(qwen2_checkpoint, kv_tokens=512))
    try:
        asked = prompts(8, 20, 40)
        got = server.answers(asked, max_new_tokens=100)
        want = running.answers(asked, max_new_tokens=100)
        assert [r.output_ids for r in got] == [r.output_ids for r in want]
        assert sum(r.retractions for r in got) > 0
    finally:
        server.engine.stop()
        server.thread.join(10)


def test_abort_frees_the_place(qwen2_checkpoint: Path) -> None:
    server = Running(make_engine(qwen2_checkpoint, max_running=1))
    try:
        first, first_ended = server.submit([5], max_new_tokens=500)
        waiting, waiting_ended = server.submit([6], max_new_tokens=500)
        server.engine.abort(waiting)
        server.engine.abort(first)
        assert waiting_ended.wait(10)
        assert first_ended.wait(10)
        assert first.finish_reason is not None
        assert first.finish_reason["type"] == "abort"
        assert len(server.answer([7]).output_ids) == 16
    finally:
        server.engine.stop()
        server.thread.join(10)


MARKED = 77  # stands in the prompt of one request among many: what is broken fails on it alone


def break_model(engine: Engine) -> None:
    """Whatever is run together with the marked id fails, as an index out of range does."""
    forward = engine.model.forward

    def failing(input_ids_T: torch.Tensor, *more: Any) -> torch.Tensor:
        if (input_ids_T == MARKED).any():
            raise RuntimeError("no such place")
        return forward(input_ids_T, *more)

    engine.model.forward = failing  # type: ignore[method-assign]


def break_decoding(engine: Engine) -> None:
    """The same when a token is to be added to it: slots of sequences that hold the marked id cannot be attended to."""
    cache = engine.runner.cache
    decode = cache.decode

    def failing(lengths: Any, first: int = 0) -> Any:
        if any(MARKED in r.input_ids for r in engine.running[first : first + len(lengths)]):
            raise IndexError("no such slot")
        return decode(lengths, first)

    cache.decode = failing  # type: ignore[method-assign]


def break_logits(engine: Engine) -> None:
    """A step gives NaN for the marked request."""
    forward = engine.model.forward

    def failing(input_ids_T: torch.Tensor, *more: Any) -> torch.Tensor:
        hidden_TH = forward(input_ids_T, *more)
        return hidden_TH.masked_fill((input_ids_T == MARKED)[:, None], torch.nan)

    engine.model.forward = failing  # type: ignore[method-assign]


def break_text(engine: Engine) -> None:
    """Its text cannot be decoded: a panic of the tokenizer, which is no Exception."""
    decode = engine.chat.decode

    class Panic(BaseException):
        pass

    def failing(ids: list[int], *more: Any) -> str:
        if engine.running and any(MARKED in r.input_ids and r.output_ids[-len(ids) :] == ids for r in engine.running):
            raise Panic("no such text")
        return decode(ids, *more)

    engine.chat.decode = failing  # type: ignore[method-assign]


def break_sampling(engine: Engine) -> None:
    """Its parameters are such that they have passed every check and still cannot be used."""
    submit = engine.submit

    def submitting(request: Request) -> None:
        if MARKED in request.input_ids:
            object.__setattr__(request.params, "temperature", "hot")
        submit(request)

    engine.submit = submitting  # type: ignore[method-assign]


@pytest.mark.parametrize("broken", [break_model, break_decoding, break_logits, break_text, break_sampling])
def test_a_fault_of_one_request_ends_that_request_only(
    qwen2_checkpoint: Path, running: Running, broken: Callable[[Engine], None]
) -> None:
    """Among twenty that run at once, greedy and sampled; the others' answers are as if it had not been there."""
    asked = [[i for i in prompt if i != MARKED] or [5] for prompt in prompts(20)]
    want = [running.answer(p, max_new_tokens=20, stop=["\x00"]).output_ids for p in asked]
    engine = make_engine(qwen2_checkpoint)
    broken(engine)
    server = Running(engine)
    try:
        submitted = [server.submit(p, max_new_tokens=20, stop=["\x00"]) for p in asked[:10]]
        marked, marked_ended = server.submit([5, MARKED], max_new_tokens=20, stop=["\x00"])
        submitted += [server.submit(p, max_new_tokens=20, stop=["\x00"]) for p in asked[10:]]
        assert all(ended.wait(240) for _, ended in submitted)
        assert marked_ended.wait(240)
        assert marked.finish_reason is not None
        assert (marked.finish_reason["type"], marked.finish_reason["status_code"]) == ("abort", 500)
        assert "request r has failed" in marked.finish_reason["message"]
        assert [r.output_ids for r, _ in submitted] == want
        assert engine.error is None
        assert len(server.answer([5]).output_ids) == 16
        assert engine.load() == {"num_running_reqs": 0, "num_waiting_reqs": 0, "num_used_tokens": 0}
    finally:
        engine.stop()
        server.thread.join(10)


def test_a_step_that_fails_for_all_together_is_done_for_each_alone(qwen2_checkpoint: Path, running: Running) -> None:
    """As where memory runs out: nobody is lost."""
    asked = prompts(6)
    want = [running.answer(p).output_ids for p in asked]
    engine = make_engine(qwen2_checkpoint)
    forward, longest = engine.model.forward, max(map(len, asked))

    def failing(input_ids_T: torch.Tensor, *more: Any) -> torch.Tensor:
        if 1 < len(input_ids_T) < 6 or len(input_ids_T) > longest:
            raise MemoryError("not enough")
        return forward(input_ids_T, *more)

    engine.model.forward = failing  # type: ignore[method-assign]
    server = Running(engine)
    try:
        assert [r.output_ids for r in server.answers(asked)] == want
    finally:
        engine.stop()
        server.thread.join(10)


def test_an_engine_that_fails_says_so_to_all(qwen2_checkpoint: Path) -> None:
    engine = make_engine(qwen2_checkpoint)
    server = Running(engine)
    server.answer([5])
    del engine.model.model.norm  # what a defect or a broken device looks like: the next step raises
    request = server.answer([5])
    assert request.finish_reason is not None
    assert request.finish_reason["status_code"] == 500
    server.thread.join(10)
    with pytest.raises(EngineDead, match="norm"):
        server.submit([5])


def test_stops(running: Running, qwen2_checkpoint: Path) -> None:
    prompt = prompts(1)[0]
    free = running.answer(prompt, max_new_tokens=32).output_ids
    stop_id = free[10]
    first = free.index(stop_id)
    stopped = running.answer(prompt, max_new_tokens=32, stop_token_ids=[stop_id], ignore_eos=False)
    assert stopped.output_ids == free[: first + 1]
    assert stopped.finish_reason == {"type": "stop", "matched": stop_id}
    text = running.engine.chat.decode(free)
    stop = text[6:9]
    by_string = running.answer(prompt, max_new_tokens=32, stop=[stop, "never"])
    assert by_string.finish_reason == {"type": "stop", "matched": stop}
    decoded = running.engine.chat.decode(by_string.output_ids)
    assert stop in decoded
    assert stop not in running.engine.chat.decode(by_string.output_ids[:-1])
    ignored = running.answer(prompt, max_new_tokens=32, stop_token_ids=[stop_id])
    assert ignored.output_ids == free
    stops = {"stop_token_ids": [stop_id], "ignore_eos": False}
    kept_going = running.answer(prompt, max_new_tokens=32, min_new_tokens=20, **stops)
    assert len(kept_going.output_ids) >= 20
    assert stop_id not in kept_going.output_ids[:19]
    limited = running.answer(prompt, max_new_tokens=4)
    assert limited.finish_reason == {"type": "length", "length": 4}


def test_an_end_token_ends_unless_ignored(running: Running) -> None:
    """At a high temperature, end tokens come by chance, and with a seed always at the same place."""
    eos = set(running.engine.chat.eos_ids)
    met = 0
    for seed in range(8):
        drawn = {"temperature": 5.0, "sampling_seed": seed, "max_new_tokens": 300}
        free = running.answer([5, 6], **drawn).output_ids
        assert len(free) == 300
        end = next((i for i, token in enumerate(free) if token in eos), None)
        ended = running.answer([5, 6], ignore_eos=False, **drawn)
        if end is not None:
            met += 1
            assert ended.output_ids == free[: end + 1]
            assert ended.finish_reason == {"type": "stop", "matched": free[end]}
    assert met > 0


def test_logprobs_are_those_of_the_model(running: Running, qwen2_checkpoint: Path) -> None:
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(qwen2_checkpoint, dtype=torch.float64)
    prompt = prompts(1, 20, 30)[0]
    for start in (0, 7, len(prompt) - 1):
        ended = threading.Event()
        request = running.engine.request(
            "r",
            prompt,
            sampling_params(max_new_tokens=5, **GREEDY),
            on_update=lambda _, ended=ended: ended.set(),
            return_logprob=True,
            logprob_start_len=start,
            top_logprobs_num=3,
        )
        running.engine.submit(request)
        assert ended.wait(240)
        with torch.no_grad():
            want = reference(torch.tensor([prompt + request.output_ids])).logits[0].log_softmax(-1)
        assert [entry[1] for entry in request.input_logprobs] == prompt[start:]
        assert request.input_logprobs[0][0] is None
        for offset, (value, token, _) in enumerate(request.input_logprobs[1:], start):
            assert value == pytest.approx(want[offset, token].item(), abs=1e-5)
        for offset, (value, token, _) in enumerate(request.output_logprobs, len(prompt) - 1):
            assert value == pytest.approx(want[offset, token].item(), abs=1e-5)
        assert len(request.input_top_logprobs) == len(request.input_logprobs)
        for (value, token, _), top in zip(request.output_logprobs, request.output_top_logprobs, strict=True):
            assert len(top.ids) == 3
            assert top.triples()[0] == [value, token, None]  # greedy: the best is the chosen one


@pytest.mark.parametrize(
    ("params", "allowed"),
    [
        ({}, {0, 1, 2, 3, 4}),
        ({"top_k": 2}, {0, 1}),
        ({"top_p": 0.6}, {0, 1}),
        ({"top_p": 0.4}, {0}),
        ({"min_p": 0.3}, {0, 1}),
        ({"top_k": 3, "top_p": 0.75, "min_p": 0.1}, {0, 1}),
        ({"top_k": 1}, {0}),
        ({"temperature": 0}, {0}),
    ],
)
def test_sampling_follows_the_distribution(params: dict[str, float], allowed: set[int]) -> None:
    """Token i has probability p[i]; what is kept is drawn in proportion (chi-squared below its 99.99% point)."""
    p = np.array([0.5, 0.3, 0.12, 0.08, 1e-9])
    order = [2, 0, 4, 1, 3]  # in the vocabulary they do not stand sorted
    logits = torch.full((5,), 0.0, dtype=torch.float64)
    logits[order] = torch.from_numpy(np.log(p))
    draws = 4000
    rows = [sampling_params(sampling_seed=seed, **params) for seed in range(draws)]
    ids = sample(logits.expand(draws, -1), rows, [3] * draws)
    counts = np.bincount([order.index(i) for i in ids.tolist()], minlength=5)
    kept = sorted(allowed)
    assert counts.sum() == counts[kept].sum() == draws
    expected = p[kept] / p[kept].sum() * draws
    assert (((counts[kept] - expected) ** 2) / expected)[expected > 1].sum() < 23.5


def test_random_numbers_depend_on_seed_and_position_alone() -> None:
    u = uniform(range(1000), [0] * 1000)
    assert np.array_equal(uniform([7, 3], [0, 0]), u[[7, 3]])
    by_position = uniform([1] * 1000, range(1000))
    for values in (u, by_position):
        assert ((values >= 0) & (values < 1)).all()
        assert abs(values.mean() - 0.5) < 0.05
        assert len(set(values.tolist())) == 1000
    assert abs(np.corrcoef(u, by_position)[0, 1]) < 0.15


@pytest.mark.parametrize("backend", ["numba", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_decode_attention_equals_its_definition(qwen2_checkpoint: Path, backend: str, dtype: torch.dtype) -> None:
    """Cache growth, slots that move and ragged lengths against softmax(q·k/sqrt(d))·v written out."""
    heads, kv_heads, d = 4, 2, 16  # of the checkpoint
    from micota_fast.model.config import ModelConfig

    generator = torch.Generator().manual_seed(0)
    cache = KVCache(ModelConfig.from_checkpoint(qwen2_checkpoint), torch.device("cpu"), dtype, backend)  # type: ignore[arg-type]
    lengths = np.array([3, 130, 0, 64])
    history = [torch.randn(2, n + 1, kv_heads, d, generator=generator, dtype=dtype) for n in lengths]
    cache.reserve(2, 5, 0)
    cache.k[1][0, :, :3], cache.v[1][0, :, :3] = (x[:3].transpose(0, 1) for x in history[0])
    cache.reserve(5, 140, 1)  # grows both ways; slot 0 stays
    for slot in (1, 2):
        n = lengths[slot]
        cache.k[1][slot, :, :n], cache.v[1][slot, :, :n] = (x[:n].transpose(0, 1) for x in history[slot])
    cache.k[1][4, :, :64], cache.v[1][4, :, :64] = (x[:64].transpose(0, 1) for x in history[3])
    cache.move(4, 3, 64)
    q = torch.randn(4, heads, d, generator=generator, dtype=dtype)
    new = torch.stack([x[:, -1] for x in history], dim=1)
    out = cache.decode(lengths)(1)(q, new[0], new[1])
    for b, (k, v) in enumerate(history):
        k, v = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (k, v))
        weights = (torch.einsum("nd,tnd->nt", q[b], k) / d**0.5).softmax(-1)
        want = torch.einsum("nt,tnd->nd", weights, v)
        torch.testing.assert_close(out[b], want, rtol=0, atol=1e-5 if dtype == torch.float32 else 1e-13)


def test_the_decode_backend_is_stated() -> None:
    assert choose_decode_backend(torch.device("cpu"), torch.float64)[0] == "numba"
    backend, why = choose_decode_backend(torch.device("cpu"), torch.bfloat16)
    assert backend == "sdpa"
    assert "bfloat16" in why


def test_prefill_of_several_prompts_equals_each_alone(running: Running) -> None:
    """Hidden states of a prompt do not know what was packed beside it: log-probabilities of the first token agree."""
    asked = prompts(6)
    model = running.engine.model
    for prompt, got in zip(asked, running.answers(asked, max_new_tokens=1), strict=True):
        from micota_fast.model.attention import PackedAttention

        T = len(prompt)
        with torch.inference_mode():
            hidden = model(torch.tensor(prompt), torch.arange(T), PackedAttention(torch.tensor([0, T]).int(), [T]))
            assert F.linear(hidden[-1], model.lm_head_weight).argmax().item() == got.output_ids[0]
