"""The demo's processes: each has its log, a failure is told with it, and none outlives the demo."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Final, Self

TETHER: Final = Path(__file__).with_name("tether.py")
POLL_S: Final = 0.1
GRACE_S: Final = 5.0
NUM_LOG_LINES: Final = 12
SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(BaseException):
    """A signal asks the demo to end. Not an `Exception`, so that nothing takes it for a failure.

    Attributes:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        super().__init__(signal.Signals(number).name)


class ChildFailed(Exception):
    """A process ended that should not have, with a code that it should not have, or does not do its part.

    Attributes:
        exit_code: the demo's.
    """

    def __init__(self, text: str, log: Path, exit_code: int) -> None:
        self.exit_code = exit_code if 0 < exit_code < 128 else 1
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-NUM_LOG_LINES:]
        told = [f"the end of {log}:", *(f"  {line}" for line in lines)] if lines else [f"{log} is empty"]
        super().__init__("\n".join([text, *told]))


@dataclass(eq=False)
class Child:
    """A process.

    Attributes:
        name: for messages.
        log: gets its standard error.
        lasts: whether it has to run until it is dismissed.
    """

    name: str
    process: subprocess.Popen[bytes]
    log: Path
    lasts: bool


class Crew:
    """Starts processes and sees to their end; a context manager, to be used on the main thread alone.

    Inside it SIGINT, SIGTERM and SIGHUP raise `Stopped`, once. At its end, however that comes, every process is asked
    to end (SIGTERM), and killed after `GRACE_S` seconds or when another signal comes. Each is in a process group of its
    own, so that Ctrl-C reaches this process alone (in a session of its own `nice` would not tell it from the others),
    and each is tethered (tether.py), should this process be killed.
    """

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._children: list[Child] = []
        self._deadline: tuple[float, str, Path] | None = None
        self._signal: int | None = None
        self._hurries = False
        self._handlers: dict[int, signal._HANDLER] = {}

    def __enter__(self) -> Self:
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup, for one, has a reason to ignore it
                self._handlers[number] = signal.signal(number, self._stop)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number in self._handlers:
            signal.signal(number, self._hurry)
        self._end()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if error is None and self._signal is not None:
            raise Stopped(self._signal)

    def start(
        self, name: str, *command: str | Path, log: str, output: Path | None = None, lasts: bool = False, nice: int = 0
    ) -> Child:
        """Start a process.

        Args:
            name: for messages.
            command: a program's path, and its arguments.
            log: name of the file, without `.log`, to which its standard error is appended.
            output: a new file for its standard output, readable by the owner alone; else `lines` and `finish` have it.
            lasts: whether it is a failure if it ends before it is dismissed.
            nice: how far it steps back for the others.
        """
        path = self._logs / f"{log}.log"
        tethered = [sys.executable, "-I", "-S", TETHER, str(os.getpid()), *command]
        with path.open("ab") as errors:
            out = subprocess.PIPE if output is None else os.open(output, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
            try:
                process = subprocess.Popen(
                    tethered, stdin=subprocess.DEVNULL, stdout=out, stderr=errors, process_group=0
                )
            finally:
                if output is not None:
                    os.close(out)
        child = Child(name, process, path, lasts)
        self._children.append(child)
        if nice:
            os.setpriority(os.PRIO_PROCESS, process.pid, nice)
        return child

    def expect(self, what: str, within_s: float, log: Path) -> None:
        """From now on waiting fails after `within_s` seconds, with a text that names `what` and a log to look at."""
        self._deadline = (time.monotonic() + within_s, f"{what}: not within {within_s:.0f} s", log)

    def expect_nothing(self) -> None:
        """Wait for as long as it takes from now on."""
        self._deadline = None

    def lines(self, child: Child) -> Iterator[str]:
        """Yield each line of a child's standard output as it comes. Call it once for a child.

        Raises:
            ChildFailed: a process failed meanwhile.
        """
        assert child.process.stdout is not None
        source = child.process.stdout.fileno()
        rest = b""
        while True:
            self._check()
            if not select.select([source], [], [], POLL_S)[0]:
                continue
            chunk = os.read(source, 1 << 16)
            if not chunk:
                break
            *whole, rest = (rest + chunk).split(b"\n")
            yield from (line.decode() for line in whole)
        self._join(child)

    def finish(self, *children: Child) -> list[str]:
        """Wait until processes have ended well; return what each wrote to its standard output, if that was not a file.

        Raises:
            ChildFailed: one of them, or one that has to last, failed.
        """
        return ["\n".join(self.lines(child)) if child.process.stdout else self._join(child) for child in children]

    def dismiss(self, children: Sequence[Child]) -> None:
        """Ask processes to end (SIGTERM), without waiting for it."""
        for child in children:
            child.lasts = False
            child.process.terminate()

    def _join(self, child: Child) -> str:
        while child.process.poll() is None:
            self._check()
            time.sleep(POLL_S / 5)
        if child.process.returncode or child.lasts:
            raise _failed(child)
        return ""

    def _check(self) -> None:
        if self._signal is not None:  # Python drops what a signal raises while a destructor runs
            raise Stopped(self._signal)
        for child in self._children:
            if child.lasts and child.process.poll() is not None:
                raise _failed(child)
        if self._deadline is not None and time.monotonic() > self._deadline[0]:
            raise ChildFailed(self._deadline[1], self._deadline[2], 1)

    def _end(self) -> None:
        for child in self._children:
            child.process.terminate()
        until_s = time.monotonic() + GRACE_S
        while any(child.process.poll() is None for child in self._children):
            if self._hurries or time.monotonic() > until_s:
                break
            time.sleep(POLL_S / 5)
        for child in self._children:
            if child.process.poll() is None:
                os.killpg(child.process.pid, signal.SIGKILL)
            child.process.wait()
            if child.process.stdout:
                child.process.stdout.close()

    def _stop(self, number: int, frame: FrameType | None) -> None:
        for other in self._handlers:  # before anything is raised: a second signal must not cut the tidying short
            signal.signal(other, self._hurry)
        self._signal = number
        raise Stopped(number)

    def _hurry(self, number: int, frame: FrameType | None) -> None:
        self._signal = self._signal or number
        self._hurries = True


def _failed(child: Child) -> ChildFailed:
    code = child.process.returncode
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return ChildFailed(f"{child.name} {how}", child.log, code)
