"""The training loop: attack the images, compare features, step the tokens. Everything else stays frozen.

Shapes: B images of a batch, N sequence, D width.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import get_scheduler
from transformers.trainer_utils import TrainOutput

from .checkpoints import (
    check_output_dir,
    find_checkpoint,
    is_own_checkpoint,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
)
from .hub import EVALUATION_FILE, holds_adapter
from .modeling import RobustnessTokenPreTrainedModel
from .preprocessing import Normalizer
from .training_args import MixedPrecision, RobustnessTokenTrainingArguments
from .training_data import (
    Batch,
    Position,
    build_train_loader,
    check_patches,
    describe_dataset,
    find_image_shape,
    iterate_steps,
    prepare_train_dataset,
)
from .training_log import LOG_FILE, append_to_log, read_log, start_log
from .training_step import accumulate_gradient, base_features, check_trainable, compute_features


class _Features(nn.Module):
    """The model's features as a forward pass, so that DistributedDataParallel sees it and sums the gradients."""

    def __init__(self, model: RobustnessTokenPreTrainedModel, mixed_precision: MixedPrecision) -> None:
        super().__init__()
        self.model, self.mixed_precision = model, mixed_precision

    def forward(self, pixel_values: Tensor) -> Tensor:
        return compute_features(self.model, pixel_values, mixed_precision=self.mixed_precision)


