"""What was asked for cannot be had: a row that says so, or one line for whoever asked."""


class Unable(Exception):
    """There is no such contender here. status: that of its row, "missing" or "unsupported"."""

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class Refused(Exception):
    """Ends a command with that line and exit status 2; anything else that is raised is a defect."""
