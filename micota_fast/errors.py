"""The one exception for what a user can mend: bad input, a bad recipe, a missing file."""


class InputError(Exception):
    """Says what was wrong, where (file, line, key or tensor) and what to do.

    The command line prints the message without a traceback and exits with status 2; any other exception is a defect
    of this project and keeps its traceback.
    """
