"""The error that is meant for the person at the keyboard."""


class UserError(Exception):
    """Input or arguments that cannot be used; the command line prints it as one line.

    Example:
        >>> raise UserError("--data missing.jsonl: no such file or directory")
        Traceback (most recent call last):
        sgp.train.errors.UserError: --data missing.jsonl: no such file or directory
    """
