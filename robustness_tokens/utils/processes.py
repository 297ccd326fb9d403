"""Processes of a distributed run: their state, and results that the main one shares."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from accelerate import Accelerator, PartialState
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list
from accelerate.utils.environment import parse_flag_from_env


PROCESS_GROUP = InitProcessGroupKwargs(timeout=timedelta(hours=3))
"""Timeout of collectives. It is long: a process that gets no last shard of adversarial pairs waits for the others."""


def process_state() -> PartialState:
    """Returns the distributed state where there is no Accelerator.

    `PartialState` keeps what its first call is given, so timeout and CPU flag are passed here.
    """
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), **PROCESS_GROUP.to_kwargs())


def share_from_main(function: Callable[[], Any], accelerator: Accelerator | PartialState) -> Any:
    """Calls a function on the main process alone and returns its result on all of them.

    Its error is raised on every process, so that none waits forever; as a `RuntimeError` if it can't be pickled.
    """
    if accelerator.num_processes == 1:
        return function()
    found: list[Any] = [None]
    error: Exception | None = None
    if accelerator.is_main_process:
        try:
            found = [function()]
        except Exception as exc:
            error, found = exc, [_sendable(exc)]
    broadcast_object_list(found)
    if isinstance(found[0], Exception):
        raise error or found[0]
    return found[0]


def _sendable(exc: Exception) -> Exception:
    try:
        pickle.loads(pickle.dumps(exc))  # fails for an error with a lock, or with arguments other than its text
    except Exception:
        return RuntimeError(f"the main process failed: {type(exc).__name__}: {exc}")
    return exc
