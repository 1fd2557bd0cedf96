"""One answer: the request or the requests that it takes, and the row that is made of them."""

import hashlib
from typing import Any

import aiohttp

from micota_fast.common.records import Completion, model_name
from micota_fast.config.generation import SamplingSettings
from micota_fast.errors import InputError
from micota_fast.generation.endpoint import Endpoint
from micota_fast.generation.prompts import Prompts
from micota_fast.generation.reply import Reply, read_reply
from micota_fast.generation.schedule import Wanted

REPLY_BYTES = 1 << 20  # of a reply besides what grows with its tokens
ID_BYTES = 24  # of a token's id in JSON, with white space
LOGPROB_BYTES = 96  # of a triple of log-probability, id and null


def derive_seed(seed: int, problem_id: str, sample: int) -> int:
    """Return the sampling seed of one answer: 31 bits that depend on nothing but the arguments."""
    digest = hashlib.sha256(f"{seed}\0{problem_id}\0{sample}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def sampling_params(config: SamplingSettings) -> dict[str, Any]:
    """Return `sampling_params` of every request, seeds left out."""
    params: dict[str, Any] = {"max_new_tokens": config.max_new_tokens, "temperature": config.temperature}
    if config.temperature > 0:
        params |= {"top_p": config.top_p, "top_k": config.top_k}
    if config.stop:
        params["stop"] = list(config.stop)
    return params


class Asker:
    """Asks for answers as the settings say: seeds, limits, thinking budget, log-probabilities.

    Args:
        prompts: of the problems.
        config: the settings.
        model: what is served, as the recipe names it.

    Raises:
        InputError: the settings ask for tokens that the model does not know.
    """

    def __init__(self, prompts: Prompts, config: SamplingSettings, model: str) -> None:
        self._prompts, self._config = prompts, config
        # A server stops at those that the checkpoint's files name, which lack the end of turn of a base model trained
        # on chats. They follow from checkpoint and template, so a generation's fingerprint does without them.
        self._params = sampling_params(config) | {"stop_token_ids": list(prompts.chat.eos_ids)}
        self._model_name = model_name(model)
        # A character of four bytes is escaped as twelve, a control character of one as six.
        longest = max(len(token.encode()) for token in prompts.chat.tokenizer.library.get_vocab(with_added_tokens=True))
        self._token_bytes = 3 * longest + 6
        self._thinking_end = prompts.chat.tokenizer.encode([config.thinking_end])[0].tolist()
        known = prompts.chat.vocab_size
        # Either would kill an SGLang server.
        if config.thinking_budget is not None and max(self._thinking_end) >= known:
            raise InputError(
                f"`thinking_end` has token id {max(self._thinking_end)}; the model knows only {known}: "
                f"the tokenizer does not belong to this checkpoint"
            )
        if config.top_logprobs > known:
            raise InputError(f"`top_logprobs` is {config.top_logprobs}; the model knows only {known} tokens")

    async def answer(
        self, endpoint: Endpoint, session: aiohttp.ClientSession, wanted: Wanted, context_length: int
    ) -> tuple[Completion, dict[str, Any]]:
        """Return the row of one answer, and what is kept next to the row's own fields.

        With a thinking budget the answer is asked for up to the budget; a thought that has not ended by then is ended
        with `thinking_end`, and the model continues from there with what is left of `max_new_tokens`.

        Raises:
            RetryableError: another try may succeed.
            InputError: the server refuses this request.
        """
        prompt = self._prompts.ids(wanted.problem)
        budget = self._config.thinking_budget
        # SGLang refuses a request whose prompt and limit together exceed the context length (0.5.23; it then stops two
        # short of it, with "length").
        most = min(self._config.max_new_tokens, context_length - len(prompt) - 1)
        parts = [await self._ask(endpoint, session, wanted, prompt, most if budget is None else min(budget, most))]
        if budget is not None and parts[0].reason == "length":
            if self._config.thinking_end.strip() not in parts[0].text:
                end = self._thinking_end
                parts.append(Reply(self._config.thinking_end, "length", len(end), end, []))
            rest = most - sum(part.tokens for part in parts)
            if rest > 0:
                ids = [*prompt, *(i for part in parts for i in part.ids)]
                parts.append(await self._ask(endpoint, session, wanted, ids, rest))
            elif len(parts) > 1:
                parts.pop()  # no room to continue from it
        text, tokens = "".join(part.text for part in parts), sum(part.tokens for part in parts)
        row = self.row(wanted, parts[-1].reason, text, tokens)
        if not self._config.top_logprobs:
            return row, {}
        places = [place for part in parts for place in part.top_logprobs or [None] * len(part.ids)]
        return row, {"completion_ids": [i for part in parts for i in part.ids], "top_logprobs": places}

    def row(self, wanted: Wanted, reason: str, text: str, tokens: int) -> Completion:
        """Return the row of an answer."""
        problem = self._prompts.problem(wanted.problem)
        return Completion(
            id=problem.id,
            sample=wanted.sample,
            problem=problem.problem,
            answer=problem.answer,
            completion=text,
            finish_reason=reason,
            prompt_tokens=len(self._prompts.ids(wanted.problem)),
            completion_tokens=tokens,
            seed=self._seed(problem.id, wanted.sample),
            model=self._model_name,
        )

    def _seed(self, problem_id: str, sample: int) -> int | None:
        return derive_seed(self._config.seed, problem_id, sample) if self._config.temperature > 0 else None

    async def _ask(
        self, endpoint: Endpoint, session: aiohttp.ClientSession, wanted: Wanted, ids: list[int], most: int
    ) -> Reply:
        config = self._config
        problem_id = self._prompts.problem(wanted.problem).id
        params = {**self._params, "max_new_tokens": most}
        if (seed := self._seed(problem_id, wanted.sample)) is not None:
            params["sampling_seed"] = seed
        body: dict[str, Any] = {"input_ids": ids, "sampling_params": params}
        if config.top_logprobs:
            body |= {"return_logprob": True, "top_logprobs_num": config.top_logprobs}
        try:
            answer = await endpoint.ask(session, body, config.request_timeout_s, self._most_bytes(most))
        except InputError as error:
            raise InputError(f"problem {problem_id!r}: {error}") from None
        reply = read_reply(answer, most, self._prompts.chat.vocab_size, config.top_logprobs)
        if (config.thinking_budget is not None or config.top_logprobs) and len(reply.ids) != reply.tokens:
            raise InputError(
                f"{endpoint.url} gives no `output_ids` for {reply.tokens} tokens: `thinking_budget` and "
                f"`top_logprobs` need them"
            )
        return reply

    def _most_bytes(self, tokens: int) -> int:
        """Bytes that an honest reply of so many tokens can have, whatever JSON escapes and SGLang adds."""
        places = self._config.top_logprobs + 1 if self._config.top_logprobs else 0
        return REPLY_BYTES + tokens * (self._token_bytes + ID_BYTES + places * LOGPROB_BYTES)
