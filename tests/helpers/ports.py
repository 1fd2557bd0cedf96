"""TCP ports that nobody listens on, and that nobody else is given meanwhile."""

import socket

_HELD: list[socket.socket] = []  # until this process ends


def free_ports(count: int) -> list[int]:
    """Return different ports of the loopback address that refuse connections until somebody listens there.

    Each is held by a socket that is bound and never listens. The kernel gives it to no other, and lets a server that
    sets SO_REUSEADDR, as all do that these tests start, listen on it.
    """
    held = [socket.socket() for _ in range(count)]
    for one in held:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        one.bind(("127.0.0.1", 0))
    _HELD.extend(held)
    return [one.getsockname()[1] for one in held]


def free_port() -> int:
    """Return one such port."""
    return free_ports(1)[0]
