"""What a run needs of the API that its servers speak; `sglang_api` and `openai_api` are the two there are."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import aiohttp

from micota_fast.common.records import Completion
from micota_fast.generation.endpoint import Endpoint, Load
from micota_fast.generation.schedule import Wanted


class Api(Protocol):
    """How servers are asked what they are, how they fare, and for the answer to a problem.

    Attributes:
        model: what is to be served, as the recipe names it.
    """

    model: str

    def endpoint(self, url: str, most: int) -> Endpoint:
        """Return a server that is not asked yet; see `Endpoint`."""
        ...

    async def served_model(self, endpoint: Endpoint, session: aiohttp.ClientSession) -> str | None:
        """Return what a server says it serves; None: it does not say.

        Raises:
            RetryableError: it does not answer, is not up yet, or what it says cannot be a name.
            InputError: it refuses us.
        """
        ...

    def is_wanted(self, served: str) -> bool:
        """Return whether what a server says it serves is the model that is wanted."""
        ...

    async def read_settings(self, endpoint: Endpoint, session: aiohttp.ClientSession) -> None:
        """Take in the settings of a server that has just come up.

        Raises:
            RetryableError: it does not answer, or states a setting that cannot be.
            InputError: it has less room than those that were up before.
        """
        ...

    async def probe_load(self, endpoint: Endpoint, session: aiohttp.ClientSession) -> Load | None:
        """Return how much a server has to do; None: it does not say.

        Raises:
            RetryableError: it does not answer, or what it says is not JSON.
        """
        ...

    async def is_healthy(self, endpoint: Endpoint, session: aiohttp.ClientSession, generates: bool) -> bool:
        """Return whether a server says it is well; `generates`: as far as it can say, by having generated something."""
        ...

    async def check_prompts(self, up: Sequence[Endpoint], folder: Path) -> None:
        """See that every prompt can be sent, as far as that can be known before.

        Args:
            up: the servers that are up first.
            folder: of the journal, which may keep what was found.

        Raises:
            InputError: naming the first problems whose prompts cannot be sent.
        """
        ...

    async def answer(
        self, endpoint: Endpoint, session: aiohttp.ClientSession, wanted: Wanted
    ) -> tuple[Completion, dict[str, Any]]:
        """Return the row of one answer, and what is kept next to the row's own fields.

        Raises:
            RetryableError: another try may succeed.
            InputError: the server refuses this request.
        """
        ...

    def aborted(self, wanted: Wanted) -> Completion:
        """Return the row of an answer that is given up on."""
        ...
