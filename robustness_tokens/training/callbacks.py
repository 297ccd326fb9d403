"""Callbacks (transformers' `TrainerCallback`) and SIGTERM: what one process decides holds on every process."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from transformers.trainer_callback import (
    CallbackHandler,
    DefaultFlowCallback,
    ExportableState,
    TrainerCallback,
    TrainerControl,
    TrainerState,
)

from ..models import RobustnessTokenPreTrainedModel
from .arguments import RobustnessTokenTrainingArguments


logger = logging.getLogger(__name__)

SIGTERM_EXIT_CODE = 128 + signal.SIGTERM
"""Exit code that a shell reports for a process ended by SIGTERM."""

_DECISIONS = ("should_log", "should_evaluate", "should_save", "should_training_stop")


class FlowCallback(DefaultFlowCallback):
    """Logs, evaluates, saves and stops at the steps that `RobustnessTokenTrainingArguments` set."""

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> TrainerControl:
        """Adds to the decisions of other callbacks without revoking any."""
        step, is_last = state.global_step, state.global_step >= state.max_steps
        control.should_log |= is_last or step % args.logging_steps == 0
        control.should_evaluate |= args.eval_steps is not None and (is_last or step % args.eval_steps == 0)
        control.should_save |= args.save_steps is not None and step % args.save_steps == 0
        control.should_training_stop |= is_last
        return control


def build_handler(
    model: RobustnessTokenPreTrainedModel, callbacks: Sequence[TrainerCallback | type[TrainerCallback]]
) -> CallbackHandler:
    """Builds the callback handler, with `FlowCallback` first; `ValueError` if a callback is no `TrainerCallback`."""
    for callback in callbacks:
        kind = callback if isinstance(callback, type) else type(callback)
        if not issubclass(kind, TrainerCallback):
            raise ValueError(f"callbacks has a {kind.__name__}, expected a transformers.TrainerCallback: subclass it")
    return CallbackHandler([FlowCallback(), *callbacks], model, getattr(model, "image_processor", None), None, None)


def build_state(
    args: RobustnessTokenTrainingArguments, accelerator: Accelerator, *, step: int, rows: Sequence[dict[str, float]]
) -> tuple[TrainerState, TrainerControl]:
    """Builds the state that callbacks read and the control that they answer with; `rows` are the logged ones."""
    state = TrainerState(
        global_step=step,
        max_steps=args.max_steps,
        logging_steps=args.logging_steps,
        eval_steps=args.eval_steps or 0,
        save_steps=args.save_steps or 0,
        train_batch_size=args.per_device_train_batch_size,
        log_history=sorted((dict(row) for row in rows), key=lambda row: row["step"]),
        is_local_process_zero=accelerator.is_local_main_process,
        is_world_process_zero=accelerator.is_main_process,
    )
    return state, TrainerControl()


def agree(control: TrainerControl, terminated: bool, accelerator: Accelerator) -> bool:
    """Makes the decisions of each process hold on all; returns whether any process received SIGTERM."""
    if accelerator.num_processes == 1:
        return terminated
    decided = [*(getattr(control, name) for name in _DECISIONS), terminated]
    flags = torch.tensor(decided, dtype=torch.float32, device=accelerator.device)
    agreed = (accelerator.reduce(flags, reduction="sum") > 0).tolist()
    for name, value in zip(_DECISIONS, agreed, strict=False):
        setattr(control, name, value)
    return bool(agreed[-1])


def export_callbacks(handler: CallbackHandler) -> list[list[Any]]:
    """Returns the state of the callbacks that have one (transformers' `ExportableState`), for a checkpoint."""
    return [[type(callback).__name__, callback.state()["attributes"]] for callback in _stateful(handler)]


def restore_callbacks(handler: CallbackHandler, stored: Sequence[Sequence[Any]]) -> None:
    """Restores what [`export_callbacks`] returned; warns where the callbacks differ."""
    remaining = [(name, attributes) for name, attributes in stored]
    for callback in _stateful(handler):
        name = type(callback).__name__
        entry = next((entry for entry in remaining if entry[0] == name), None)
        if entry is None:
            logger.warning("The checkpoint holds no state of %s, which starts from the beginning", name)
            continue
        remaining.remove(entry)
        for key, value in entry[1].items():
            setattr(callback, key, value)
    for name, _ in remaining:
        logger.warning("The checkpoint holds the state of a %s, which is not among the callbacks", name)


@dataclass
class Termination:
    """Records whether SIGTERM has come, and whether it has been answered."""

    requested: bool = False
    answered: bool = False


@contextmanager
def catch_sigterm() -> Iterator[Termination]:
    """Records SIGTERM within the block instead of ending the process; only in the main thread, a limit of Python.

    A signal that was not answered is raised again after the block, for the previous handler.
    """
    termination = Termination()
    if threading.current_thread() is not threading.main_thread():
        yield termination
        return

    def note(signum: int, frame: Any) -> None:
        termination.requested = True

    previous = signal.signal(signal.SIGTERM, note)
    try:
        yield termination
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if previous is None else previous)
    if termination.requested and not termination.answered:
        signal.raise_signal(signal.SIGTERM)


def _stateful(handler: CallbackHandler) -> list[Any]:
    return [callback for callback in handler.callbacks if isinstance(callback, ExportableState)]
