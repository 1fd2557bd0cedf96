"""The servers that answer: those that a configuration names by URL, or ones started for its model."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from micota_fast.common.api_key import read_key
from micota_fast.common.urls import hide_credentials
from micota_fast.config.evaluation import EvaluateConfig
from micota_fast.config.generation import GenerateConfig
from micota_fast.errors import InputError
from micota_fast.model.folder import resolve_model
from micota_fast.serve import sglang
from micota_fast.serve.serve import serving


@contextlib.contextmanager
def servers_for(config: GenerateConfig | EvaluateConfig, log_path: str | Path) -> Iterator[list[str]]:
    """Yield the URLs named in the config, or those of servers started for its model.

    Raises:
        InputError: see `named_urls`; or a server did not start.
    """
    if (urls := named_urls(config)) is not None:
        yield urls
        return
    serve = sglang.seeded(config.serve) if config.temperature > 0 else config.serve
    with serving(config.model, serve, log_path) as urls:
        yield urls


def named_urls(config: GenerateConfig | EvaluateConfig) -> list[str] | None:
    """Return the checked URLs that the config names; None: a server is to be started.

    Raises:
        InputError: there is no such checkpoint or no key, a URL is not valid, or one is listed twice.
    """
    if config.api == "openai":
        read_key(config.openai.key_env)
    else:
        resolve_model(config.model)  # its tokenizer is needed in any case
    if config.url is None:
        return None
    urls = [_checked_url(url) for url in ([config.url] if isinstance(config.url, str) else config.url)]
    if len(set(map(hide_credentials, urls))) != len(urls):
        raise InputError("`url` names a server twice")
    return urls


def _checked_url(url: str) -> str:
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and url.isprintable()
        good = good and not set(url) & set(" ?#")
    except ValueError:  # a port that is not a number, brackets that do not match
        good = False
    if not good:
        shown = url.rpartition("@")[2]  # a password with a slash in it is not where a URL has one
        raise InputError(f"`url`: {shown!r} is not the address of a server; it looks like http://localhost:30000")
    return url.rstrip("/")
