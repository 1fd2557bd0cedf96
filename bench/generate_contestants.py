"""What bench/generate.py measures in processes of their own: `python bench/generate_contestants.py NAME SETTINGS`.

SETTINGS is a JSON object. The last line that a contestant prints is one, too, with its figures.
"""

import asyncio
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from micota_fast.config.generation import ChatConfig

CHAT = ChatConfig(system=None, prompt="{problem}")


def micota(settings: dict[str, Any]) -> dict[str, Any]:
    """`micota generate`, from the call to the finished corpus."""
    from micota_fast.config.generation import GenerateConfig
    from micota_fast.generation import generate

    names = ("model", "problems", "out", "url", "samples", "temperature", "max_new_tokens", "concurrency")
    request = GenerateConfig(chat=CHAT, **{name: settings[name] for name in names})
    cpu_s, started = time.process_time(), time.perf_counter()
    generate.run(request)
    taken = {"cpu_s": time.process_time() - cpu_s, "wall_s": time.perf_counter() - started}
    return taken | {"requests": json.loads(Path(f"{request.out}.meta.json").read_bytes())["completions"]}


def bare_aiohttp(settings: dict[str, Any]) -> dict[str, Any]:
    """The same requests posted by aiohttp, their bodies encoded and the answers decoded, and nothing else done."""
    import aiohttp

    from micota_fast.chat.encoding import Chat
    from micota_fast.sources.problems import read_problems

    chat = Chat.from_checkpoint(settings["model"], CHAT)
    prompts = [chat.encode_prompt(problem.problem) for problem in read_problems(settings["problems"])]
    params = {"max_new_tokens": settings["max_new_tokens"], "temperature": settings["temperature"]}
    wanted = [ids for ids in prompts for _ in range(settings["samples"])]
    left = iter(wanted)

    async def worker(session: aiohttp.ClientSession) -> None:
        for ids in left:
            body = json.dumps({"input_ids": ids, "sampling_params": params})
            async with session.post(settings["url"] + "/generate", data=body) as response:
                json.loads(await response.read())["text"]

    async def run() -> None:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            await asyncio.gather(*(worker(session) for _ in range(settings["concurrency"])))

    cpu_s, started = time.process_time(), time.perf_counter()
    asyncio.run(run())
    taken = {"cpu_s": time.process_time() - cpu_s, "wall_s": time.perf_counter() - started}
    return taken | {"requests": len(wanted)}


def transformers(settings: dict[str, Any]) -> dict[str, Any]:
    """Its `generate`, greedy, in left-padded batches, each as long as its longest answer."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(settings["threads"])
    model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None  # as `ignore_eos`: each answer is as long as it is wanted
    prompts, lengths = settings["prompts"], settings["lengths"]
    order = sorted(range(len(prompts)), key=lambda i: lengths[i])
    size = settings["batch"]
    answers: dict[int, list[int]] = {}

    def answer(some: list[int], most: int) -> None:
        width = max(len(prompts[i]) for i in some)
        ids_BT = torch.tensor([[0] * (width - len(prompts[i])) + prompts[i] for i in some])
        mask_BT = torch.tensor([[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in some])
        made_BT = model.generate(
            input_ids=ids_BT, attention_mask=mask_BT, max_new_tokens=most, do_sample=False, pad_token_id=0
        )
        for i, row in zip(some, made_BT[:, width:].tolist(), strict=True):
            answers[i] = row[: lengths[i]]

    with torch.inference_mode():
        answer(order[:size], 4)  # once, to warm up
        cpu_s, started = time.process_time(), time.perf_counter()
        for start in range(0, len(order), size):
            some = order[start : start + size]
            answer(some, max(lengths[i] for i in some))
    taken = {"cpu_s": time.process_time() - cpu_s, "wall_s": time.perf_counter() - started}
    return taken | {"tokens": sum(lengths), "answers": [answers[i] for i in range(len(prompts))]}


CONTESTANTS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "micota": micota,
    "bare aiohttp": bare_aiohttp,
    "transformers": transformers,
}

if __name__ == "__main__":
    chosen = json.loads(sys.argv[2])
    if "core" in chosen:
        os.sched_setaffinity(0, {chosen["core"]})
    figures = CONTESTANTS[sys.argv[1]](chosen)
    print(json.dumps(figures))
