"""The warning that something slower serves, for a reason that the user can remove."""

from __future__ import annotations

import warnings


class FallbackWarning(RuntimeWarning):
    """The compiled CPU kernels would serve, and something that can be repaired prevents it.

    It is issued once a process, where the backend is chosen automatically, and says why and what to
    do. With LORAFAST_BACKEND=eager it is not issued, and with LORAFAST_BACKEND=cpu the call raises.

    Args:
        message: the reason and the remedy, in words.

    Example:
        import warnings

        # No compiler is wanted on this machine: do not mention it.
        warnings.filterwarnings("ignore", category=lorafast.FallbackWarning)
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)


class Remediable(str):
    """A backend's reason to refuse that is none of the problem's, with what to do about it."""

    __slots__ = ()


class Provisional(str):
    """A backend's reason to refuse that holds for this call alone and must not be remembered."""

    __slots__ = ()


# One element until the warning has been issued: pop is atomic among threads, and no thread can hold
# it while the process forks, as it could a lock.
_to_issue = [True]


def warn_once(message: str) -> None:
    """Issue a FallbackWarning, unless this process has issued one."""
    try:
        _to_issue.pop()
    except IndexError:
        return
    warnings.warn(FallbackWarning(message), stacklevel=3)


def warn_of_eager(reason: Remediable) -> None:
    """Warn, once a process, that eager serves in place of the CPU kernels."""
    warn_once(
        "lorafast's compiled CPU kernels cannot be used, and the slower eager backend serves: "
        f"{reason}. (LORAFAST_BACKEND=eager says that this is intended.)"
    )
