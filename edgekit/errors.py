"""The errors EdgeKit raises: each is one line that says what is wrong and how to mend it."""

from __future__ import annotations


class EdgekitError(Exception):
    """Base of all errors a user can mend.

    Args:
        what: what is wrong, and where.
        expected: what would have been right.
        got: what came instead.
        mend: what to do about it.
    """

    def __init__(self, what: str, *, expected: str = "", got: str = "", mend: str = "") -> None:
        self.what, self.expected, self.got, self.mend = what, expected, got, mend
        line = what
        if expected or got:
            line += ": " + ", ".join(
                part for part in (expected and f"expected {expected}", got and f"got {got}") if part
            )
        if mend:
            line += f"; {mend}"
        super().__init__(" ".join(line.split()))


class BundleError(EdgekitError):
    """A ``.tflite`` file that is not whole, not a TFLite model, or not one that can be run as asked."""


class ConversionError(EdgekitError):
    """A model, its weights or its data that cannot be converted."""


class SourceError(EdgekitError):
    """A source of frames that cannot be opened or that stopped."""


class BrokerError(EdgekitError):
    """An MQTT broker that cannot be reached or refuses what was asked."""


class RuntimeMissingError(EdgekitError):
    """No TFLite runtime, or not the one that was asked for, is installed."""


class InferenceError(BundleError):
    """A frame was lost with the delegate that failed on it; the model goes on with another one.

    ``cause`` is ``hung``, ``crashed`` or ``failed``.
    """

    def __init__(self, what: str, *, cause: str, mend: str = "") -> None:
        self.cause = cause
        super().__init__(what, mend=mend)
