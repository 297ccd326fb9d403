"""The training loop: attack the images, compare features, step the tokens. Everything else stays frozen.

Shapes: B images of a micro-batch, N sequence, D width.
"""

from __future__ import annotations

import csv
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from transformers import get_scheduler
from transformers.trainer_utils import TrainOutput

from .attacks import cosine_similarity, feature_cosine_objective, paper_attack, pgd_attack
from .checkpoints import find_checkpoint, list_checkpoints, load_checkpoint, save_checkpoint
from .data import BrokenImageLog, ImageDataset, IterableImageDataset, TensorImageDataset, build_dataloader
from .hub import holds_adapter
from .losses import example_generators, robustness_loss
from .modeling import RobustnessTokenPreTrainedModel
from .preprocessing import ImageTransform, Normalizer, processor_image_size
from .training_args import RobustnessTokenTrainingArguments


LOG_FILE = "training_log.csv"
LOG_COLUMNS = (
    "step",
    "loss",
    "invariance_cosine",
    "adversarial_cosine",
    "baseline_cosine",
    "learning_rate",
    "seconds",
)


class _Features(nn.Module):
    """The model's features as a forward pass, so that DistributedDataParallel sees it and sums the gradients."""

    def __init__(self, model: RobustnessTokenPreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.model.get_features(pixel_values).float()


class RobustnessTokenTrainer:
    """Trains the tokens of a model.

    Args:
        model: From `RobustnessTokenModel.from_base` (new tokens) or `from_pretrained` (trained further).
        args: Hyper-parameters.
        train_dataset: A `datasets` dataset with an image column, or a torch dataset of
            `{"images": (3, H, W) float in [0, 1], "index": int}`.

    Raises:
        ValueError: If `args.output_dir` holds an adapter or checkpoints already and neither `overwrite_output_dir`
            nor `resume_from_checkpoint` is set; if the dataset has no image column.
    """

    def __init__(
        self,
        model: RobustnessTokenPreTrainedModel,
        args: RobustnessTokenTrainingArguments,
        train_dataset: Any,
    ) -> None:
        self.model, self.args = model, args
        self.output_dir = Path(args.output_dir)
        used = holds_adapter(self.output_dir) or list_checkpoints(self.output_dir)
        if used and not args.overwrite_output_dir and args.resume_from_checkpoint is None:
            raise ValueError(
                f"{self.output_dir} holds an adapter or checkpoints already: choose another output_dir, or set "
                "overwrite_output_dir=True to replace them, or resume_from_checkpoint='last' to go on"
            )
        mean, std = model.config.image_mean, model.config.image_std
        if mean is None or std is None:
            raise ValueError("the model's config has no image_mean and image_std: give them to from_base")
        self.accelerator = Accelerator(
            mixed_precision=args.mixed_precision,
            dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=args.seed),
            step_scheduler_with_optimizer=False,
        )
        self.train_dataset = self._as_image_dataset(train_dataset)
        self.image_mean, self.image_std = mean, std
        self.normalizer = Normalizer(mean, std).to(self.accelerator.device)
        self.log_history: list[dict[str, float]] = []

    def train(self) -> TrainOutput:
        """Runs the training, from the beginning or from `args.resume_from_checkpoint`.

        Returns:
            transformers' `TrainOutput`: steps done, mean loss, and the last logged metrics.

        Raises:
            ValueError: If the checkpoint does not fit, or too many images are unreadable.
            FloatingPointError: If the loss is not finite; the last good tokens stay in the model, and in output_dir.
        """
        args, accelerator = self.args, self.accelerator
        optimizer = torch.optim.Adam([self.model.robustness_tokens], lr=args.learning_rate)
        scheduler = get_scheduler(args.lr_scheduler_type, optimizer, args.warmup_steps, args.max_steps)
        features, optimizer = accelerator.prepare(_Features(self.model), optimizer)
        loader = self._build_loader()
        step, position = 0, (0, 0)
        if args.resume_from_checkpoint is not None:
            step, position = self._resume(optimizer, scheduler)
        elif accelerator.is_main_process:
            self._clear_output_dir()
        self.model.train()
        total_loss, first_step, start = 0.0, step, time.perf_counter()
        batches = self._batches(loader, *position)
        with tqdm(
            total=args.max_steps,
            initial=step,
            desc="Training tokens",
            disable=args.disable_tqdm or not accelerator.is_local_main_process,
        ) as progress_bar:
            while step < args.max_steps:
                metrics, position = self._step(step, batches, features, optimizer)
                scheduler.step()
                step += 1
                total_loss += metrics["loss"]
                metrics |= {"learning_rate": scheduler.get_last_lr()[0], "seconds": time.perf_counter() - start}
                progress_bar.update()
                progress_bar.set_postfix_str(
                    f"cosine clean {metrics['invariance_cosine']:.3f}, attacked {metrics['adversarial_cosine']:.3f} "
                    f"(without tokens {metrics['baseline_cosine']:.3f})"
                )
                if step % args.logging_steps == 0 or step == args.max_steps:
                    self.log_history.append({"step": step, **metrics})
                if args.save_steps is not None and step % args.save_steps == 0:
                    self._save_checkpoint(step, position, optimizer, scheduler)
        self.model.eval()
        self.model.config.training = {**args.recipe(), "num_steps_done": step}
        self._write_log()
        accelerator.wait_for_everyone()
        metrics = self.log_history[-1] if self.log_history else {}
        return TrainOutput(step, total_loss / max(1, step - first_step), metrics)

    def save_model(self, output_dir: str | None = None) -> None:
        """Writes the adapter to `output_dir` (by default `args.output_dir`); only the main process writes."""
        self.model.save_pretrained(output_dir or self.output_dir, is_main_process=self.accelerator.is_main_process)
        self.accelerator.wait_for_everyone()

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:
        """Uploads the adapter from the main process; see `RobustnessTokenModel.push_to_hub`."""
        return self.model.push_to_hub(repo_id, **kwargs) if self.accelerator.is_main_process else None

    def attack(self, images: Tensor, index: Tensor, step: int, *, through_tokens: bool) -> Tensor:
        """Attacked versions of images, as the arguments say; the noise depends on (seed, step, index) alone.

        Args:
            images: (B, 3, H, W) float in [0, 1].
            index: (B,) int64 global example indices.
            step: Optimiser step.
            through_tokens: Whether the attacker's model has the tokens.

        Returns:
            (B, 3, H, W) normalised pixel values.
        """
        args, generators = self.args, example_generators(self.args.seed, step, index)
        pixel_values = self.normalizer(images)
        with nullcontext() if through_tokens else self.model.disable_adapter():
            if args.attack == "paper":
                assert args.step_size is not None, "the arguments set it for the paper's attack"
                return paper_attack(
                    self._features_without_gradient_to_tokens,
                    pixel_values,
                    image_mean=self.image_mean,
                    image_std=self.image_std,
                    step_size=args.step_size,
                    num_steps=args.num_attack_steps,
                    generator=generators,
                )
            assert args.eps is not None, "the arguments set eps for pgd"
            objective = feature_cosine_objective(
                lambda x: self._features_without_gradient_to_tokens(self.normalizer(x)),
                self._target(pixel_values),
                similarity_axis=self.model.config.similarity_axis,
            )
            return self.normalizer(
                pgd_attack(
                    objective,
                    images,
                    eps=args.eps,
                    step_size=args.step_size,
                    num_steps=args.num_attack_steps,
                    generator=generators,
                )
            )

    def _features_without_gradient_to_tokens(self, pixel_values: Tensor) -> Tensor:
        with self.accelerator.autocast():
            return self.model.get_features(pixel_values).float()

    @torch.no_grad()
    def _target(self, pixel_values: Tensor) -> Tensor:
        """f(x): features without tokens."""
        with self.model.disable_adapter():
            return self._features_without_gradient_to_tokens(pixel_values)

    def _step(
        self,
        step: int,
        batches: Iterator[tuple[Mapping[str, Tensor], tuple[int, int]]],
        features: Callable[[Tensor], Tensor],
        optimizer: torch.optim.Optimizer,
    ) -> tuple[dict[str, float], tuple[int, int]]:
        """One optimiser step over `gradient_accumulation_steps` batches; its metrics, and the position after it."""
        args, accelerator, axis = self.args, self.accelerator, self.model.config.similarity_axis
        routes = {"base": (False,), "tokens": (True,), "both": (False, True)}[args.attack_through]
        num_backwards = len(routes) * args.gradient_accumulation_steps
        totals = torch.zeros(4, device=accelerator.device)
        position = (0, 0)
        for backward in range(num_backwards):
            if backward % len(routes) == 0:
                batch, position = next(batches)
                images, index = batch["images"].to(accelerator.device), batch["index"]
                pixel_values = self.normalizer(images)
                target = self._target(pixel_values)
            through_tokens = routes[backward % len(routes)]
            attacked = self.attack(images, index, step, through_tokens=through_tokens)
            with nullcontext() if backward == num_backwards - 1 else accelerator.no_sync(features):
                losses = robustness_loss(
                    features,
                    pixel_values,
                    attacked,
                    target,
                    similarity_axis=axis,
                    invariance_weight=args.invariance_weight,
                    adversarial_weight=args.adversarial_weight,
                )
                accelerator.backward(losses.loss / num_backwards)
            baseline = cosine_similarity(self._target(attacked), target, similarity_axis=axis).mean()
            totals += (
                torch.stack([losses.loss, losses.invariance, losses.adversarial, baseline]).detach() / num_backwards
            )
        totals = accelerator.reduce(totals, reduction="mean")
        self._check_finite(totals, step, optimizer)
        if args.max_grad_norm is not None:
            accelerator.clip_grad_norm_([self.model.robustness_tokens], args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        names = ("loss", "invariance_cosine", "adversarial_cosine", "baseline_cosine")
        return dict(zip(names, totals.tolist(), strict=True)), position

    def _check_finite(self, totals: Tensor, step: int, optimizer: torch.optim.Optimizer) -> None:
        gradient = self.model.robustness_tokens.grad
        if torch.isfinite(totals).all() and (gradient is None or torch.isfinite(gradient).all()):
            return
        optimizer.zero_grad()
        self.model.eval()
        self.model.config.training = {**self.args.recipe(), "num_steps_done": step}
        self._write_log()
        self.save_model()
        raise FloatingPointError(
            f"the loss or its gradient is not finite at step {step + 1} (loss {totals[0].item()}): training stopped; "
            f"the tokens after step {step} are in the model and saved in {self.output_dir}. Try mixed_precision='no' "
            "or a smaller learning_rate"
        )

    def _as_image_dataset(self, dataset: Any) -> Dataset[Any]:
        args, processor = self.args, self.model.image_processor
        if not isinstance(dataset, datasets.Dataset | datasets.IterableDataset):
            return TensorImageDataset(dataset)
        if args.resize == "processor":
            transform = ImageTransform(resize="processor", image_processor=processor)
        else:
            size = args.image_size or processor_image_size(processor)
            transform = ImageTransform(resize="squash", image_size=size)
        if isinstance(dataset, datasets.Dataset):
            return ImageDataset(dataset, transform, image_column_name=args.image_column_name)
        if args.resume_from_checkpoint is not None:
            raise ValueError("a streaming dataset can't be resumed at its exact place: train on it without streaming")
        return IterableImageDataset(
            dataset,
            transform,
            image_column_name=args.image_column_name,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
        )

    def _build_loader(self) -> Any:
        """Batches for this process; a stream deals its own shards out, everything else is shuffled and dealt here."""
        args, accelerator = self.args, self.accelerator
        streaming = isinstance(self.train_dataset, IterableImageDataset)
        whole_batch = args.per_device_train_batch_size * accelerator.num_processes
        loader = build_dataloader(
            self.train_dataset,
            batch_size=args.per_device_train_batch_size,
            shuffle=not streaming,
            seed=args.seed,
            num_workers=args.dataloader_num_workers,
            drop_last=not streaming and len(self.train_dataset) >= whole_batch,  # type: ignore[arg-type]
        )
        return loader if streaming else accelerator.prepare(loader)

    def _batches(
        self, loader: Any, epoch: int, batches_done: int
    ) -> Iterator[tuple[Mapping[str, Tensor], tuple[int, int]]]:
        """Batches without end, epoch after epoch, each with the position (epoch, batches done) after it."""
        broken_images = BrokenImageLog(self.args.max_broken_images)
        while True:
            (loader if hasattr(loader, "set_epoch") else loader.dataset).set_epoch(epoch)
            found = batches_done > 0
            for batch in self.accelerator.skip_first_batches(loader, batches_done) if batches_done else loader:
                batches_done += 1
                broken_images.update(batch)
                if len(batch["images"]):
                    found = True
                    yield batch, (epoch, batches_done)
            if not found:
                raise ValueError("train_dataset has no image to train on")
            epoch, batches_done = epoch + 1, 0

    def _save_checkpoint(self, step: int, position: tuple[int, int], optimizer: Any, scheduler: Any) -> None:
        if self.accelerator.is_main_process:
            save_checkpoint(
                self.output_dir,
                step=step,
                tokens=self.model.robustness_tokens,
                optimizer=optimizer,
                state={
                    "position": list(position),
                    "num_processes": self.accelerator.num_processes,
                    "recipe": self.args.recipe(),
                    "scheduler": {k: v for k, v in scheduler.state_dict().items() if k != "lr_lambdas"},
                    "log_history": self.log_history,
                },
                save_total_limit=self.args.save_total_limit,
            )
        self.accelerator.wait_for_everyone()

    def _resume(self, optimizer: Any, scheduler: Any) -> tuple[int, tuple[int, int]]:
        """Puts the checkpoint's state back; returns its step and its position in the data."""
        assert self.args.resume_from_checkpoint is not None, "called only to resume"
        folder = find_checkpoint(self.output_dir, self.args.resume_from_checkpoint)
        state = load_checkpoint(folder, tokens=self.model.robustness_tokens, optimizer=optimizer)
        found = {"num_processes": self.accelerator.num_processes, **self.args.recipe()}
        stored = {"num_processes": state["num_processes"], **state["recipe"]}
        if differing := sorted(key for key in found if found[key] != stored.get(key) and key != "max_steps"):
            changes = ", ".join(f"{key}: {stored.get(key)!r} -> {found[key]!r}" for key in differing)
            raise ValueError(f"{folder} was made by another run ({changes}): resume with the same settings")
        scheduler.load_state_dict({**state["scheduler"], "lr_lambdas": [None] * len(scheduler.base_lrs)})
        self.log_history = state["log_history"]
        return state["step"], (state["position"][0], state["position"][1])

    def _clear_output_dir(self) -> None:
        self.output_dir.mkdir(parents=True, exist_ok=True)
        for _, checkpoint in list_checkpoints(self.output_dir):
            shutil.rmtree(checkpoint)

    def _write_log(self) -> None:
        if not self.accelerator.is_main_process:
            return
        self.output_dir.mkdir(parents=True, exist_ok=True)
        with (self.output_dir / LOG_FILE).open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=LOG_COLUMNS)
            writer.writeheader()
            writer.writerows(self.log_history)
