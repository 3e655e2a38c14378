"""Exceptions of the bench: a candidate that does not exist, and a command that cannot run."""


class Unavailable(Exception):
    """Raised where an implementation cannot be built. Its row gets `status` and the message.

    status: "missing" or "unsupported".
    """

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class BenchError(Exception):
    """Ends a command with its message as one line and exit status 2.

    Any other exception is a defect of the bench.
    """
