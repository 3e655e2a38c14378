"""What was asked for cannot be had, in one line for whoever asked."""


class Refused(Exception):
    """Ends a command with that line and exit status 2; anything else that is raised is a defect."""
