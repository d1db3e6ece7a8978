"""The error for wrong input, which the user can correct."""


class UserError(Exception):
    """Wrong input. The command line prints its text as one line and exits with code 2.

    The text says what is wrong, where, and what to do.
    """
