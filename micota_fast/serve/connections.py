"""Connections taken in, counted, and closed where nothing comes: they may not use up the process's open files."""

import asyncio
import contextlib
import logging
import resource
import socket
import time
from collections.abc import Callable

from aiohttp import web

log = logging.getLogger(__name__)

REQUEST_WAIT_S = 30.0  # for the headers of a connection's first request, and for the body of each
KEPT_ALIVE_S = 75.0  # for a further request
RESERVED_FILES = 64  # open files that are not connections: libraries, the checkpoint, the log
SWEEP_S = 1.0

Connection = web.RequestHandler


class Connections:
    """Accepts connections, and knows of each whether it waits for its client or is being answered.

    A client may be waited for so long and no longer. When the limit of open files is reached, the connection that has
    waited longest is closed for the next one.
    """

    def __init__(self) -> None:
        files, most_files = resource.getrlimit(resource.RLIMIT_NOFILE)
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most_files, most_files))
            files = most_files
        if files == resource.RLIM_INFINITY:
            files = 1 << 20
        reserved = min(RESERVED_FILES, files // 2)
        self._most = files - reserved
        self._most_answered = self._most - reserved // 4  # so that there is always one to close
        self._waiting: dict[Connection, float] = {}  # until when; in the order in which they began
        self._answered: set[Connection] = set()

    @property
    def full(self) -> bool:
        """Whether no further request for answers should be taken in."""
        return len(self._answered) >= self._most_answered

    def wait(self, connection: Connection, seconds: float) -> None:
        """Its client is waited for from now on, for at most so long."""
        self._answered.discard(connection)
        self._waiting.pop(connection, None)
        self._waiting[connection] = time.monotonic() + seconds

    def answer(self, connection: Connection) -> None:
        """Its client waits for us from now on."""
        self._waiting.pop(connection, None)
        self._answered.add(connection)

    async def accept(self, listener: socket.socket, protocol: Callable[[], Connection]) -> None:
        """Take connections in for ever."""
        loop = asyncio.get_running_loop()
        sweeper = asyncio.create_task(self._sweep())
        try:
            while True:
                try:
                    accepted, _ = await loop.sock_accept(listener)
                except OSError as error:  # no file is left, or the client has gone already
                    log.warning("a connection could not be taken in: %s", error)
                    self._close_longest_waiting()
                    await asyncio.sleep(0.05)
                    continue
                if len(self._waiting) + len(self._answered) >= self._most:
                    self._close_longest_waiting()
                _, connection = await loop.connect_accepted_socket(protocol, accepted)
                self.wait(connection, REQUEST_WAIT_S)
        finally:
            sweeper.cancel()

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            now = time.monotonic()
            self._answered = {connection for connection in self._answered if connection.transport is not None}
            for connection, until in list(self._waiting.items()):
                if connection.transport is None or now > until:
                    self._close(connection)

    def _close_longest_waiting(self) -> None:
        connection = next(iter(self._waiting), None)
        if connection is not None:
            self._close(connection)

    def _close(self, connection: Connection) -> None:
        del self._waiting[connection]
        if connection.transport is not None:
            connection.transport.abort()
