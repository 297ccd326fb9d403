"""The training loop: attack the images, compare features, update the tokens; everything else stays frozen.

Shapes: B images of a batch, N sequence, D width.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, get_scheduler
from transformers.trainer_utils import TrainOutput

from ..data import AdversarialPairs, Normalizer
from ..hub import holds_adapter, push_adapter
from ..models import ProbeHead, RobustnessTokenPreTrainedModel, check_patches, packed_once
from ..utils import in_use, local_path, share_from_main
from .accelerator import abandon_trackers, build_accelerator, finish_trackers, start_trackers
from .arguments import RobustnessTokenTrainingArguments
from .callbacks import (
    SIGTERM_EXIT_CODE,
    Termination,
    agree,
    build_handler,
    build_state,
    catch_sigterm,
    export_callbacks,
    restore_callbacks,
)
from .checkpoints import save_checkpoint
from .dataset import (
    Batch,
    Position,
    build_train_loader,
    classes_of,
    iterate_steps,
    prepare_train_dataset,
    take_pairs,
    trained_on,
)
from .held_out import measure_held_out, prepare_eval_dataset
from .run_folder import (
    EVAL_LOG_FILE,
    LOG_FILE,
    append_to_log,
    check_output_dir,
    open_run,
    read_run,
    resume_settings,
    rounding_settings,
)
from .step import LastGoodTokens, TrainingStep, check_trainable


logger = logging.getLogger(__name__)


class _Outputs(nn.Module):
    """Wraps the outputs in a forward pass, so that DistributedDataParallel sums the gradients."""

    def __init__(self, training_step: TrainingStep) -> None:
        super().__init__()
        self.training_step, self.model = training_step, training_step.model

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.training_step.outputs(pixel_values)


def _in_words(metrics: Mapping[str, float]) -> str:
    clean, attacked, baseline = (metrics[f"{name}_cosine"] for name in ("invariance", "adversarial", "baseline"))
    without = "" if math.isnan(baseline) else f" (without tokens {baseline:.3f})"
    return f"loss {metrics['loss']:.3f}, cosine clean {clean:.3f}, attacked {attacked:.3f}{without}"


class RobustnessTokenTrainer:
    """Trains the tokens of a model.

    `args.output_dir` holds the adapter that [`save_model`] writes, and folders that are never pushed:
    `checkpoint-<step>/`, `logs/training_log.csv` with the rows of `log_history`, and `logs/eval_log.csv` with those of
    `eval_history`.

    Args:
        model: From `RobustnessTokenModel.from_base` (new tokens) or `from_pretrained` (trained further).
        args: Hyper-parameters.
        train_dataset: A `datasets` dataset with an image column, or a torch dataset of
            `{"images": (3, H, W) float in [0, 1]}`, or adversarial pairs: `AdversarialPairs`, their folder, or their
            name on the Hub; then nothing is attacked, and `args` may leave the attack out.
        eval_dataset: Held-out images to measure the tokens on every `args.eval_steps`: as `train_dataset`, but no
            stream; or `AdversarialPairs`, made by the attack of the training.
        callbacks: `TrainerCallback`s of transformers, called on every process; a decision (`TrainerControl`) on
            one process holds on all.
        head: Head whose predictions the objectives `"distillation"` and `"cross_entropy"` compare: a probe head or a
            [`ZeroShotHead`]. A `RobustnessTokenForImageClassification` has its own. It is frozen.

    Raises:
        ValueError: If `args.output_dir` can't be written to, holds another model, or holds an adapter or checkpoints
            while the run neither resumes from one of them nor sets `args.overwrite_output_dir`; if the dataset has no
            image column; if the base can't divide its images into patches; if the objective needs a head or labels
            that are missing.
    """

    def __init__(
        self,
        model: RobustnessTokenPreTrainedModel,
        args: RobustnessTokenTrainingArguments,
        train_dataset: Any,
        eval_dataset: Any = None,
        callbacks: Sequence[TrainerCallback | type[TrainerCallback]] = (),
        *,
        head: ProbeHead | None = None,
    ) -> None:
        if not isinstance(model, RobustnessTokenPreTrainedModel):
            raise ValueError(
                f"model is a {type(model).__name__}, which has no tokens to train: give the trainer "
                "RobustnessTokenModel.from_base(model)"
            )
        train_dataset, args = take_pairs(train_dataset, args=args, config=model.config)
        self.model, self.args = model, args
        self.output_dir = Path(args.output_dir)
        if model.config.image_mean is None or model.config.image_std is None:
            raise ValueError("the model's config has no image_mean and image_std: give them to from_base")
        if args.eval_steps is not None and eval_dataset is None:
            raise ValueError(f"eval_steps={args.eval_steps} needs an eval_dataset: give one, or leave eval_steps out")
        self.callback_handler = build_handler(model, callbacks)
        self.accelerator = build_accelerator(args)
        share_from_main(
            lambda: check_output_dir(
                self.output_dir, overwrite=args.overwrite_output_dir, resume_from=args.resume_from_checkpoint
            ),
            self.accelerator,
        )
        images = prepare_train_dataset(
            train_dataset,
            argument="train_dataset",
            args=args,
            image_processor=model.image_processor,
            **classes_of(model, head, args),
            process_index=self.accelerator.process_index,
            num_processes=self.accelerator.num_processes,
        )
        self.train_dataset, self._images = images.dataset, images
        if images.shape is not None:
            check_patches(model.get_base_model(), images.shape)
        self._eval_images = (
            None
            if eval_dataset is None
            else prepare_eval_dataset(eval_dataset, args=args, model=model, head=head, train_image_shape=images.shape)
        )
        self.eval_dataset = None if self._eval_images is None else self._eval_images.dataset
        self._previous_recipe: dict[str, Any] = {}  # of tokens that are trained further
        self.normalizer = Normalizer(model.config.image_mean, model.config.image_std).to(self.accelerator.device)
        if head is not None:
            head = head.to(self.accelerator.device).eval().requires_grad_(False)
        self.training_step = TrainingStep(model, args, self.normalizer, head)
        made_with = train_dataset.info.head if isinstance(train_dataset, AdversarialPairs) else None
        if made_with is not None and made_with != self.training_step.head_settings.get("head"):
            raise ValueError(
                "train_dataset holds pairs that were made through another head than the one to train with: make them "
                "again, or load the base with the head of the pairs"
            )
        self.log_history: list[dict[str, float]] = []
        self.eval_history: list[dict[str, float]] = []
        self.state, self.control = TrainerState(), TrainerControl()
        self._good_tokens = LastGoodTokens(self.training_step)
        self._saved_step = -1  # of the last checkpoint in output_dir
        self._checked_step = -1  # after which the features were last found finite

    def train(self) -> TrainOutput:
        """Runs the training, from the beginning or from `args.resume_from_checkpoint`.

        On SIGTERM, it finishes the step, saves a checkpoint and exits with code 143, the code that a shell reports for
        a process ended by SIGTERM. This also holds after the last step, until the method returns.

        Returns:
            transformers' `TrainOutput`: steps done, mean loss of the steps done now, and the last logged metrics.

        Raises:
            ValueError: If the checkpoint does not fit; if `args.output_dir` holds checkpoints of an earlier run and
                neither `args.resume_from_checkpoint` nor `args.overwrite_output_dir` is set; if too many images are
                unreadable; if the tokens are disabled or not float32, or anything else is trainable.
            FloatingPointError: If the loss is not finite, or the features with tokens are not, when the tokens are
                saved or the run ends. The last good tokens stay in the model and in `args.output_dir`.
            OSError: If a checkpoint or the log can't be written; earlier checkpoints stay unchanged.
            SystemExit: After SIGTERM.
        """
        args, accelerator = self.args, self.accelerator
        check_trainable(self.model)
        self._previous_recipe = self.model.config.training or {}
        optimizer = torch.optim.Adam(self.model.injector.parameters(), lr=args.learning_rate)
        scheduler = get_scheduler(args.lr_scheduler_type, optimizer, args.warmup_steps, args.max_steps)
        was_training = self.model.training
        self._good_tokens = LastGoodTokens(self.training_step)
        with ExitStack() as held, catch_sigterm() as termination, packed_once():
            share_from_main(lambda: held.enter_context(in_use(self.output_dir)), accelerator)
            try:
                features, optimizer = accelerator.prepare(_Outputs(self.training_step), optimizer)
                position = self._start(optimizer, scheduler)
                start_trackers(accelerator, output_dir=self.output_dir, recipe=self._recipe())
                self.model.train()
                mean_loss, position = self._run(position, features, optimizer, scheduler, termination)
                share_from_main(lambda: finish_trackers(accelerator), accelerator)
            finally:
                optimizer.zero_grad()
                self.model.train(was_training)
                if args.dataloader_num_workers > 0:
                    accelerator.free_memory()  # or the workers of the loader live on
                abandon_trackers(accelerator)  # some are left only while an exception propagates
            if agree(self.control, termination.requested, accelerator):  # SIGTERM may come while the trackers finish
                self._exit_by_sigterm(position, optimizer, scheduler, termination)
        self._note_recipe(self.state.global_step)
        accelerator.wait_for_everyone()
        return TrainOutput(self.state.global_step, mean_loss, self.log_history[-1] if self.log_history else {})

    def evaluate(self) -> dict[str, float]:
        """Measures the tokens on `eval_dataset`; see [`measure_held_out`].

        Raises:
            ValueError: If there is no `eval_dataset`, or its images are unreadable.
        """
        if self.eval_dataset is None:
            raise ValueError("evaluate() needs an eval_dataset: give one to RobustnessTokenTrainer")
        self.model.to(self.accelerator.device)  # otherwise only train() moves it
        return measure_held_out(self.training_step, self.eval_dataset, accelerator=self.accelerator)

    def save_model(self, output_dir: str | None = None) -> None:
        """Writes the adapter, and nothing but the adapter, from the main process.

        Args:
            output_dir: Folder to write to; `args.output_dir` if None.

        Raises:
            ValueError: If another folder holds an adapter and `args.overwrite_output_dir` is not set.
        """
        folder = self.output_dir if output_dir is None else Path(local_path(output_dir))

        def save() -> None:
            if folder != self.output_dir and holds_adapter(folder) and not self.args.overwrite_output_dir:
                raise ValueError(
                    f"{folder} holds an adapter already: choose another, or set overwrite_output_dir=True"
                )
            self.model.save_pretrained(folder)

        share_from_main(save, self.accelerator)  # every process waits for it

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:
        """Saves the adapter and uploads it from the main process; see [`push_adapter`]."""
        self.save_model()
        return push_adapter(self.output_dir, repo_id, **kwargs) if self.accelerator.is_main_process else None

    def _run(
        self, position: Position, features: Any, optimizer: Any, scheduler: Any, termination: Termination
    ) -> tuple[float, Position]:
        """Runs the loop; returns the mean loss and the position after it."""
        args, accelerator, state, handler = self.args, self.accelerator, self.state, self.callback_handler
        loader = build_train_loader(self.train_dataset, args=args, accelerator=accelerator)
        steps = iterate_steps(loader, args=args, accelerator=accelerator, start=position)
        handler.optimizer, handler.lr_scheduler, handler.train_dataloader = optimizer, scheduler, loader
        num_batches = len(loader) if self._images.num_images is not None else None
        seconds_before = self.log_history[-1]["seconds"] if self.log_history else 0.0
        total_loss, first_step, start = 0.0, state.global_step, time.perf_counter()
        self._checked_step = first_step
        with tqdm(
            total=args.max_steps,
            initial=state.global_step,
            desc="Training tokens",
            disable=args.disable_tqdm or not accelerator.is_local_main_process,
        ) as progress_bar:
            self._notify("on_train_begin")
            terminated = agree(self.control, termination.requested, accelerator)
            while state.global_step < args.max_steps and not (self.control.should_training_stop or terminated):
                batches, position = next(steps)
                self._notify("on_step_begin")
                learning_rate = scheduler.get_last_lr()[0]
                try:
                    metrics = self._step(batches, features, optimizer)
                except FloatingPointError as exc:
                    raise self._stop(batches, exc, step=state.global_step + 1) from exc
                scheduler.step()
                state.global_step += 1
                state.epoch = position[0] + (position[1] / num_batches if num_batches else 0)
                total_loss += metrics["loss"]
                progress_bar.set_postfix_str(_in_words(metrics), refresh=False)
                progress_bar.update()
                self._notify("on_step_end")
                terminated = agree(self.control, termination.requested, accelerator)
                if terminated or self.control.should_training_stop or state.global_step == args.max_steps:
                    self._check_tokens(batches)
                if self.control.should_log:
                    seconds = seconds_before + time.perf_counter() - start
                    row = {"step": state.global_step, **metrics, "learning_rate": learning_rate, "seconds": seconds}
                    self._log(row, self.log_history, LOG_FILE)
                    terminated = agree(self.control, termination.requested, accelerator)
                if self.control.should_evaluate:
                    self._evaluate()
                    terminated = agree(self.control, termination.requested, accelerator)
                if self.control.should_save:
                    self._check_tokens(batches)
                    self._save_checkpoint(position, optimizer, scheduler)
                    terminated = agree(self.control, termination.requested, accelerator)
            if state.global_step > first_step:  # the run may have been ended after the last check
                self._check_tokens(batches)
            elif state.global_step == args.max_steps and not (
                args.eval_steps is None or self.eval_history or terminated
            ):
                self._evaluate()  # all steps were done by a run that left no measurement
            if terminated:
                self._exit_by_sigterm(position, optimizer, scheduler, termination)
            self._notify("on_train_end")
        return total_loss / max(1, state.global_step - first_step), position

    def _evaluate(self) -> None:
        row = {"step": self.state.global_step, **self.evaluate()}
        self._log(row, self.eval_history, EVAL_LOG_FILE)
        self._notify("on_evaluate", metrics=dict(row))

    def _exit_by_sigterm(
        self, position: Position, optimizer: Any, scheduler: Any, termination: Termination
    ) -> NoReturn:
        """Saves a checkpoint unless this step has one, and exits with code 143, on every process."""
        if self._saved_step != self.state.global_step:
            self._save_checkpoint(position, optimizer, scheduler)
        termination.answered = True
        if self.accelerator.is_main_process:
            logger.warning(
                "SIGTERM: saved checkpoint-%d in %s: resume with resume_from_checkpoint=True",
                self.state.global_step,
                self.output_dir,
            )
        raise SystemExit(SIGTERM_EXIT_CODE)

    def _step(self, batches: Sequence[Batch], features: Any, optimizer: Any) -> dict[str, float]:
        args, injector, step = self.args, self.model.injector, self.state.global_step
        metrics = self.training_step.accumulate_gradient(features, batches, accelerator=self.accelerator, step=step)
        self._good_tokens.keep(step)
        if args.max_grad_norm is not None:
            self.accelerator.clip_grad_norm_(injector.parameters(), args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        if not all(tensor.isfinite().all() for tensor in injector.parameters()):
            raise FloatingPointError("the tokens are not finite")
        return metrics

    def _check_tokens(self, batches: Sequence[Batch]) -> None:
        """Raises if the updated tokens give non-finite features; the step's loss was computed with the old ones."""
        if self._checked_step == self.state.global_step:
            return
        with self.training_step.computing_faster():
            are_broken = self._good_tokens.are_broken(self._clean_images(batches), self.accelerator)
        if are_broken:
            reason = FloatingPointError("the features with the updated tokens are not finite")
            raise self._stop(batches, reason, step=self.state.global_step)
        self._checked_step = self.state.global_step

    def _clean_images(self, batches: Sequence[Batch]) -> Tensor:
        """Returns the last batch, (B, 3, H, W) normalised."""
        images: Tensor = self.normalizer(batches[-1]["images"].to(self.accelerator.device))
        return images

    def _stop(self, batches: Sequence[Batch], reason: FloatingPointError, *, step: int) -> FloatingPointError:
        """Restores and saves the last good tokens of a run that diverged; returns the error to raise."""
        with self.training_step.computing_faster():
            step_of_good = self._good_tokens.go_back(
                self._clean_images(batches), self.accelerator, step=self.state.global_step
            )
        kept = "the tokens are as they were before training"
        if step_of_good is None:
            kept = "no tokens are saved, since the initial ones are broken too: resume from an earlier checkpoint"
        elif step_of_good > 0:
            self._note_recipe(step_of_good)
            self.save_model()
            kept = f"the tokens after step {step_of_good} are in the model and saved in {self.output_dir}"
        return FloatingPointError(
            f"training stopped at step {step}, because {reason}: {kept}. "
            "Try a smaller learning_rate, mixed_precision='no', or other images"
        )

    def _notify(self, event: str, **kwargs: Any) -> None:
        """Calls the callbacks."""
        self.control = getattr(self.callback_handler, event)(self.args, self.state, self.control, **kwargs)

    def _recipe(self) -> dict[str, Any]:
        """Returns the recipe of the arguments, with the number of processes, and which base and images it had."""
        recipe = {**self.args.recipe(), "num_processes": self.accelerator.num_processes}
        recipe |= {**self.training_step.head_settings, **self._digests}
        if self._images.image_size is not None:
            recipe["image_size"] = self._images.image_size
        return recipe

    @cached_property
    def _digests(self) -> dict[str, str]:
        return trained_on(self.model, self._images, self.accelerator)

    def _note_recipe(self, num_steps_done: int) -> None:
        known = {"dataset": self._images.description, "previous": self._previous_recipe}
        recipe = {**self._recipe(), "num_steps_done": num_steps_done}
        self.model.config.training = recipe | {name: value for name, value in known.items() if value}

    def _log(self, row: dict[str, float], history: list[dict[str, float]], file: str) -> None:
        history.append(row)
        self.state.log_history.append(dict(row))

        def write() -> None:
            append_to_log(self.output_dir / file, row)
            values = {name: value for name, value in row.items() if name != "step"}
            self.accelerator.log(values, step=self.state.global_step)

        share_from_main(write, self.accelerator)
        self._notify("on_log", logs=dict(row))

    def _settings(self) -> dict[str, Any]:
        return resume_settings(
            self.model.config,
            self.args,
            recipe=self._recipe(),
            num_images=self._images.num_images,
            eval_images_digest=self._eval_images_digest,
        )

    @cached_property
    def _eval_images_digest(self) -> str | None:
        images = self._eval_images
        return None if images is None else share_from_main(lambda: images.identity, self.accelerator)

    def _rounding(self) -> dict[str, Any]:
        return rounding_settings(self.model, self.args, device=self.accelerator.device)

    def _save_checkpoint(self, position: Position, optimizer: Any, scheduler: Any) -> None:
        share_from_main(
            lambda: save_checkpoint(
                self.output_dir,
                step=self.state.global_step,
                tokens=self.model.injector.state,
                optimizer=optimizer,
                settings=self._settings(),
                state={
                    "rounding": self._rounding(),
                    "position": list(position),
                    "previous_recipe": self._previous_recipe,
                    "scheduler": {k: v for k, v in scheduler.state_dict().items() if k != "lr_lambdas"},
                    "callbacks": export_callbacks(self.callback_handler),
                },
                save_total_limit=self.args.save_total_limit,
            ),
            self.accelerator,
        )
        self._saved_step = self.state.global_step
        self._notify("on_save")

    def _start(self, optimizer: Any, scheduler: Any) -> Position:
        """Prepares the output folder and restores the checkpoint, if any; returns the position to start from."""
        args, accelerator, tokens = self.args, self.accelerator, self.model.injector.state
        settings = self._settings()
        if args.ignore_images_mismatch:
            settings |= dict.fromkeys(("images_digest", "eval_images_digest"), ...)
        rounding = self._rounding()
        shapes = {name: tuple(tensor.shape) for name, tensor in tokens.items()}
        run = share_from_main(lambda: read_run(args, settings=settings, rounding=rounding, shapes=shapes), accelerator)
        step, position = 0, (0, 0)
        self._saved_step = -1
        if run.checkpoint is not None:
            if run.checkpoint.folder.parent == self.output_dir:
                self._saved_step = run.checkpoint.step
            step, state = run.checkpoint.step, run.checkpoint.state
            run.checkpoint.restore(tokens, optimizer)
            scheduler.load_state_dict({**state["scheduler"], "lr_lambdas": [None] * len(scheduler.base_lrs)})
            for group, learning_rate in zip(optimizer.param_groups, scheduler.get_last_lr(), strict=True):
                group["lr"] = learning_rate  # a scheduler sets it only when it steps
            self._previous_recipe = state["previous_recipe"]
            position = (state["position"][0], state["position"][1])
            restore_callbacks(self.callback_handler, state["callbacks"])
        share_from_main(lambda: open_run(args, run), accelerator)
        self.log_history, self.eval_history = run.log_history, run.eval_history
        self.state, self.control = build_state(
            args, accelerator, step=step, rows=[*run.log_history, *run.eval_history]
        )
        return position
