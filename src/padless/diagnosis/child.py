"""Questions answered in a process of their own, which may die of them or never end."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from typing import IO, Any

# The path of this process and no other: by itself Python would put the working folder in front.
_START = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from padless.diagnosis.questions import answer
answer(sys.argv[2], json.loads(sys.argv[3]))
"""
_END = "end"
_running: set[subprocess.Popen[str]] = set()


class NoAnswerError(Exception):
    """The process ended, or was ended, before its last answer; the text says how, in one line."""


def ask(question: str, argument: Any = None, *, limit_s: float) -> Iterator[Any]:
    """Asks a question of `padless.diagnosis.questions` in a fresh process.

    Args:
        question: its name.
        argument: a JSON value.
        limit_s: longest time between two answers, in seconds.

    Yields:
        JSON values, each as soon as it is there.

    Raises:
        NoAnswerError: the process raised, died, or took too long.
    """
    command = [sys.executable, "-c", _START, json.dumps(sys.path), question, json.dumps(argument)]
    with tempfile.TemporaryFile() as said:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
            encoding="utf-8",
            # Of its own, so that what it started can be ended with it.
            start_new_session=True,
        )
        _running.add(child)
        try:
            yield from _answers(child, limit_s)
        except queue.Empty:
            _end(child)
            # What ending it leaves: SIGKILL, or 1 on Windows.
            if child.returncode in (-9, 1):
                raise NoAnswerError(f"no answer within {limit_s:g} s") from None
            # It had died before, and something that it had started kept the pipe.
            raise NoAnswerError(_cause_of_death(child, said)) from None
        except EOFError:
            raise NoAnswerError(_cause_of_death(child, said)) from None
        finally:
            _end(child)
            _running.discard(child)


def end_all() -> None:
    """Ends the processes that are being asked in other threads, which are told so."""
    for child in tuple(_running):
        _end(child)


def write_answers(answers: IO[str], values: Iterator[Any]) -> None:
    """Writes the answers to a question, as `ask` reads them; for the child.

    Args:
        answers: the pipe to the parent.
        values: JSON values. What their making raises is the last answer.
    """
    try:
        for value in values:
            print(json.dumps({"answer": value}), file=answers, flush=True)
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        raised = f"{type(error).__name__}: {lines[0]}"
        print(json.dumps({"raised": raised}), file=answers, flush=True)
    print(json.dumps(_END), file=answers, flush=True)


def _answers(child: subprocess.Popen[str], limit_s: float) -> Iterator[Any]:
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        assert child.stdout is not None
        with child.stdout as stdout:
            for line in stdout:
                lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    while True:
        line = lines.get(timeout=limit_s)
        if line is None:
            raise EOFError
        message = json.loads(line)
        if message == _END:
            return
        if "raised" in message:
            raise NoAnswerError(message["raised"])
        yield message["answer"]


def _cause_of_death(child: subprocess.Popen[str], said: IO[bytes]) -> str:
    try:
        code = child.wait(timeout=10)
    except subprocess.TimeoutExpired:
        return "the process closed its output"
    said.seek(0)
    lines = said.read().decode("utf-8", "replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    how = f"exited with code {code}" if code >= 0 else f"died of {_signal_name(-code)}"
    return f"the process {how}" + (f": {last[:300]}" if last else "")


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _end(child: subprocess.Popen[str]) -> None:
    try:
        # Before it is waited for, while its number cannot be another's.
        if hasattr(os, "killpg"):
            if child.returncode is None:
                os.killpg(child.pid, signal.SIGKILL)
        else:
            child.kill()
    except OSError:
        pass
    child.wait()
