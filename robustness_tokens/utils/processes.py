"""The processes of a distributed run: who they are, and what the main one shares with the others."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from accelerate import Accelerator, PartialState
from accelerate.utils import (
    InitProcessGroupKwargs,
    broadcast_object_list,
)
from accelerate.utils.environment import parse_flag_from_env


PROCESS_GROUP = InitProcessGroupKwargs(timeout=timedelta(hours=3))
"""How long processes wait for each other: one without a last shard of adversarial pairs, for those that attack one."""


def process_state() -> PartialState:
    """What the process is among those that were launched together, where there is no Accelerator to ask.

    Accelerate alone reads how long they wait for each other, and whether they shall leave GPUs be, only for an
    Accelerator; and what it finds first it keeps.
    """
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), **PROCESS_GROUP.to_kwargs())


def share_from_main(function: Callable[[], Any], accelerator: Accelerator | PartialState) -> Any:
    """What a function returns on the main process, on every process: the others may have no access to its disk.

    Args:
        function: Called on the main process alone.
        accelerator: From [`build_accelerator`], or [`process_state`].

    Raises:
        Exception: On every process, what the function raised, so that none waits for another in vain; on the others
            a `RuntimeError` that tells of it, where it can't be sent to them.
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
    if error is not None:
        raise error
    if isinstance(found[0], Exception):
        raise found[0]
    return found[0]


def _sendable(exc: Exception) -> Exception:
    try:
        pickle.loads(pickle.dumps(exc))  # which an error with a lock, or with other arguments than its text, fails
    except Exception:
        return RuntimeError(f"the main process failed: {type(exc).__name__}: {exc}")
    return exc
