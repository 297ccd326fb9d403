"""Runs client code against the Hub of the tests, with the real huggingface_hub.

huggingface_hub reads its environment (`HF_ENDPOINT`, `HF_HOME`, ...) when it is imported, so the code runs in another
process. Importing takes seconds, so that process imports once, and each call gets a fork of it, in which
nothing has been loaded yet.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO


CALL_SECONDS = 120


class ClientError(Exception):
    """An error of the called function: the names of its class and of the base classes, and its message."""

    def __init__(self, classes: list[str], message: str) -> None:
        super().__init__(f"{classes[0]}: {message}")
        self.classes, self.message = classes, message


class HubClient:
    """Calls functions of `tests.support.hub_tasks`, each in a process of its own, with the cache in `home`."""

    def __init__(self, endpoint: str, home: Path, **environment: str) -> None:
        self.home = home
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.hub_client"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
            env=kept
            | {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"}
            | {"HF_HUB_DOWNLOAD_TIMEOUT": "2", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1,localhost"}
            | environment,
        )
        self.read_answer()  # it has imported what it needs

    def __call__(self, task: str, **kwargs: Any) -> Any:
        """Returns `tests.support.hub_tasks.<task>(**kwargs)`; `ClientError` if it raises."""
        assert self.process.stdin is not None
        print(json.dumps([task, kwargs]), file=self.process.stdin, flush=True)
        result, error = self.read_answer()
        if error is not None:
            raise ClientError(*error)
        return result

    def read_answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the client died, with status {self.process.wait()}: see its traceback on stderr")
        return json.loads(line)

    def wipe_cache(self) -> None:
        shutil.rmtree(self.home, ignore_errors=True)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=CALL_SECONDS)


def main() -> None:
    """Forks for each line of the input; the fork writes its answer as one line."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # the called code's prints are no answer
    tasks = importlib.import_module("tests.support.hub_tasks")
    wait = time.sleep
    time.sleep = lambda seconds: wait(float(seconds) / 50)  # the client waits up to 8 s before it tries again
    print(json.dumps([None, None]), file=answers, flush=True)
    for line in sys.stdin:
        name, kwargs = json.loads(line)
        child = os.fork()
        if child == 0:
            answer_and_exit(getattr(tasks, name), kwargs, answers)
        _, status = os.waitpid(child, 0)
        if status != 0:
            message = f"{name} ended with status {os.waitstatus_to_exitcode(status)}"
            print(json.dumps([None, [["Crash"], message]]), file=answers, flush=True)
    os._exit(0)  # skips torch's cleanup, which takes seconds


def answer_and_exit(task: Callable[..., Any], kwargs: dict[str, Any], answers: TextIO) -> None:
    faulthandler.dump_traceback_later(CALL_SECONDS, exit=True)  # ends a client that hangs, with a traceback
    try:
        answer = [task(**kwargs), None]
    except Exception as exc:
        answer = [None, [[each.__name__ for each in type(exc).__mro__], str(exc)]]
    print(json.dumps(answer), file=answers, flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
