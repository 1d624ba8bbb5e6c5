"""The one exception for a user's mistake."""


class UserError(ValueError):
    """What the user asked for cannot be done; the message says what was found and what to do next.

    The command line prints it as one line and exits with status 2.
    """
