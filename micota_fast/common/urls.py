"""Addresses of servers: the user and password in one are for the server alone and are never shown or stored."""

import base64
import re
from urllib.parse import unquote, urlsplit

_CREDENTIALS = re.compile(r"(?<=://)[^/?#\s]*@")


def hide_credentials(text: str) -> str:
    """Remove USER:PASSWORD@ from every URL in a text."""
    return _CREDENTIALS.sub("", text)


def basic_authorization(url: str) -> str | None:
    """Return the Authorization header for the user and password in a URL; None: it has neither. See RFC 7617."""
    parts = urlsplit(url)
    if parts.username is None and parts.password is None:
        return None
    return (
        "Basic "
        + base64.b64encode(f"{unquote(parts.username or '')}:{unquote(parts.password or '')}".encode()).decode()
    )


def api_base(url: str) -> str:
    """Return the address below which the paths of OpenAI's API lie: /v1 if the URL names a server alone."""
    return url if urlsplit(url).path.strip("/") else f"{url.rstrip('/')}/v1"
