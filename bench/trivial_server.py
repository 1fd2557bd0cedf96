"""The least that answers /generate: one body for all, after a pause. Only the client's work is left to measure.

    python bench/trivial_server.py TOKENS HOLD_S

It prints its port, and at the end of its standard input a JSON object with its own processor seconds and requests.
"""

import asyncio
import json
import sys
import time


def answer(tokens: int) -> bytes:
    """In SGLang's shape, with a token id and five letters a token."""
    meta = {
        "id": "trivial",
        "finish_reason": {"type": "stop", "matched": 2},
        "prompt_tokens": 100,
        "completion_tokens": tokens,
        "cached_tokens": 0,
        "e2e_latency": 0.1,
    }
    words = [f"w{i % 1000:03} " for i in range(tokens)]
    ids = [i % 32 for i in range(tokens)]  # of any vocabulary
    return json.dumps({"text": "".join(words), "output_ids": ids, "meta_info": meta}).encode()


def response(body: bytes, status: bytes = b"200 OK") -> bytes:
    """With its head."""
    return b"HTTP/1.1 %b\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (status, len(body), body)


class Server:
    """What the connections share."""

    def __init__(self, tokens: int, hold_s: float) -> None:
        self.answer = response(answer(tokens))
        self.hold_s = hold_s
        self.requests = self.waiting = 0
        self.missing = response(b'{"error": {"message": "no such page"}}', b"404 Not Found")

    def loads(self) -> bytes:
        """/v1/loads: whatever is asked runs."""
        load = {"num_running_reqs": self.waiting, "num_waiting_reqs": 0, "token_usage": 0.5}
        return response(json.dumps({"loads": [load]}).encode())


class Connection(asyncio.Protocol):
    """Requests one after another, each with a Content-Length if it has a body."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._buffer = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while (end := self._buffer.find(b"\r\n\r\n")) >= 0:
            head = bytes(self._buffer[:end])
            at = head.find(b"Content-Length: ")
            length = int(head[at + 16 :].partition(b"\r\n")[0]) if at >= 0 else 0
            if len(self._buffer) < end + 4 + length:
                return
            del self._buffer[: end + 4 + length]
            if head.startswith(b"POST"):
                self._server.requests += 1
                self._server.waiting += 1
                if self._server.hold_s:
                    asyncio.get_running_loop().call_later(self._server.hold_s, self._answer)
                else:
                    self._answer()
            else:
                loads = head.startswith(b"GET /v1/loads")
                self._transport.write(self._server.loads() if loads else self._server.missing)

    def _answer(self) -> None:
        self._server.waiting -= 1
        self._transport.write(self._server.answer)


async def main() -> None:
    """Serve until the standard input ends."""
    server = Server(int(sys.argv[1]), float(sys.argv[2]))
    loop = asyncio.get_running_loop()
    listening = await loop.create_server(lambda: Connection(server), "127.0.0.1", 0, backlog=4096)
    print(listening.sockets[0].getsockname()[1], flush=True)
    started = time.process_time()
    await loop.run_in_executor(None, sys.stdin.read)
    print(json.dumps({"cpu_s": time.process_time() - started, "requests": server.requests}), flush=True)


if __name__ == "__main__":
    asyncio.run(main())
