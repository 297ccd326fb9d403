"""Tiny training runs in processes of their own, for tests that kill them or run several together.

The processes are forked from a server that has imported everything and computed nothing: a fork after a backward pass
can't compute gradients on a machine with a GPU, and a fresh interpreter takes seconds.
"""

import multiprocessing
import os
import socket
from collections.abc import Callable, Sequence
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robustness_tokens.models.modeling import RobustnessTokenForImageClassification, RobustnessTokenModel
from robustness_tokens.training.arguments import RobustnessTokenTrainingArguments
from robustness_tokens.training.trainer import RobustnessTokenTrainer
from tests.support.bases import build_base


SIDE, NUM_TOKENS = 16, 3
SETTINGS: dict[str, Any] = {
    "attack": "pgd",
    "eps": 16 / 255,
    "num_attack_steps": 1,
    "per_device_train_batch_size": 4,
    "learning_rate": 0.02,
    "disable_tqdm": True,
}


def fork_server() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["robustness_tokens.training.trainer", "torch.utils.tensorboard"])
    return context


def images(count: int, *, seed: int = 11) -> list[dict[str, Any]]:
    pixels = torch.randint(0, 256, (count, 3, SIDE, SIDE), generator=torch.Generator().manual_seed(seed)) / 255
    return [{"images": image} for image in pixels]


def build_trainer(
    output_dir: Path, *, num_images: int = 8, eval_images: int = 0, callbacks: Sequence[Any] = (), **kwargs: Any
) -> RobustnessTokenTrainer:
    torch.set_num_threads(1)
    torch.manual_seed(3)
    model = RobustnessTokenModel.from_base(build_base("dinov2"), num_robustness_tokens=NUM_TOKENS)
    args = RobustnessTokenTrainingArguments(output_dir=str(output_dir), **{**SETTINGS, **kwargs})
    held_out = images(eval_images, seed=5) if eval_images else None
    return RobustnessTokenTrainer(model, args, images(num_images), held_out, callbacks)


ROBUST: dict[str, Any] = {"objective": "distillation", "attack_through": "tokens", "invariance_weight": 0.5}


def build_robust_trainer(output_dir: Path, *, num_images: int = 8, **kwargs: Any) -> RobustnessTokenTrainer:
    """As `--preset robust` trains: tokens of every layer, gains and shifts, distilled and attacked through."""
    torch.set_num_threads(1)
    torch.manual_seed(3)
    model = RobustnessTokenForImageClassification.from_base(
        build_base("dinov2", classifier=True),
        num_robustness_tokens=NUM_TOKENS,
        token_depth="all",
        gains_and_shifts=["norm", "linear", "bias", "patch_embedding"],
    )
    args = RobustnessTokenTrainingArguments(output_dir=str(output_dir), **{**SETTINGS, **ROBUST, **kwargs})
    return RobustnessTokenTrainer(model, args, images(num_images))


def state_of(trainer: RobustnessTokenTrainer) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in trainer.model.injector.state.items()}


def tokens_of(trainer: RobustnessTokenTrainer) -> Tensor:
    return trainer.model.robustness_tokens.detach().clone()


def start(target: Callable[..., None], *args: Any, **kwargs: Any) -> BaseProcess:
    process = fork_server().Process(target=target, args=args, kwargs=kwargs)
    process.start()
    return process


def run_together(num_processes: int, target: Callable[..., None], *args: Any) -> None:
    """Calls `target(rank, *args)` in several processes connected by gloo; all must succeed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [start(_as_rank, rank, num_processes, port, target, args) for rank in range(num_processes)]
    for process in processes:
        process.join(timeout=120)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert codes == [0] * num_processes


def _as_rank(rank: int, num_processes: int, port: int, target: Callable[..., None], args: Sequence[Any]) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_processes),
        "LOCAL_WORLD_SIZE": str(num_processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    target(rank, *args)
