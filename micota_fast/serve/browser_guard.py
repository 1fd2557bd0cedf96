"""Web pages kept out: a browser on this machine would send their requests to a loopback server for them."""

import ipaddress
import re
import socket
from collections.abc import Awaitable, Callable, Sequence

from aiohttp import web
from aiohttp.typedefs import Middleware

from micota_fast.serve.options import BadRequest

# `name`, `name:port` or `[address]:port`, nothing else: programs disagree about which part of `a@b` counts.
_AUTHORITY = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([\w.-]+))(?::\d{0,5})?", re.ASCII)


class BrowserGuard:
    """Which names a server may be called by: those of `Host`, and of `Origin`, which browsers add.

    A page of a foreign origin sends its origin; one whose own name was pointed at our address (DNS rebinding) sends
    that name as `Host`. So both must be a name of ours: loopback, the address that is listened on, this machine's name
    if that is not loopback, any address at all if it is all of them, and what the settings add.

    Args:
        host: address that is listened on.
        allow_hosts: further names.
    """

    def __init__(self, host: str, allow_hosts: Sequence[str]) -> None:
        self._names = {name.lower().rstrip(".") for name in ("localhost", host, *allow_hosts)}
        self._any_address = not _is_loopback(host) and host in ("0.0.0.0", "::")
        if not _is_loopback(host):
            name = socket.gethostname().lower()
            self._names |= {name, name.partition(".")[0]}

    def allows(self, authority: str) -> bool:
        """Whether `name:port`, as in `Host`, is ours."""
        match = _AUTHORITY.fullmatch(authority)
        if match is None:
            return False
        name = (match[1] or match[2]).lower().rstrip(".")
        return name in self._names or _is_loopback(name) or (self._any_address and _is_address(name))

    def middleware(self) -> Middleware:
        """Refuses with 403, before anything else is read."""

        @web.middleware
        async def guard(
            request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
        ) -> web.StreamResponse:
            for host in request.headers.getall("Host", []):
                if not self.allows(host):
                    raise _foreign("Host", host)
            scheme, whole_url, rest = request.raw_path.partition("://")
            if whole_url and "/" not in scheme and not self.allows(rest.partition("/")[0]):
                raise _foreign("URL", request.raw_path)  # its host goes before `Host` (RFC 9112, 3.2.2)
            for origin in request.headers.getall("Origin", []):
                _, separator, authority = origin.partition("://")
                if not separator or not self.allows(authority):
                    raise _foreign("Origin", origin)
            return await handler(request)

        return guard


def _foreign(header: str, value: str) -> BadRequest:
    return BadRequest(
        f"{header} {value[:80]!r} is foreign to this server; `--set allow_hosts=[NAME]` lets it be called so",
        code="foreign_host",
        status=403,
    )


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _is_loopback(name: str) -> bool:
    return name == "localhost" or (_is_address(name) and ipaddress.ip_address(name).is_loopback)
