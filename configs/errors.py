"""Errors for the person at the keyboard: printed without a traceback, exit code 2."""


class UserError(Exception):
    """Something the user can mend: the message says what was found, what was expected and what to do."""


class MissingExtra(UserError):
    """An optional dependency is absent: the message names the extra that brings it."""

    def __init__(self, feature: str, extra: str) -> None:
        super().__init__(f"{feature} needs a package that is not installed; run: pip install 'align-stack[{extra}]'")
