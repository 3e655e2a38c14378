"""What a call warns of, and that its warnings name the caller's file."""

import sys
import warnings


def messages(function):
    """Return what the call of a function warns of; each warning names the file that asks here."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function()
    asking = sys._getframe(1).f_code.co_filename
    assert {warning.filename for warning in caught} <= {asking}
    return [str(warning.message) for warning in caught]
