"""Every error that kvstore raises, by what the caller can do about it.

``BadInput`` and its kin are the caller's to mend: one sentence with the place and the remedy.
``TierError`` and ``Corrupt`` stay below the API, where they become a miss, a counter and a log line.
"""

from __future__ import annotations


class KVStoreError(Exception):
    """Base of all errors raised by kvstore."""


class BadInput(KVStoreError, ValueError):
    """The caller gave something that cannot be served; the message says what and how to mend it."""


class Unsupported(BadInput):
    """The model (or a feature of it) cannot be served exactly; the message names the reason."""


class StoreBusy(KVStoreError):
    """Another process holds the directory; the message names it."""


class StoreClosed(KVStoreError):
    """The store was closed before this call."""


class Unreachable(KVStoreError):
    """The daemon is not there, or did not answer in time; the message says which, and what to start."""


class ForkError(KVStoreError):
    """The store was opened before a fork and is used in the child; open it again there."""


class TierError(KVStoreError):
    """A tier could not do what it was asked: I/O failed, no space, too late."""


class Corrupt(TierError):
    """Bytes came back that are not the bytes that were written."""
