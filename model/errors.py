"""The one exception that is shown to a user as it is."""


class UserError(ValueError):
    """Bad input: one line that says what is wrong and what to do.

    The command line prints it and exits with 2.
    """
