"""The one exception that is shown to a user as it is, and how to show what is no text."""


class UserError(ValueError):
    """Bad input: one line that says what is wrong and what to do.

    The command line prints it and exits with 2.
    """


def shown(text: str) -> str:
    """`text` as it can be written anywhere: bytes of a file name that are no UTF-8 become U+FFFD.

    Python has them as lone surrogates, which no encoder takes.
    """
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