class RobustnessTokenTrainer:
    """Trains the tokens of a model.

    `args.output_dir` holds the adapter that [`save_model`] writes, and in folders of their own what belongs to the
    run alone and is never pushed: `checkpoint-<step>/`, and `logs/training_log.csv` with the rows of `log_history`.

    Args:
        model: From `RobustnessTokenModel.from_base` (new tokens) or `from_pretrained` (trained further).
        args: Hyper-parameters.
        train_dataset: A `datasets` dataset with an image column, or a torch dataset of
            `{"images": (3, H, W) float in [0, 1]}`.

    Raises:
        ValueError: If `args.output_dir` holds another model, or an adapter or checkpoints already and the run neither
            resumes from one of these nor sets `overwrite_output_dir`, or can't be written to; if the dataset has no
            image column; if the base can't cut its images into patches.
    """

    def __init__(
        self,
        model: RobustnessTokenPreTrainedModel,
        args: RobustnessTokenTrainingArguments,
        train_dataset: Any,
    ) -> None:
        if not isinstance(model, RobustnessTokenPreTrainedModel):
            raise ValueError(
                f"model is a {type(model).__name__}, which has no tokens to train: give the trainer "
                "RobustnessTokenModel.from_base(model)"
            )
        self.model, self.args = model, args
        self.output_dir = Path(args.output_dir)
        check_output_dir(
            self.output_dir, overwrite=args.overwrite_output_dir, resume_from_checkpoint=args.resume_from_checkpoint
        )
        if model.config.image_mean is None or model.config.image_std is None:
            raise ValueError("the model's config has no image_mean and image_std: give them to from_base")
        self.accelerator = Accelerator(
            dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=args.seed),
            step_scheduler_with_optimizer=False,
        )
        if self.accelerator.mixed_precision not in ("no", args.mixed_precision):
            raise ValueError(
                f"accelerate was set up with mixed_precision={self.accelerator.mixed_precision!r}, the arguments say "
                f"{args.mixed_precision!r}: set mixed_precision in the arguments"
            )
        self.train_dataset = prepare_train_dataset(
            train_dataset,
            args=args,
            image_processor=model.image_processor,
            process_index=self.accelerator.process_index,
            num_processes=self.accelerator.num_processes,
        )
        self._dataset_entry, self._image_shape = describe_dataset(train_dataset), find_image_shape(self.train_dataset)
        if self._image_shape is not None:
            check_patches(model.get_base_model(), self._image_shape)
        self._previous_recipe: dict[str, Any] = {}  # of tokens that are trained further
        self.normalizer = Normalizer(model.config.image_mean, model.config.image_std).to(self.accelerator.device)
        self.log_history: list[dict[str, float]] = []
        self._good_tokens: tuple[Tensor, int] | None = None  # a finite loss was seen with them, and their step

    def train(self) -> TrainOutput:
        """Runs the training, from the beginning or from `args.resume_from_checkpoint`.

        Returns:
            transformers' `TrainOutput`: steps done, mean loss of the steps done now, and the last logged metrics.

        Raises:
            ValueError: If the checkpoint does not fit, or too many images are unreadable, or the tokens are off, not
                float32, or not what is trained.
            FloatingPointError: If the loss is not finite; the last good tokens stay in the model, and in output_dir.
        """
        args, accelerator = self.args, self.accelerator
        check_trainable(self.model)
        self._previous_recipe = self.model.config.training or {}
        optimizer = torch.optim.Adam([self.model.robustness_tokens], lr=args.learning_rate)
        scheduler = get_scheduler(args.lr_scheduler_type, optimizer, args.warmup_steps, args.max_steps)
        was_training = self.model.training
        self._good_tokens = None
        try:
            features, optimizer = accelerator.prepare(_Features(self.model, args.mixed_precision), optimizer)
            step, position = self._start(optimizer, scheduler)
            self.model.train()
            mean_loss = self._run(step, position, features, optimizer, scheduler)
        finally:
            optimizer.zero_grad()
            self.model.train(was_training)
            if args.dataloader_num_workers > 0:
                accelerator.free_memory()  # which holds the loader, whose workers would live on
        self._note_recipe(args.max_steps)
        accelerator.wait_for_everyone()
        return TrainOutput(args.max_steps, mean_loss, self.log_history[-1] if self.log_history else {})

    def save_model(self, output_dir: str | None = None) -> None:
        """Writes the adapter, and nothing but the adapter, from the main process.

        Args:
            output_dir: Where; by default `args.output_dir`.

        Raises:
            ValueError: If another folder is given and holds an adapter, without `args.overwrite_output_dir`.
        """
        folder = self.output_dir if output_dir is None else Path(output_dir)
        if folder != self.output_dir and holds_adapter(folder) and not self.args.overwrite_output_dir:
            raise ValueError(f"{folder} holds an adapter already: choose another, or set overwrite_output_dir=True")
        self.model.save_pretrained(folder, is_main_process=self.accelerator.is_main_process)
        self.accelerator.wait_for_everyone()

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:
        """Uploads the adapter from the main process; see `RobustnessTokenModel.push_to_hub`."""
        return self.model.push_to_hub(repo_id, **kwargs) if self.accelerator.is_main_process else None

    def _run(self, step: int, position: Position, features: Any, optimizer: Any, scheduler: Any) -> float:
        """The loop; returns the mean loss."""
        args, accelerator = self.args, self.accelerator
        loader = build_train_loader(self.train_dataset, args=args, accelerator=accelerator)
        steps = iterate_steps(loader, args=args, accelerator=accelerator, start=position)
        seconds_before = self.log_history[-1]["seconds"] if self.log_history else 0.0
        total_loss, first_step, start = 0.0, step, time.perf_counter()
        with tqdm(
            total=args.max_steps,
            initial=step,
            desc="Training tokens",
            disable=args.disable_tqdm or not accelerator.is_local_main_process,
        ) as progress_bar:
            while step < args.max_steps:
                batches, position = next(steps)
                learning_rate = scheduler.get_last_lr()[0]
                try:
                    metrics = self._step(step, batches, features, optimizer)
                except FloatingPointError as exc:
                    raise self._stop(step, batches, exc) from exc
                scheduler.step()
                step += 1
                total_loss += metrics["loss"]
                progress_bar.set_postfix_str(
                    f"cosine clean {metrics['invariance_cosine']:.3f}, attacked {metrics['adversarial_cosine']:.3f} "
                    f"(without tokens {metrics['baseline_cosine']:.3f})",
                    refresh=False,
                )
                progress_bar.update()
                if step % args.logging_steps == 0 or step == args.max_steps:
                    seconds = seconds_before + time.perf_counter() - start
                    self._log({"step": step, **metrics, "learning_rate": learning_rate, "seconds": seconds})
                if args.save_steps is not None and step % args.save_steps == 0:
                    self._save_checkpoint(step, position, optimizer, scheduler)
        return total_loss / max(1, step - first_step)

    def _step(self, step: int, batches: Sequence[Batch], features: Any, optimizer: Any) -> dict[str, float]:
        args, tokens = self.args, self.model.robustness_tokens
        metrics = accumulate_gradient(
            self.model,
            features,
            batches,
            args=args,
            accelerator=self.accelerator,
            normalizer=self.normalizer,
            step=step,
        )
        self._good_tokens = (tokens.detach().clone(), step)
        if args.max_grad_norm is not None:
            self.accelerator.clip_grad_norm_([tokens], args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        if not tokens.isfinite().all():
            raise FloatingPointError("the tokens are not finite")
        return metrics

    @torch.no_grad()
    def _stop(self, step: int, batches: Sequence[Batch], reason: FloatingPointError) -> FloatingPointError:
        """Ends a diverged run: puts the last good tokens back and saves them; returns the error to raise."""
        tokens = self.model.robustness_tokens
        pixel_values = self.normalizer(batches[-1]["images"].to(self.accelerator.device))
        precision = self.args.mixed_precision
        output = compute_features(self.model, pixel_values, mixed_precision=precision)
        target = base_features(self.model, pixel_values, mixed_precision=precision)
        # Where the base alone is at fault, the tokens are as good as they were.
        broken = target.isfinite().all() and not output.isfinite().all()
        broken_anywhere = self.accelerator.reduce(torch.tensor(float(broken), device=output.device))
        if self._good_tokens is not None and (broken_anywhere > 0 or not tokens.isfinite().all()):
            good, step_of_good = self._good_tokens
            tokens.copy_(good)
        else:
            step_of_good = step
        kept = "the tokens are as they were before training"
        if step_of_good > 0:
            self._note_recipe(step_of_good)
            self.save_model()
            kept = f"the tokens after step {step_of_good} are in the model and saved in {self.output_dir}"
        return FloatingPointError(
            f"training stopped at step {step + 1}, because {reason}: {kept}. "
            "Try a smaller learning_rate, mixed_precision='no', or other images"
        )

    def _recipe(self) -> dict[str, Any]:
        """The arguments' recipe with what the processes, the image processor and ready images add to it."""
        recipe = {**self.args.recipe(), "num_processes": self.accelerator.num_processes}
        if self._image_shape is not None:
            height, width = self._image_shape
            recipe["image_size"] = height if height == width else [height, width]
        return recipe

    def _note_recipe(self, num_steps_done: int) -> None:
        known = {"dataset": self._dataset_entry, "previous": self._previous_recipe}
        recipe = {**self._recipe(), "num_steps_done": num_steps_done}
        self.model.config.training = recipe | {name: value for name, value in known.items() if value}

    def _log(self, row: dict[str, float]) -> None:
        self.log_history.append(row)
        if self.accelerator.is_main_process:
            append_to_log(self.output_dir / LOG_FILE, row)

    def _settings(self) -> dict[str, Any]:
        """What a resumed run must have in common with the one it resumes."""
        config, args = self.model.config, self.args
        settings = {
            **self._recipe(),
            "base_model_fingerprint": config.base_model_fingerprint,
            "feature_view": config.feature_view,
            "similarity_axis": config.similarity_axis,
            "image_mean": list(config.image_mean or ()),
            "image_std": list(config.image_std or ()),
        }
        if hasattr(self.train_dataset, "__len__"):
            settings["num_images"] = len(self.train_dataset)
        if not args.schedule_depends_on_max_steps:
            del settings["max_steps"]
        return settings

    def _save_checkpoint(self, step: int, position: Position, optimizer: Any, scheduler: Any) -> None:
        if self.accelerator.is_main_process:
            save_checkpoint(
                self.output_dir,
                step=step,
                tokens=self.model.robustness_tokens,
                optimizer=optimizer,
                settings=self._settings(),
                state={
                    "position": list(position),
                    "previous_recipe": self._previous_recipe,
                    "scheduler": {k: v for k, v in scheduler.state_dict().items() if k != "lr_lambdas"},
                },
                save_total_limit=self.args.save_total_limit,
            )
        self.accelerator.wait_for_everyone()

    def _start(self, optimizer: Any, scheduler: Any) -> tuple[int, Position]:
        """Makes the output folder ready and puts a checkpoint's state back; returns its step and position."""
        step, position = 0, (0, 0)
        self.log_history = []
        if self.args.resume_from_checkpoint is not None:
            folder = find_checkpoint(self.output_dir, self.args.resume_from_checkpoint)
            step, state = load_checkpoint(
                folder, tokens=self.model.robustness_tokens, optimizer=optimizer, settings=self._settings()
            )
            if step > self.args.max_steps:
                raise ValueError(f"{folder} is beyond max_steps={self.args.max_steps}: raise it, or start anew")
            scheduler.load_state_dict({**state["scheduler"], "lr_lambdas": [None] * len(scheduler.base_lrs)})
            for group, learning_rate in zip(optimizer.param_groups, scheduler.get_last_lr(), strict=True):
                group["lr"] = learning_rate  # which a scheduler sets only when it steps
            self._previous_recipe = state["previous_recipe"]
            position = (state["position"][0], state["position"][1])
            self.log_history = read_log(folder.parent / LOG_FILE, last_step=step)
        self.accelerator.wait_for_everyone()  # all have read the log
        if self.accelerator.is_main_process:
            if not is_own_checkpoint(self.output_dir, self.args.resume_from_checkpoint):
                for _, checkpoint in list_checkpoints(self.output_dir):
                    shutil.rmtree(checkpoint)
            (self.output_dir / EVALUATION_FILE).unlink(missing_ok=True)  # it tells of the tokens to be replaced
            start_log(self.output_dir / LOG_FILE, self.log_history)
        return step, position
