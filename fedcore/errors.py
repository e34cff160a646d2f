"""Every error that Roundtable raises on purpose.

FedError
├── InvalidInput                what somebody wrote is wrong: the message names the value and the bound
│   ├── JobFileError            a job file; carries every problem found, each with its key path
│   ├── ConfigError             server or client settings
│   ├── UnknownPlugin           no codec, rule, adapter, task … of that name
│   ├── LayoutError             tensors that do not fit a layout
│   └── FrameError              bytes that are not a valid frame
├── NotFound                    no such job, version, client
├── Refused                     the server will not do it
│   ├── Unauthenticated         no certificate, a revoked one, a bad token or signature
│   └── UpdateRejected          an update that was looked at and not counted; ``reason`` is an `UpdateResult`
├── Unreachable                 nobody answers; trying again later makes sense
│   └── Busy                    somebody does, and has too much in hand for the caller already
├── StateError                  the state folder
│   ├── StateLocked             another server works on it
│   ├── StateUnusable           missing, of a newer format, corrupt
│   └── StorageFailed           full, read-only, input/output error
├── AddressInUse                a port is taken
└── JobFailed                   the job ended without its result

Each class has a permanent ``code`` for machines and an exit code for the shell (docs/exit-codes.md).
Foreign exceptions are turned into one of these once, at the edge where they appear.
"""

from __future__ import annotations

from enum import IntEnum, StrEnum
from typing import ClassVar


class Exit(IntEnum):
    """Exit codes of every command; docs/exit-codes.md has a section for each."""

    OK = 0
    INTERNAL = 1
    USAGE = 2
    INVALID = 3
    NOT_FOUND = 4
    UNREACHABLE = 5
    ADDRESS_IN_USE = 6
    STATE_LOCKED = 7
    STATE_UNUSABLE = 8
    REFUSED = 9
    JOB_FAILED = 10
    STORAGE_FAILED = 11
    INTERRUPTED = 130


class UpdateResult(StrEnum):
    """What became of an update; the label values of the metric and the words in the journal."""

    ACCEPTED = "accepted"
    NOT_ASSIGNED = "not-assigned"
    UNKNOWN_JOB = "unknown-job"
    TOO_LATE = "too-late"
    WRONG_VERSION = "wrong-version"
    WRONG_LAYOUT = "wrong-layout"
    WRONG_BASE = "wrong-base"
    WRONG_SIZE = "wrong-size"
    WRONG_DIGEST = "wrong-digest"
    BAD_SIGNATURE = "bad-signature"
    MALFORMED = "malformed"
    NOT_FINITE = "not-finite"
    OUT_OF_BOUNDS = "out-of-bounds"
    DUPLICATE = "duplicate"


class FedError(Exception):
    """Root of the tree."""

    code: ClassVar[str] = "error"
    exit_code: ClassVar[Exit] = Exit.INTERNAL


class InvalidInput(FedError, ValueError):
    """Something that a person or a peer wrote is wrong."""

    code = "invalid-input"
    exit_code = Exit.INVALID


class JobFileError(InvalidInput):
    """A job file that cannot be run.

    Attributes:
        source: the file, as the user named it.
        problems: one line each, ``key.path: what is wrong``, without its middle if it is longer than `MAX_CHARS`.
    """

    MAX_CHARS: ClassVar[int] = 1000
    code = "invalid-job"

    def __init__(self, source: str, problems: list[str]) -> None:
        self.source = source
        half = self.MAX_CHARS // 2
        # A reader's own words may quote all of a file; where in the file stands at their end.
        self.problems = [
            problem if len(problem) <= self.MAX_CHARS else f"{problem[:half]}…{problem[1 - half :]}"
            for problem in problems
        ]
        super().__init__("\n".join(f"{source}: {problem}" for problem in self.problems))


class ConfigError(InvalidInput):
    """A setting of the server or of a client is wrong."""

    code = "invalid-config"


class UnknownPlugin(InvalidInput):
    """No plugin of that name is installed."""

    code = "unknown-plugin"


class LayoutError(InvalidInput):
    """Tensors and layout do not fit together."""

    code = "wrong-layout"


class FrameError(InvalidInput):
    """Bytes that claim to be a frame and are not."""

    code = "malformed-frame"


class NotFound(FedError):
    """The thing asked for does not exist."""

    code = "not-found"
    exit_code = Exit.NOT_FOUND


class Refused(FedError):
    """The other side understood and will not do it."""

    code = "refused"
    exit_code = Exit.REFUSED


class Unauthenticated(Refused):
    """Who asks has not proved who it is, or is no longer welcome."""

    code = "unauthenticated"


class UpdateRejected(Refused):
    """An update that does not count.

    Attributes:
        reason: why, as counted in metrics and kept in the journal.
    """

    code = "update-rejected"

    def __init__(self, reason: UpdateResult, text: str) -> None:
        self.reason = reason
        super().__init__(text)


class Unreachable(FedError):
    """No answer. Trying again later makes sense."""

    code = "unreachable"
    exit_code = Exit.UNREACHABLE


class Busy(Unreachable):
    """The other side has too much in hand for this caller already. Trying again later makes sense."""

    code = "busy"


class StateError(FedError):
    """The state folder cannot be used."""

    code = "state"
    exit_code = Exit.STATE_UNUSABLE


class StateLocked(StateError):
    """Another server process works on this state folder."""

    code = "state-locked"
    exit_code = Exit.STATE_LOCKED


class StateUnusable(StateError):
    """Missing, of a newer format, or damaged."""

    code = "state-unusable"


class StorageFailed(StateError):
    """The disk is full, read-only or failing."""

    code = "storage-failed"
    exit_code = Exit.STORAGE_FAILED


class AddressInUse(FedError):
    """A port to listen on is taken."""

    code = "address-in-use"
    exit_code = Exit.ADDRESS_IN_USE


class JobFailed(FedError):
    """The job ended without its result."""

    code = "job-failed"
    exit_code = Exit.JOB_FAILED
