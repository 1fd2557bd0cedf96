"""How long a server asks to be left alone: the Retry-After header of RFC 9110, section 10.2.3."""

import time
from email.utils import parsedate_to_datetime

LONGEST_S = 3600.0  # that is believed; then the server is asked again


def seconds_to_wait(retry_after: str | None, date: str | None) -> float:
    """Return for how many seconds, 0 to LONGEST_S, a reply asks to send nothing; 0 if it does not say.

    Args:
        retry_after: the header: seconds, or a date of HTTP.
        date: the reply's Date header, from which a date is counted; None: from now.
    """
    if retry_after is None:
        return 0.0
    text = retry_after.strip()
    if text.isascii() and text.replace(".", "", 1).isdigit():  # a fraction is not in the RFC, and is sent
        return min(float(text), LONGEST_S)
    until = _timestamp(text)
    now = _timestamp(date) or time.time()
    return 0.0 if until is None else min(max(0.0, until - now), LONGEST_S)


def _timestamp(date: str | None) -> float | None:
    try:
        return None if date is None else parsedate_to_datetime(date).timestamp()
    except (ValueError, OverflowError):
        return None
