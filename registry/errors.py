"""The error for wrong input, which the user can correct."""

from registry.text import in_one_line


class UserError(Exception):
    """Wrong input. The command line prints its text as one line and exits with code 2.

    The text says what is wrong, where, and what to do. It may quote names from outside: control characters in them,
    such as a newline that would begin another line, are replaced.
    """

    def __init__(self, text: object) -> None:
        super().__init__(in_one_line(text))
