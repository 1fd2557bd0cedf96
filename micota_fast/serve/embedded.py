"""SGLang's HTTP API on our own decoder: `python -m micota_fast.serve.embedded --model DIR`."""

import argparse
import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Sequence
from typing import Any

import torch
from aiohttp import web

from micota_fast.chat.encoding import Chat
from micota_fast.chat.template import find_template
from micota_fast.config.generation import ChatConfig
from micota_fast.errors import InputError
from micota_fast.model.folder import resolve_checkpoint
from micota_fast.model.safetensors_io import load_model
from micota_fast.serve.connections import Connections
from micota_fast.serve.engine import Engine
from micota_fast.serve.server import EmbeddedServer
from micota_fast.serve.wire import log_clients_faults_on_one_line

SHUTDOWN_GRACE_S = 0.2
DEATH_LINGER_S = 2.0  # a dead engine stays visible on /health this long before the process ends


async def serve(server: EmbeddedServer, host: str, port: int, allow_hosts: Sequence[str] = ()) -> int:
    """Answer until SIGTERM or SIGINT, or until the engine fails.

    Args:
        server: the HTTP layer.
        host: address to listen on.
        port: 0: a free one.
        allow_hosts: further names by which clients may call the server.

    Returns:
        The exit status.

    Raises:
        InputError: nobody can listen there.
    """
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ended.set)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setblocking(False)
    try:
        listener.bind((host, port))
    except OSError as error:
        raise InputError(f"cannot listen on {host}:{port}: {error.strerror}; choose another port, or 0") from None
    listener.listen(1024)
    connections = Connections()
    app = server.app(connections, host, allow_hosts)
    log_clients_faults_on_one_line()
    options: dict[str, Any] = {"handler_cancellation": True, "access_log": None, "auto_decompress": False}
    runner = web.AppRunner(app, shutdown_timeout=SHUTDOWN_GRACE_S, **options)
    await runner.setup()
    assert runner.server is not None
    accepting = asyncio.create_task(connections.accept(listener, runner.server))

    def work() -> None:
        server.engine.run()
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(ended.set)

    thread = threading.Thread(target=work, name="engine", daemon=True)
    thread.start()
    shown = f"[{host}]" if family == socket.AF_INET6 else host
    print(f"listening on http://{shown}:{listener.getsockname()[1]}", flush=True)
    await ended.wait()
    if server.engine.error is not None:
        await asyncio.sleep(DEATH_LINGER_S)
    server.engine.stop()
    accepting.cancel()
    listener.close()
    await runner.cleanup()
    thread.join(SHUTDOWN_GRACE_S)
    return 0 if server.engine.error is None else 1


def load_server(
    model: str,
    *,
    dtype: str = "auto",
    device: str = "auto",
    max_running: int = 128,
    context_length: int | None = None,
    served_model_name: str | None = None,
) -> EmbeddedServer:
    """Load a checkpoint (folder or hub name) and build its server, not yet listening.

    Raises:
        InputError: the checkpoint cannot be found or read.
    """
    path = resolve_checkpoint(model)
    has_template = find_template(path) is not None
    chat = Chat.from_checkpoint(path, ChatConfig(use_template=has_template))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    decoder = load_model(path, dtype, device).eval()
    engine = Engine(decoder, chat, max_running=max_running, context_length=context_length)
    return EmbeddedServer(engine, model, served_model_name or model, has_template)


def main(argv: list[str] | None = None) -> int:
    """Command line. Returns the exit status: 0 after SIGTERM, 1 if the engine failed, 2 for bad input."""
    parser = argparse.ArgumentParser(prog="micota_fast.serve.embedded", description=__doc__)
    parser.add_argument("--model", required=True, help="checkpoint: a folder or a hub name")
    parser.add_argument("--host", default="127.0.0.1", help="anything but loopback opens the server to the network")
    parser.add_argument("--port", type=int, default=0, help="0: a free one, named in the first line of the output")
    parser.add_argument("--dtype", default="auto", choices=["auto", "bfloat16", "float32", "float64"])
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--max-running", type=int, default=128, help="requests decoded at once")
    parser.add_argument("--context-length", type=int, default=None, help="tokens; default: the checkpoint's")
    parser.add_argument("--served-model-name", default=None, help="what clients call the model; default: as --model")
    parser.add_argument("--allow-host", action="append", default=[], help="a further name of this server; repeatable")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(name)s: %(message)s")
    try:
        server = load_server(
            args.model,
            dtype=args.dtype,
            device=args.device,
            max_running=args.max_running,
            context_length=args.context_length,
            served_model_name=args.served_model_name,
        )
        gc.collect()
        gc.freeze()  # what is there now stays: looking through it again would hold up all threads
        return asyncio.run(serve(server, args.host, args.port, args.allow_host))
    except InputError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # The engine's thread may still be in a step, which interpreter shutdown must not pull the ground from under.
    os._exit(status)
