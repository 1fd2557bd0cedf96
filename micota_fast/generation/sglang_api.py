"""SGLang's native API: /generate with the ids of a prompt, for an answer."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohttp

from micota_fast.chat.encoding import Chat
from micota_fast.chat.thoughts import opening_of
from micota_fast.common.records import Completion, model_name
from micota_fast.config.generation import SamplingSettings
from micota_fast.errors import InputError
from micota_fast.generation.answer_store import scored_fields
from micota_fast.generation.endpoint import Endpoint
from micota_fast.generation.problem_file import ProblemFile
from micota_fast.generation.prompts import Prompts
from micota_fast.generation.reply import Reply, read_reply
from micota_fast.generation.request import REPLY_BYTES, derive_seed, sampling_params
from micota_fast.generation.schedule import Wanted
from micota_fast.generation.scores import Scores, join_scores
from micota_fast.generation.sglang_servers import LOGPROB_BYTES, SGLangServers

ID_BYTES = 24  # of a token's id in JSON, with white space
# SGLang takes `sampling_seed` from everyone, but heeds it in this mode alone.
SEEDS_IGNORED = (
    "{url}: this SGLang server ignores sampling seeds (it runs without --enable-deterministic-inference): "
    "the answers are random, and another run's will differ"
)
OPENING_TOKENS = 32  # at the end of a prompt, among which it opens a thought: `<think>` need not be one token


class SGLangApi(SGLangServers):
    """Asks for answers as the settings say: seeds, limits, thinking budget, log-probabilities.

    Args:
        problems: what is asked.
        config: the settings.
        model: what is served, as the recipe names it.
        checkpoint: the folder with its tokenizer, template and config.json.

    Raises:
        InputError: the settings ask for tokens that the model does not know.
    """

    def __init__(self, problems: ProblemFile, config: SamplingSettings, model: str, checkpoint: Path) -> None:
        super().__init__(model, checkpoint, config.request_timeout_s)
        self._config = config
        self._prompts = prompts = Prompts(problems, Chat.from_checkpoint(checkpoint, config.chat))
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

    async def check_prompts(self, up: Sequence[Endpoint], folder: Path) -> None:
        """Say which servers ignore seeds, and see that every prompt fits the context of all that are up.

        Raises:
            InputError: see `Prompts.check`.
        """
        longest = self.take_context(up)
        if self._config.temperature > 0:
            for endpoint in up:
                if endpoint.info.enable_deterministic_inference is False:
                    print(SEEDS_IGNORED.format(url=endpoint.url), file=sys.stderr, flush=True)
        checked = folder / "prompts-checked.json"
        await self._prompts.check(longest, self.context_length, self._config.max_new_tokens, checked)

    # -- the answers -------------------------------------------------------------------------------------------------

    async def answer(
        self, endpoint: Endpoint, session: aiohttp.ClientSession, wanted: Wanted
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
        most = min(self._config.max_new_tokens, self.context_length - len(prompt) - 1)
        parts = [await self._ask(endpoint, session, wanted, prompt, most if budget is None else min(budget, most))]
        if budget is not None and parts[0].reason == "length":
            if self._config.thinking_end.strip() not in parts[0].text:
                end = self._thinking_end
                parts.append(Reply(self._config.thinking_end, "length", len(end), end, None))
            rest = most - sum(part.tokens for part in parts)
            if rest > 0:
                ids = [*prompt, *(i for part in parts for i in part.ids)]
                inserted = parts[-1].ids if len(parts) > 1 else []
                parts.append(await self._ask(endpoint, session, wanted, ids, rest, inserted))
            elif len(parts) > 1:
                parts.pop()  # no room to continue from it
        text, tokens = "".join(part.text for part in parts), sum(part.tokens for part in parts)
        row = self._row(wanted, parts[-1].reason, text, tokens)
        if not self._config.top_logprobs:
            return row, {}
        ids = [i for part in parts for i in part.ids]
        scores = join_scores([part.scores for part in parts if part.scores is not None])
        if parts[-1].reason == "stop" and self._ends_otherwise(ids):
            ids, scores = ids[:-1], Scores(scores.token_logprobs[:-1], scores.ids[:-1], scores.logprobs[:-1])
        return row, scored_fields(ids, scores)

    def _ends_otherwise(self, ids: list[int]) -> bool:
        """Whether an answer's last token is an end that training text does not have there: it has the template's."""
        chat = self._prompts.chat
        return bool(ids) and ids[-1] in chat.eos_ids and ids[-1] != chat.end_of_turn_id

    def aborted(self, wanted: Wanted) -> Completion:
        """Return the row of an answer that is given up on."""
        return self._row(wanted, "abort", "", 0)

    def _row(self, wanted: Wanted, reason: str, text: str, tokens: int) -> Completion:
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
            opened=self._opened(wanted.problem),
        )

    def _opened(self, problem: int) -> str:
        """What a problem's prompt opens at its end."""
        chat = self._prompts.chat
        return opening_of(chat.decode(self._prompts.ids(problem)[-OPENING_TOKENS:], skip_special_tokens=False))

    def _seed(self, problem_id: str, sample: int) -> int | None:
        return derive_seed(self._config.seed, problem_id, sample) if self._config.temperature > 0 else None

    async def _ask(
        self,
        endpoint: Endpoint,
        session: aiohttp.ClientSession,
        wanted: Wanted,
        ids: list[int],
        most: int,
        inserted: Sequence[int] = (),
    ) -> Reply:
        """Ask for up to `most` tokens after `ids`, which end with what was `inserted` into the answer."""
        config = self._config
        problem_id = self._prompts.problem(wanted.problem).id
        params = {**self._params, "max_new_tokens": most}
        if (seed := self._seed(problem_id, wanted.sample)) is not None:
            params["sampling_seed"] = seed
        body: dict[str, Any] = {"input_ids": ids, "sampling_params": params}
        if config.top_logprobs:
            body |= {"return_logprob": True, "top_logprobs_num": config.top_logprobs}
            if inserted:
                body["logprob_start_len"] = len(ids) - len(inserted) - 1
        try:
            answer = await self.post(endpoint, session, body, self._most_bytes(most + len(inserted) + 1))
        except InputError as error:
            raise InputError(f"problem {problem_id!r}: {error}") from None
        reply = read_reply(answer, most, self._prompts.chat.vocab_size, config.top_logprobs, inserted)
        if (config.thinking_budget is not None or config.top_logprobs) and len(reply.ids) != reply.tokens:
            raise InputError(
                f"{endpoint.url} gives no `output_ids` for {reply.tokens} tokens: `thinking_budget` and "
                f"`top_logprobs` need them"
            )
        return reply

    def _most_bytes(self, tokens: int) -> int:
        """Return the most bytes that an honest reply with this number of tokens has, with all that is around them."""
        places = self._config.top_logprobs + 1 if self._config.top_logprobs else 0
        return REPLY_BYTES + tokens * (self._token_bytes + ID_BYTES + places * LOGPROB_BYTES)
