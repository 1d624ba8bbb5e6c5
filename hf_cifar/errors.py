"""The one exception for a user's mistake."""


class UserError(ValueError):
    """A request that cannot be carried out; the message states what was found and what to do next.

    The command line prints it as one line and exits with status 2.
    """

    def __init__(self, message: str) -> None:
        # torch re-raises an error of a loader's worker with the whole traceback as its message: keep its end.
        super().__init__(message.rpartition("errors.UserError: ")[2].strip())
