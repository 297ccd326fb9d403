import copy
import csv
import dataclasses
import io
import json
import math
import os
import shutil
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.trainer_utils import TrainOutput

from robustness_tokens.data.image_datasets import BrokenImage
from robustness_tokens.hub import is_adapter
from robustness_tokens.models import onednn
from robustness_tokens.models.features import check_patches
from robustness_tokens.models.modeling import RobustnessTokenModel
from robustness_tokens.training import checkpoints, run_folder
from robustness_tokens.training import dataset as dataset_module
from robustness_tokens.training import step as step_module
from robustness_tokens.training import trainer as trainer_module
from robustness_tokens.training.arguments import RobustnessTokenTrainingArguments
from robustness_tokens.training.checkpoints import STATE_FILE, TENSORS_FILE, list_checkpoints
from robustness_tokens.training.run_folder import LOG_COLUMNS, LOG_FILE, rounding_settings
from robustness_tokens.training.step import LastGoodTokens, TrainingStep
from robustness_tokens.training.trainer import RobustnessTokenTrainer
from robustness_tokens.utils import in_use


SIDE, NUM_TOKENS = 16, 3
ADAPTER = {"config.json", "model.safetensors", "preprocessor_config.json", "README.md"}
PGD: dict[str, Any] = {"attack": "pgd", "eps": 16 / 255, "num_attack_steps": 2}
PAPER: dict[str, Any] = {"attack": "paper", "eps": None, "num_attack_steps": 2}

BaseFactory = Callable[..., Any]
TrainerFactory = Callable[..., RobustnessTokenTrainer]


def random_images(count: int) -> list[dict[str, Any]]:
    # 8-bit values, as pictures have: the paper's attack rounds to them.
    pixels = torch.randint(0, 256, (count, 3, SIDE, SIDE), generator=torch.Generator().manual_seed(11)) / 255
    return [{"images": image} for image in pixels]


def pictures(count: int, *, broken: tuple[int, ...] = (), column: str = "image") -> datasets.Dataset:
    rows = []
    for row, item in enumerate(random_images(count)):
        file = io.BytesIO()
        Image.fromarray((item["images"] * 255).round().byte().permute(1, 2, 0).numpy()).save(file, "png")
        rows.append({"bytes": b"no picture" if row in broken else file.getvalue(), "path": None})
    features = datasets.Features({column: datasets.Image()})
    return datasets.Dataset.from_dict({column: rows}, features=features)


@pytest.fixture
def make_trainer(make_base: BaseFactory, tmp_path: Path) -> TrainerFactory:
    """A trainer with new, always equal tokens on a tiny DINOv2, eight images and four cheap steps."""

    def make(
        output_dir: str = "run", dataset: Any = None, *, num_hidden_layers: int = 2, **kwargs: Any
    ) -> RobustnessTokenTrainer:
        torch.manual_seed(3)
        base = make_base("dinov2", num_hidden_layers=num_hidden_layers)
        model = RobustnessTokenModel.from_base(base, num_robustness_tokens=NUM_TOKENS)
        defaults = {"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 0.02, "disable_tqdm": True}
        args = RobustnessTokenTrainingArguments(output_dir=str(tmp_path / output_dir), **{**defaults, **PGD, **kwargs})
        return RobustnessTokenTrainer(model, args, random_images(8) if dataset is None else dataset)

    return make


def trained_tokens(trainer: RobustnessTokenTrainer) -> Tensor:
    trainer.train()
    return trainer.model.robustness_tokens.detach().clone()


def without_seconds(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def read_csv(folder: Path) -> list[dict[str, float]]:
    with (folder / LOG_FILE).open(newline="", encoding="utf-8") as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


# What training changes


@pytest.mark.parametrize("attack", [PAPER, PGD], ids=["paper", "pgd"])
def test_only_the_tokens_change(make_trainer: TrainerFactory, attack: dict[str, Any]) -> None:
    trainer = make_trainer(**attack)
    base = trainer.model.get_base_model()
    before = {name: value.clone() for name, value in [*base.named_parameters(), *base.named_buffers()]}
    tokens_before = trainer.model.robustness_tokens.detach().clone()
    trainer.train()
    after = dict([*base.named_parameters(), *base.named_buffers()])
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert not torch.equal(tokens_before, trainer.model.robustness_tokens)


def test_training_leaves_gradients_and_flags_as_they_were(make_trainer: TrainerFactory) -> None:
    trainer = make_trainer()
    model = trainer.model
    global_noise = torch.get_rng_state()
    trainer.train()
    assert torch.equal(torch.get_rng_state(), global_noise)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == [
        "injector.robustness_tokens"
    ]
    assert not any(module.training for module in model.modules())
    assert model.injector.enabled


def test_the_base_is_in_eval_while_training(make_trainer: TrainerFactory) -> None:
    trainer = make_trainer()
    base = trainer.model.get_base_model()
    seen: list[bool] = []
    base.register_forward_pre_hook(lambda *_: seen.append(any(module.training for module in base.modules())))
    trainer.train()
    assert seen
    assert not any(seen)


@pytest.mark.parametrize("through", ["base", "tokens", "both"])
@pytest.mark.parametrize("attack", [PAPER, {**PGD, "eps": 8 / 255}], ids=["paper", "pgd"])
def test_tokens_come_closer_to_the_clean_features(
    make_trainer: TrainerFactory, attack: dict[str, Any], through: str
) -> None:
    trainer = make_trainer(max_steps=30, attack_through=through, **attack)
    trainer.train()
    first, last = trainer.log_history[0], trainer.log_history[-1]
    assert last["loss"] < first["loss"] - 0.01
    assert last["adversarial_cosine"] > first["adversarial_cosine"]


def test_training_beats_the_base_under_attack(make_trainer: TrainerFactory) -> None:
    trainer = make_trainer(max_steps=60, num_attack_steps=5, adversarial_weight=1, learning_rate=0.05)
    trainer.train()
    last = trainer.log_history[-1]
    assert last["adversarial_cosine"] > last["baseline_cosine"] + 0.01


# Reproducible


def test_same_seed_gives_the_same_tokens_bit_for_bit(make_trainer: TrainerFactory) -> None:
    first, second = (make_trainer(f"run{i}") for i in range(2))
    torch.manual_seed(99)  # noise must not come from the global generator
    tokens = trained_tokens(first)
    assert torch.equal(tokens, trained_tokens(second))
    assert without_seconds(first.log_history) == without_seconds(second.log_history)
    assert not torch.equal(tokens, trained_tokens(make_trainer("run2", seed=1)))


def test_loading_in_workers_changes_nothing(make_trainer: TrainerFactory) -> None:
    first = trained_tokens(make_trainer("run0", pictures(8)))
    assert torch.equal(first, trained_tokens(make_trainer("run1", pictures(8), dataloader_num_workers=1)))


def test_training_twice_starts_a_new_log(make_trainer: TrainerFactory) -> None:
    trainer = make_trainer()
    trainer.train()
    trainer.train()
    assert [row["step"] for row in trainer.log_history] == [1, 2, 3, 4]
    assert [row["step"] for row in read_csv(trainer.output_dir)] == [1, 2, 3, 4]


def test_training_twice_deletes_no_checkpoints_unasked(
    make_trainer: TrainerFactory, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make_trainer(save_steps=2)
    tokens = trained_tokens(trainer)
    files = {path: path.read_bytes() for path in trainer.output_dir.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=r"delete checkpoint-2, checkpoint-4 .* overwrite_output_dir=True"):
        trainer.train()
    assert {path: path.read_bytes() for path in trainer.output_dir.rglob("*") if path.is_file()} == files
    assert torch.equal(trainer.model.robustness_tokens, tokens)
    assert caplog.text == ""

    make_trainer(save_steps=1, max_steps=1, overwrite_output_dir=True).train()
    assert "deletes checkpoint-2, checkpoint-4 of an earlier run" in caplog.text
    assert [step for step, _ in list_checkpoints(trainer.output_dir)] == [1]


@pytest.mark.parametrize("num_images", [8, 6, 20])
@pytest.mark.parametrize("through", ["base", "both"])
def test_small_batches_a_step_equal_the_large_batch(
    make_trainer: TrainerFactory, num_images: int, through: str
) -> None:
    images, settings = random_images(num_images), {"attack_through": through, "max_steps": 5}
    large = make_trainer("large", images, per_device_train_batch_size=8, **settings)
    small = make_trainer("small", images, gradient_accumulation_steps=2, **settings)
    torch.testing.assert_close(trained_tokens(small), trained_tokens(large), rtol=0, atol=1e-5)
    for row, expected in zip(small.log_history, large.log_history, strict=True):
        for key in ("loss", "invariance_cosine", "adversarial_cosine", "baseline_cosine"):
            assert row[key] == pytest.approx(expected[key], abs=1e-5, nan_ok=True)


# Checkpoints


@pytest.fixture
def interrupt(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """`interrupt(n)`: kills a run in the middle of the step after n steps."""

    def arm(steps: int) -> None:
        real = TrainingStep.accumulate_gradient

        def killed(*args: Any, step: int, **kwargs: Any) -> dict[str, float]:
            if step == steps:
                monkeypatch.setattr(TrainingStep, "accumulate_gradient", real)
                raise KeyboardInterrupt
            return real(*args, step=step, **kwargs)

        monkeypatch.setattr(TrainingStep, "accumulate_gradient", killed)

    return arm


@pytest.mark.parametrize("killed_after", [3, 4, 7], ids=["mid epoch", "at an epoch's end", "late"])
@pytest.mark.parametrize(
    "settings",
    [PAPER, PGD, {**PGD, "lr_scheduler_type": "cosine", "warmup_steps": 2}, {"gradient_accumulation_steps": 2}],
    ids=["paper", "pgd", "schedule", "accumulation"],
)
def test_a_resumed_run_ends_as_the_uninterrupted_one(
    make_trainer: TrainerFactory,
    interrupt: Callable[[int], None],
    settings: dict[str, Any],
    killed_after: int,
) -> None:
    # Seven images in batches of three: two batches an epoch, so eight steps are four epochs, or eight.
    settings = {**settings, "max_steps": 8, "per_device_train_batch_size": 3, "save_steps": 1}
    whole = make_trainer("whole", random_images(7), **settings)
    tokens = trained_tokens(whole)

    interrupt(killed_after)
    with pytest.raises(KeyboardInterrupt):
        make_trainer("cut", random_images(7), **settings).train()
    resumed = make_trainer("cut", random_images(7), resume_from_checkpoint=True, **settings)
    assert not torch.equal(resumed.model.robustness_tokens, tokens)
    result = resumed.train()

    assert torch.equal(resumed.model.robustness_tokens, tokens)
    assert result.global_step == 8
    assert without_seconds(resumed.log_history) == without_seconds(whole.log_history)
    assert read_csv(resumed.output_dir) == resumed.log_history
    seconds = [row["seconds"] for row in resumed.log_history]
    assert seconds == sorted(seconds)


def test_resuming_goes_back_to_the_last_checkpoint_and_drops_what_was_logged_after(
    make_trainer: TrainerFactory, interrupt: Callable[[int], None]
) -> None:
    settings = {"max_steps": 6, "save_steps": 2}
    tokens = trained_tokens(make_trainer("whole", **settings))
    interrupt(5)
    cut = make_trainer("cut", **settings)
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    assert [row["step"] for row in read_csv(cut.output_dir)] == [1, 2, 3, 4, 5]
    with (cut.output_dir / LOG_FILE).open("a", encoding="utf-8") as file:
        file.write("6,-1.2")  # a row cut in the middle
    resumed = make_trainer("cut", resume_from_checkpoint=True, **settings)
    assert torch.equal(trained_tokens(resumed), tokens)
    assert [row["step"] for row in read_csv(cut.output_dir)] == [1, 2, 3, 4, 5, 6]


def test_resuming_by_path_into_another_folder(make_trainer: TrainerFactory) -> None:
    whole = make_trainer("whole", save_steps=2)
    tokens = trained_tokens(whole)
    checkpoint = str(whole.output_dir / "checkpoint-2")
    other = make_trainer("other", resume_from_checkpoint=checkpoint)
    assert torch.equal(trained_tokens(other), tokens)
    assert [row["step"] for row in read_csv(other.output_dir)] == [1, 2, 3, 4]


def test_resuming_from_elsewhere_replaces_nothing_unasked(make_trainer: TrainerFactory) -> None:
    finished, cut = make_trainer("finished", max_steps=3, save_steps=3), make_trainer("cut", save_steps=2)
    for trainer in (finished, cut):
        trainer.train()
    finished.save_model()
    (finished.output_dir / "evaluation.json").write_text('{"package_version": ""}', encoding="utf-8")
    files = {path: path.read_bytes() for path in finished.output_dir.rglob("*") if path.is_file()}
    checkpoint = str(cut.output_dir / "checkpoint-2")
    with pytest.raises(ValueError, match="overwrite_output_dir=True"):
        make_trainer("finished", resume_from_checkpoint=checkpoint)
    assert {path: path.read_bytes() for path in finished.output_dir.rglob("*") if path.is_file()} == files

    make_trainer("finished", resume_from_checkpoint=checkpoint, overwrite_output_dir=True).train()
    assert list_checkpoints(finished.output_dir) == []  # they were another run's


def test_a_run_deletes_nothing_that_others_put_there(make_trainer: TrainerFactory) -> None:
    trainer = make_trainer(save_steps=2)
    trainer.train()
    trainer.save_model()
    files = ("evaluation.json", "report.html", "figures/curve.png", "notes.txt")
    (trainer.output_dir / "figures").mkdir()
    for name in files:
        (trainer.output_dir / name).write_text("mine", encoding="utf-8")
    for settings in ({"resume_from_checkpoint": True}, {"overwrite_output_dir": True}):
        again = make_trainer(save_steps=2, **settings)
        again.train()
        assert {(trainer.output_dir / name).read_text(encoding="utf-8") for name in files} == {"mine"}
        assert is_adapter(trainer.output_dir)


def other_images() -> list[dict[str, Any]]:
    return [*random_images(8)[:-1], {"images": random_images(8)[-1]["images"] / 2}]


@pytest.mark.parametrize(
    ("dataset", "layer", "message"),
    [(other_images(), None, "images_digest: "), (None, 1, "base_digest: "), (random_images(8)[::-1], None, "images_")],
    ids=["another last image", "another middle layer", "another order"],
)
def test_a_run_on_something_else_is_not_resumed(
    make_trainer: TrainerFactory, dataset: Any, layer: int | None, message: str
) -> None:
    trainer = make_trainer(save_steps=2, num_hidden_layers=3)
    trainer.train()
    resumed = make_trainer(dataset=dataset, resume_from_checkpoint=True, save_steps=2, num_hidden_layers=3)
    if layer is not None:
        with torch.no_grad():
            base: Any = resumed.model.get_base_model()
            next(base.encoder.layer[layer].parameters()).add_(1)
    with pytest.raises(ValueError, match=f"made by another run .*{message}"):
        resumed.train()
    assert [step for step, _ in list_checkpoints(trainer.output_dir)] == [2, 4]


def test_images_that_were_moved_are_taken_if_asked(make_trainer: TrainerFactory) -> None:
    settings: dict[str, Any] = {"save_steps": 2, "max_steps": 4}
    make_trainer(**settings).train()
    moved = {**settings, "dataset": other_images(), "resume_from_checkpoint": True}
    with pytest.raises(ValueError, match=r"resume with the same settings \(if only .*: ignore_images_mismatch=True"):
        make_trainer(**moved).train()
    resumed = make_trainer(**moved, ignore_images_mismatch=True)
    assert resumed.train().global_step == 4
    assert "ignore_images_mismatch" not in (resumed.model.config.training or {})


def test_images_that_differ_at_each_reading_are_no_reason_to_refuse(make_trainer: TrainerFactory) -> None:
    class Augmented(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return 8

        def __getitem__(self, row: int) -> dict[str, Tensor]:
            return {"images": torch.rand(3, SIDE, SIDE)}

    make_trainer(dataset=Augmented(), save_steps=2, max_steps=2).train()
    resumed = make_trainer(dataset=Augmented(), save_steps=2, max_steps=2, resume_from_checkpoint=True)
    assert resumed.train().global_step == 2


def test_two_runs_do_not_share_a_folder(make_trainer: TrainerFactory) -> None:
    first, second = make_trainer(), make_trainer()
    with in_use(first.output_dir), pytest.raises(ValueError, match="is in use by another run"):
        second.train()
    first.train()


def test_a_folder_is_free_after_its_run_though_a_worker_lives_on(tmp_path: Path) -> None:
    with in_use(tmp_path):
        if (child := os.fork()) == 0:  # as a data loader's worker
            time.sleep(60)
            os._exit(0)
    try:
        with in_use(tmp_path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_half_written_checkpoint_is_not_taken(make_trainer: TrainerFactory) -> None:
    whole = make_trainer("run", save_steps=2)
    tokens = trained_tokens(whole)
    (whole.output_dir / "checkpoint-4" / TENSORS_FILE).unlink()
    resumed = make_trainer("run", resume_from_checkpoint=True, save_steps=2)
    result = resumed.train()
    assert result.global_step == 4
    assert torch.equal(resumed.model.robustness_tokens, tokens)
    assert [step for step, _ in list_checkpoints(whole.output_dir)] == [2, 4]


def test_save_total_limit_keeps_the_newest(make_trainer: TrainerFactory) -> None:
    trainer = make_trainer(max_steps=6, save_steps=1, save_total_limit=2)
    trainer.train()
    assert {path.name for path in trainer.output_dir.iterdir()} == {"checkpoint-5", "checkpoint-6", "logs"}


def test_a_long_run_has_small_checkpoints(make_trainer: TrainerFactory) -> None:
    trainer = make_trainer(max_steps=40, num_attack_steps=1, save_steps=40)
    trainer.train()
    size = sum(path.stat().st_size for path in (trainer.output_dir / "checkpoint-40").iterdir())
    assert size < 3 * 4 * trainer.model.robustness_tokens.numel() + 5_000


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"seed": 1}, "seed: 0 -> 1"),
        ({"learning_rate": 0.5}, "learning_rate: 0.02 -> 0.5"),
        ({"attack": "paper", "eps": None}, "attack: 'pgd' -> 'paper'"),
        ({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}, "per_device_train_batch_size: 4 -> 2"),
        ({"dataset": random_images(9)}, "num_images: 8 -> 9"),
    ],
)
def test_resuming_with_other_settings_is_refused(
    make_trainer: TrainerFactory, changed: dict[str, Any], named: str
) -> None:
    make_trainer(save_steps=2).train()
    resumed = make_trainer(save_steps=2, resume_from_checkpoint=True, **changed)
    before = resumed.model.robustness_tokens.detach().clone()
    with pytest.raises(ValueError, match=named):
        resumed.train()
    assert torch.equal(resumed.model.robustness_tokens, before)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, None),
        ({"onednn": False}, "onednn: True -> False"),
        ({"train_attn_implementation": "eager"}, "attn_implementation: 'sdpa' -> 'eager'"),
        ({"train_attn_implementation": "base"}, None),  # what "auto" takes in float32
        ({"train_attn_implementation": "sdpa"}, None),
    ],
    ids=["nothing", "onednn", "attention", "attention of the base", "the same attention"],
)
def test_resuming_with_another_rounding_is_said(
    make_trainer: TrainerFactory,
    caplog: pytest.LogCaptureFixture,
    onednn_everywhere: None,
    changed: dict[str, Any],
    said: str | None,
) -> None:
    make_trainer(max_steps=2, save_steps=2).train()
    make_trainer(resume_from_checkpoint=True, **changed).train()
    assert (said is None and caplog.text == "") or (said is not None and said in caplog.text)


def test_resuming_with_the_base_in_another_attention_is_said(
    make_trainer: TrainerFactory, caplog: pytest.LogCaptureFixture
) -> None:
    make_trainer(max_steps=2, save_steps=2).train()
    resumed = make_trainer(resume_from_checkpoint=True)
    base: Any = resumed.model.get_base_model()
    base.set_attn_implementation("eager")
    resumed.train()
    assert "attn_implementation: 'sdpa' -> 'eager'" in caplog.text


@pytest.mark.parametrize(
    ("owner", "name", "said"),
    [(run_folder, "__version__", "package: "), (torch, "get_num_threads", "num_threads: ")],
)
def test_resuming_with_another_package_or_number_of_threads_is_said(
    make_trainer: TrainerFactory,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    owner: Any,
    name: str,
    said: str,
) -> None:
    make_trainer(max_steps=2, save_steps=2).train()
    monkeypatch.setattr(owner, name, "9.9" if name == "__version__" else lambda: 99)
    make_trainer(resume_from_checkpoint=True).train()
    assert said in caplog.text


@pytest.mark.parametrize("avx512", [True, False])
def test_onednn_changes_the_rounding_where_it_is_in_effect(
    make_trainer: TrainerFactory, monkeypatch: pytest.MonkeyPatch, avx512: bool
) -> None:
    monkeypatch.setattr(onednn, "has_avx512", lambda: avx512)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    trainer = make_trainer()
    found = [
        rounding_settings(trainer.model, dataclasses.replace(trainer.args, onednn=asked), device=torch.device("cpu"))
        for asked in (True, False)
    ]
    assert [one["onednn"] for one in found] == [avx512, False]


def test_on_a_gpu_only_what_is_in_effect_there_changes_the_rounding(
    make_trainer: TrainerFactory, onednn_everywhere: None
) -> None:
    trainer = make_trainer()
    changed = dataclasses.replace(trainer.args, onednn=False)
    found = {
        device: [
            rounding_settings(trainer.model, args, device=torch.device(device)) for args in (trainer.args, changed)
        ]
        for device in ("cpu", "cuda")
    }
    assert found["cuda"][0] == found["cuda"][1]
    assert found["cuda"][0]["num_threads"] is None
    assert found["cpu"][0] != found["cpu"][1]


def test_the_attention_of_every_part_of_the_base_counts(make_trainer: TrainerFactory) -> None:
    trainer = make_trainer()
    base: Any = trainer.model.get_base_model()
    inner: Any = [part for part in base.modules() if hasattr(part, "config")][-1]
    inner.config = copy.deepcopy(inner.config)
    inner.config._attn_implementation = "eager"
    settings = rounding_settings(trainer.model, trainer.args, device=torch.device("cpu"))
    assert "eager" in settings["attn_implementation"]


def write_digest(checkpoint: Path) -> None:
    """Makes an edited checkpoint one that was written so."""
    content = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
    del content["digest"]
    content["digest"] = checkpoints._digest(content, (checkpoint / TENSORS_FILE).read_bytes())
    (checkpoint / STATE_FILE).write_text(json.dumps(content), encoding="utf-8")


@pytest.mark.parametrize("key", ["rounding", "position", "previous_recipe", "scheduler", "callbacks"])
def test_a_checkpoint_of_another_version_is_refused_in_words(make_trainer: TrainerFactory, key: str) -> None:
    trainer = make_trainer(max_steps=2, save_steps=2)
    trainer.train()
    path = trainer.output_dir / "checkpoint-2" / STATE_FILE
    content = json.loads(path.read_text(encoding="utf-8"))
    del content["state"][key]
    path.write_text(json.dumps(content), encoding="utf-8")
    write_digest(path.parent)
    with pytest.raises(ValueError, match=rf"checkpoint-2.*'{key}'.*overwrite_output_dir=True"):
        make_trainer(resume_from_checkpoint=True).train()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_run_resumes_with_the_same_bits(
    make_trainer: TrainerFactory, interrupt: Callable[[int], None]
) -> None:
    settings: dict[str, Any] = {"torch_compile": True, "save_steps": 1}
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # which says that compiling has failed
        tokens = trained_tokens(make_trainer("whole", **settings))
        interrupt(2)
        with pytest.raises(KeyboardInterrupt):
            make_trainer("cut", **settings).train()
        torch.compiler.reset()  # as a new process compiles again
        assert torch.equal(trained_tokens(make_trainer("cut", resume_from_checkpoint=True, **settings)), tokens)


def test_max_steps_may_grow_only_where_the_schedule_does_not_depend_on_it(make_trainer: TrainerFactory) -> None:
    tokens = trained_tokens(make_trainer("whole", max_steps=6))
    make_trainer("short", save_steps=2).train()
    assert torch.equal(
        trained_tokens(make_trainer("short", max_steps=6, resume_from_checkpoint=True, save_steps=2)), tokens
    )
    with pytest.raises(ValueError, match="beyond max_steps=3"):
        make_trainer("short", max_steps=3, resume_from_checkpoint=True).train()

    make_trainer("cosine", save_steps=2, lr_scheduler_type="cosine").train()
    with pytest.raises(ValueError, match="max_steps: 4 -> 6"):
        make_trainer("cosine", max_steps=6, resume_from_checkpoint=True, lr_scheduler_type="cosine").train()


def test_resuming_before_there_is_a_checkpoint_starts_from_the_beginning_with_a_warning(
    make_trainer: TrainerFactory, caplog: pytest.LogCaptureFixture
) -> None:
    tokens = trained_tokens(make_trainer("plain"))
    first = make_trainer("run", resume_from_checkpoint=True)
    assert torch.equal(trained_tokens(first), tokens)
    assert [record.message for record in caplog.records] == [
        f"{first.output_dir} holds no checkpoint yet: training starts from the beginning"
    ]


def test_a_new_run_replaces_no_adapter_unasked(make_trainer: TrainerFactory) -> None:
    trainer = make_trainer("run")
    trainer.train()
    trainer.save_model()
    with pytest.raises(ValueError, match="overwrite_output_dir=True"):
        make_trainer("run", resume_from_checkpoint=True)


def test_a_damaged_checkpoint_is_passed_over_and_said(
    make_trainer: TrainerFactory, caplog: pytest.LogCaptureFixture
) -> None:
    whole = make_trainer("run", save_steps=1)
    tokens = trained_tokens(whole)
    for step in (3, 4):
        file = whole.output_dir / f"checkpoint-{step}" / TENSORS_FILE
        file.write_bytes(file.read_bytes()[:-8])
    resumed = make_trainer("run", resume_from_checkpoint=True, save_steps=1)
    assert torch.equal(trained_tokens(resumed), tokens)
    assert sum("is damaged" in record.message for record in caplog.records) == 2
    assert [step for step, _ in list_checkpoints(whole.output_dir)] == [1, 2, 3, 4]


# The output folder


def test_the_adapter_is_exactly_its_files_and_the_run_lies_in_folders(make_trainer: TrainerFactory) -> None:
    trainer = make_trainer(save_steps=2)
    trainer.train()
    trainer.save_model()
    assert {path.name for path in trainer.output_dir.iterdir() if path.is_file()} == ADAPTER
    assert {path.name for path in trainer.output_dir.iterdir() if path.is_dir()} == {
        "checkpoint-2",
        "checkpoint-4",
        "logs",
    }
    assert [path.name for path in (trainer.output_dir / "logs").iterdir()] == ["training_log.csv"]
    other = trainer.output_dir / "elsewhere"
    trainer.save_model(str(other))
    assert {path.name for path in other.iterdir()} == ADAPTER
    assert (other / "model.safetensors").stat().st_mode & 0o777 == 0o600


def test_save_model_never_overwrites_another_adapter(make_trainer: TrainerFactory, adapter_folder: Path) -> None:
    trainer = make_trainer()
    before = (adapter_folder / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="holds an adapter already"):
        trainer.save_model(str(adapter_folder))
    assert (adapter_folder / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("content", ["adapter", "checkpoint"])
def test_a_used_output_dir_is_refused(make_trainer: TrainerFactory, content: str) -> None:
    trainer = make_trainer("run", save_steps=2 if content == "checkpoint" else None)
    trainer.train()
    if content == "adapter":
        trainer.save_model()
    files = {path: path.read_bytes() for path in trainer.output_dir.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="overwrite_output_dir=True"):
        make_trainer("run")
    assert {path: path.read_bytes() for path in trainer.output_dir.rglob("*") if path.is_file()} == files


def test_the_folder_of_the_base_is_refused_before_training(make_trainer: TrainerFactory, tmp_path: Path) -> None:
    make_trainer().model.unload().save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match="holds another model"):
        make_trainer("base", overwrite_output_dir=True)
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(ValueError, match="is not a folder"):
        make_trainer("file/run")


def test_overwrite_output_dir_starts_a_new_run(make_trainer: TrainerFactory) -> None:
    trainer = make_trainer("run", save_steps=2)
    trainer.train()
    trainer.save_model()
    again = make_trainer("run", overwrite_output_dir=True, max_steps=1, seed=1)
    again.train()
    again.save_model()
    assert {path.name for path in again.output_dir.iterdir()} == ADAPTER | {"logs"}
    assert len(read_csv(again.output_dir)) == 1
    reloaded = RobustnessTokenModel.from_pretrained(
        again.output_dir, base_model=again.model.unload(), ignore_base_mismatch=True
    )
    assert reloaded.config.training is not None
    assert reloaded.config.training["seed"] == 1


def test_a_new_run_leaves_what_others_put_into_its_folder(make_trainer: TrainerFactory) -> None:
    trainer = make_trainer("run")
    names = ("evaluation.json", "evaluation.md", "report.html", "figures/accuracy_by_eps.png", "logs/tmp1.part")
    files = {trainer.output_dir / name: name for name in (*names, "notes.txt")}
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    trainer.train()
    trainer.save_model()
    make_trainer("run", overwrite_output_dir=True, seed=1).train()
    assert {path: path.read_text() for path in files} == files


# Divergence


class _NotANumberFrom:
    """Makes the base's features NaN from an optimiser step on, whatever the tokens are."""

    def __init__(self, step: int) -> None:
        self.step, self.now = step, 0

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        if self.now >= self.step:
            output.last_hidden_state = output.last_hidden_state * torch.nan
        return output


@pytest.mark.parametrize("attack", [PAPER, PGD], ids=["paper", "pgd"])
@pytest.mark.parametrize("through", ["base", "tokens"])
def test_nan_stops_says_where_and_keeps_the_last_good_tokens(
    make_trainer: TrainerFactory, monkeypatch: pytest.MonkeyPatch, attack: dict[str, Any], through: str
) -> None:
    tokens = trained_tokens(make_trainer("good", max_steps=2, attack_through=through, **attack))

    trainer = make_trainer("bad", max_steps=5, attack_through=through, **attack)
    hook = _NotANumberFrom(step=2)
    handle = trainer.model.get_base_model().register_forward_hook(hook)
    real = TrainingStep.accumulate_gradient

    def follow(*args: Any, step: int, **kwargs: Any) -> dict[str, float]:
        hook.now = step
        return real(*args, step=step, **kwargs)

    monkeypatch.setattr(TrainingStep, "accumulate_gradient", follow)
    with pytest.raises(FloatingPointError, match=r"step 3.*tokens after step 2"):
        trainer.train()
    handle.remove()

    assert torch.equal(trainer.model.robustness_tokens, tokens)
    assert trainer.model.robustness_tokens.grad is None
    assert not trainer.model.training
    assert [row["step"] for row in read_csv(trainer.output_dir)] == [1, 2]
    base = trainer.model.unload()
    saved = RobustnessTokenModel.from_pretrained(trainer.output_dir, base_model=base)
    assert torch.equal(saved.robustness_tokens, tokens)
    assert saved.config.training is not None
    assert saved.config.training["num_steps_done"] == 2


def test_tokens_that_break_the_features_are_not_kept(make_trainer: TrainerFactory) -> None:
    tokens = make_trainer("start").model.robustness_tokens.detach().clone()
    trainer = make_trainer(learning_rate=1e30)  # one step leaves finite tokens that overflow inside the base
    with pytest.raises(FloatingPointError, match=r"step 2.*as they were before training"):
        trainer.train()
    assert torch.equal(trainer.model.robustness_tokens, tokens)
    assert not (trainer.output_dir / "model.safetensors").exists()


def test_tokens_that_the_last_step_breaks_are_not_kept(make_trainer: TrainerFactory) -> None:
    tokens = make_trainer("start").model.robustness_tokens.detach().clone()
    trainer = make_trainer(max_steps=1, save_steps=1, learning_rate=1e30)
    with pytest.raises(FloatingPointError, match=r"step 1.*as they were before training"):
        trainer.train()
    assert torch.equal(trainer.model.robustness_tokens, tokens)
    assert list_checkpoints(trainer.output_dir) == []
    assert not (trainer.output_dir / "model.safetensors").exists()


@pytest.fixture
def break_in_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """`break_in_step(n)`: the n-th step leaves finite tokens that overflow inside the base."""

    def arm(number: int) -> None:
        real = trainer_module.RobustnessTokenTrainer._step

        def step(self: RobustnessTokenTrainer, *args: Any) -> dict[str, float]:
            metrics = real(self, *args)
            if self.state.global_step + 1 == number:
                self.model.robustness_tokens.data.fill_(1e30)
            return metrics

        monkeypatch.setattr(trainer_module.RobustnessTokenTrainer, "_step", step)

    return arm


def test_tokens_of_the_step_before_are_kept_where_the_last_one_breaks(
    make_trainer: TrainerFactory, break_in_step: Callable[[int], None]
) -> None:
    tokens = trained_tokens(make_trainer("good", max_steps=2))
    trainer = make_trainer("bad", max_steps=3)
    break_in_step(3)
    with pytest.raises(FloatingPointError, match=r"step 3.*tokens after step 2"):
        trainer.train()
    assert torch.equal(trainer.model.robustness_tokens, tokens)
    assert (trainer.output_dir / "model.safetensors").exists()


def test_no_checkpoint_holds_broken_tokens(make_trainer: TrainerFactory) -> None:
    trainer = make_trainer(max_steps=3, save_steps=1, save_total_limit=1, learning_rate=1e30)
    with pytest.raises(FloatingPointError, match=r"step 1.*as they were before training"):
        trainer.train()
    assert list_checkpoints(trainer.output_dir) == []


def test_broken_tokens_replace_no_good_checkpoint(
    make_trainer: TrainerFactory, monkeypatch: pytest.MonkeyPatch, break_in_step: Callable[[int], None]
) -> None:
    settings: dict[str, Any] = {"save_steps": 1, "save_total_limit": 1}
    tokens = trained_tokens(make_trainer("good"))
    broken = make_trainer(**settings)
    break_in_step(2)
    with pytest.raises(FloatingPointError, match=r"step 2.*tokens after step 1"):
        broken.train()
    assert [step for step, _ in list_checkpoints(broken.output_dir)] == [1]
    monkeypatch.undo()
    assert torch.equal(trained_tokens(make_trainer(resume_from_checkpoint=True, **settings)), tokens)


@pytest.mark.parametrize(("save_steps", "looks"), [(None, [4]), (1, [1, 2, 3, 4]), (3, [3, 4])])
def test_tokens_are_looked_at_once_for_a_save_and_at_the_end(
    make_trainer: TrainerFactory, monkeypatch: pytest.MonkeyPatch, save_steps: int | None, looks: list[int]
) -> None:
    trainer, found = make_trainer(save_steps=save_steps), list[int]()
    real = LastGoodTokens.are_broken

    def look(self: LastGoodTokens, *args: Any, **kwargs: Any) -> bool:
        found.append(trainer.state.global_step)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(LastGoodTokens, "are_broken", look)
    trainer.train()
    assert found == looks


def test_broken_tokens_of_a_checkpoint_are_not_said_to_be_good(make_trainer: TrainerFactory) -> None:
    trainer = make_trainer(max_steps=1, save_steps=1)
    trainer.train()
    path = trainer.output_dir / "checkpoint-1" / TENSORS_FILE
    tensors = load_file(path)
    tensors["robustness_tokens"].fill_(1e30)
    save_file(tensors, path)
    write_digest(path.parent)
    with pytest.raises(FloatingPointError, match=r"the initial ones are broken too.*earlier checkpoint"):
        make_trainer(max_steps=3, resume_from_checkpoint=True).train()
    assert not (trainer.output_dir / "model.safetensors").exists()


def test_infinite_tokens_are_not_kept(make_trainer: TrainerFactory) -> None:
    trainer = make_trainer(max_steps=1, learning_rate=1e37)
    with torch.no_grad():
        trainer.model.robustness_tokens.copy_(1e38 * trainer.model.robustness_tokens.sign())
    before = trainer.model.robustness_tokens.detach().clone()
    with pytest.raises(FloatingPointError):
        trainer.train()
    assert torch.equal(trainer.model.robustness_tokens, before)


# The attack


def attacked(trainer: RobustnessTokenTrainer, *, through_tokens: bool) -> Tensor:
    images = torch.stack([item["images"] for item in random_images(4)])
    step = trainer.training_step
    target = step.base_outputs(trainer.normalizer(images))
    return step.attack(images, target, step=0, index=torch.arange(4), through_tokens=through_tokens)


@pytest.mark.parametrize("attack", [PAPER, PGD], ids=["paper", "pgd"])
@pytest.mark.parametrize("through_tokens", [False, True])
def test_the_attack_depends_on_the_tokens_only_where_it_goes_through_them(
    make_trainer: TrainerFactory, attack: dict[str, Any], through_tokens: bool
) -> None:
    trainer = make_trainer(**attack)
    before = attacked(trainer, through_tokens=through_tokens)
    assert torch.equal(before, attacked(trainer, through_tokens=through_tokens))
    with torch.no_grad():
        trainer.model.robustness_tokens.normal_()
    assert torch.equal(before, attacked(trainer, through_tokens=through_tokens)) != through_tokens
    assert trainer.model.injector.enabled
    assert trainer.model.robustness_tokens.grad is None


@pytest.mark.parametrize(("through", "expected"), [("base", [False]), ("tokens", [True]), ("both", [False, True])])
def test_attack_through_chooses_whom_the_training_attacks(
    make_trainer: TrainerFactory, monkeypatch: pytest.MonkeyPatch, through: str, expected: list[bool]
) -> None:
    trainer = make_trainer(max_steps=2, attack_through=through)
    injector, real = trainer.model.injector, step_module.pgd_attack
    tokens_active: list[bool] = []

    def watched(objective: Callable[[Tensor], Tensor], images: Tensor, **kwargs: Any) -> Tensor:
        tokens_active.append(injector.enabled)
        return real(objective, images, **kwargs)

    monkeypatch.setattr(step_module, "pgd_attack", watched)
    trainer.train()
    assert tokens_active == 2 * expected


def test_attacked_images_of_a_whole_run_do_not_depend_on_the_tokens(
    make_trainer: TrainerFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, runs = TrainingStep.attack, []
    for learning_rate in (1e-6, 0.5):
        seen: list[Tensor] = []

        def watched(*args: Any, seen: list[Tensor] = seen, **kwargs: Any) -> Tensor:
            seen.append(real(*args, **kwargs))
            return seen[-1]

        monkeypatch.setattr(TrainingStep, "attack", watched)
        make_trainer(f"run{learning_rate}", learning_rate=learning_rate).train()
        runs.append(torch.stack(seen))
    assert torch.equal(*runs)


def test_pgd_stays_in_its_budget(make_trainer: TrainerFactory) -> None:
    trainer = make_trainer(num_attack_steps=5)
    images = torch.stack([item["images"] for item in random_images(4)])
    difference = (trainer.normalizer.inverse(attacked(trainer, through_tokens=False)) - images).abs().max()
    assert difference.item() == pytest.approx(16 / 255, abs=1e-5)


def test_every_step_takes_the_fewest_forwards(make_trainer: TrainerFactory) -> None:
    trainer = make_trainer(max_steps=1, num_attack_steps=3)
    sizes: list[int] = []
    trainer.model.get_base_model().register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(len(kwargs["pixel_values"])), with_kwargs=True
    )
    trainer.train()
    # The target; the clean images; three attack steps; the attacked images; the baseline.
    in_a_step = [4] * 7
    assert sizes == [*in_a_step, 4], "and once, at the end of the run, clean images with the tokens that are kept"


def test_clean_images_go_through_once_for_all_attacks(make_trainer: TrainerFactory) -> None:
    trainer = make_trainer(max_steps=1, num_attack_steps=3, attack_through="both")
    with_tokens: list[bool] = []
    trainer.model.get_base_model().register_forward_pre_hook(
        lambda *_: with_tokens.append(trainer.model.injector.enabled)
    )
    trainer.train()
    # The target; the clean images; twice three of an attack and the attacked images, the baseline of the attack on the
    # base; the end of the run.
    assert with_tokens == [False, True, *[False] * 3, True, False, *[True] * 3, True, True]


# Precision


@pytest.fixture
def accelerator_state() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_bf16_trains_beside_fp32_in_one_process(make_trainer: TrainerFactory) -> None:
    full, half = make_trainer("full", max_steps=8), make_trainer("half", max_steps=8, mixed_precision="bf16")
    layer_dtypes: set[torch.dtype] = set()
    linear = next(module for module in half.model.modules() if isinstance(module, nn.Linear))
    linear.register_forward_hook(lambda module, args, output: layer_dtypes.add(output.dtype))
    tokens, half_tokens = trained_tokens(full), trained_tokens(half)
    assert layer_dtypes == {torch.bfloat16}
    assert half_tokens.dtype == torch.float32
    assert not torch.equal(tokens, half_tokens)
    for row, expected in zip(half.log_history, full.log_history, strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], abs=0.05)


def test_another_precision_of_accelerate_is_an_error(make_trainer: TrainerFactory, accelerator_state: None) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    Accelerator(mixed_precision="bf16", cpu=True)
    with pytest.raises(ValueError, match="mixed_precision='bf16', the arguments say 'no'"):
        make_trainer()
    assert make_trainer(mixed_precision="bf16").train().global_step == 4


# Data


def test_pictures_and_ready_images_give_the_same_tokens(make_trainer: TrainerFactory) -> None:
    ready = trained_tokens(make_trainer("ready", image_size=None))
    squashed = trained_tokens(make_trainer("pictures", pictures(8), image_size=SIDE))
    assert torch.equal(ready, squashed)


def test_a_stream_gives_the_same_tokens_again(make_trainer: TrainerFactory) -> None:
    stream = pictures(8).to_iterable_dataset(num_shards=2)
    trainer = make_trainer("stream", stream, image_size=SIDE, max_steps=5)
    trainer.train()
    assert [row["step"] for row in trainer.log_history] == [1, 2, 3, 4, 5]
    assert torch.equal(
        trainer.model.robustness_tokens,
        trained_tokens(make_trainer("again", stream, image_size=SIDE, max_steps=5)),
    )


def test_a_stream_is_shuffled_by_the_seed_in_another_order_every_epoch(make_trainer: TrainerFactory) -> None:
    stream = pictures(8).to_iterable_dataset()

    def order(epoch: int, **kwargs: Any) -> list[float]:
        items: Any = make_trainer("stream", stream, image_size=SIDE, **kwargs).train_dataset
        items.set_epoch(epoch)
        return [item["images"].sum().item() for item in items]

    stored = [item["images"].sum().item() for item in random_images(8)]
    first = order(0)
    assert sorted(first) == pytest.approx(sorted(stored))
    assert first == order(0)
    assert first != pytest.approx(stored)
    assert first != order(1)
    assert first != order(0, seed=1)
    assert order(0, shuffle_buffer_size=1) == pytest.approx(stored)


@pytest.mark.parametrize("labels", [{"fine": [0, 1] * 4, "coarse": [0] * 8}, {"label": [None, 1] * 4}])
def test_labels_are_of_no_concern(make_trainer: TrainerFactory, labels: dict[str, list[int | None]]) -> None:
    table = pictures(8)
    for name, values in labels.items():
        table = table.add_column(name, values).cast_column(name, datasets.ClassLabel(names=["a", "b"]))
    expected = trained_tokens(make_trainer("plain", pictures(8), image_size=SIDE))
    assert torch.equal(trained_tokens(make_trainer("labelled", table, image_size=SIDE)), expected)


def test_a_stream_can_not_be_resumed(make_trainer: TrainerFactory) -> None:
    with pytest.raises(ValueError, match="stream can't be resumed"):
        make_trainer("run", pictures(8).to_iterable_dataset(), resume_from_checkpoint=True)


def test_ready_images_are_whole(make_trainer: TrainerFactory) -> None:
    """A broken picture is skipped and counted; a ready item without an image is an error in the dataset."""
    dataset = [*random_images(3), {"broken_image": BrokenImage(3, None, "cut")}]
    with pytest.raises(ValueError, match=r"dataset\[3\] must be a dict with 'images', got keys \['broken_image'\]"):
        make_trainer("run", dataset).train()


def test_a_dataset_without_an_image_column_lists_its_columns(make_trainer: TrainerFactory) -> None:
    table = datasets.Dataset.from_dict({"text": ["a"], "score": [1.0]})
    with pytest.raises(ValueError, match=r"'text'.*'score'"):
        make_trainer("run", table)


@pytest.mark.parametrize(
    ("dataset", "kwargs", "named"),
    [
        (datasets.DatasetDict({"train": pictures(2), "test": pictures(2)}), {}, r"splits \['test', 'train'\]"),
        ([], {}, "no rows"),
        (iter(random_images(2)), {}, "train_dataset must be a datasets.Dataset"),
        (random_images(2), {"image_size": 8}, "image_size"),
        (random_images(2), {"image_column_name": "image"}, "image_column_name"),
        (pictures(2), {"image_column_name": "photo"}, "photo.*'image'"),
    ],
    ids=["splits", "empty", "iterator", "ready size", "ready column", "wrong column"],
)
def test_data_that_can_not_be_trained_on_is_refused(
    make_trainer: TrainerFactory, dataset: Any, kwargs: dict[str, Any], named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        make_trainer("run", dataset, **kwargs)


@pytest.mark.parametrize("factor", [2.0, -1.0, math.nan])
def test_images_outside_0_1_are_refused(make_trainer: TrainerFactory, factor: float) -> None:
    images = [{"images": item["images"] * factor} for item in random_images(4)]
    with pytest.raises(ValueError, match=r"must be float in \[0, 1\]"):
        make_trainer("run", images).train()


def test_broken_images_are_skipped_up_to_a_limit(
    make_trainer: TrainerFactory, caplog: pytest.LogCaptureFixture
) -> None:
    table = pictures(8, broken=(1, 6))
    assert make_trainer("run", table, max_broken_images=2).train().global_step == 4
    assert sum("Skipped a broken image" in record.message for record in caplog.records) == 2
    with pytest.raises(ValueError, match="max_broken_images=1"):
        make_trainer("strict", table, max_broken_images=1).train()


def test_a_batch_of_broken_images_is_passed_over(make_trainer: TrainerFactory) -> None:
    trainer = make_trainer("run", pictures(4, broken=(0, 2)), per_device_train_batch_size=1, max_steps=6)
    trainer.train()
    assert [row["step"] for row in trainer.log_history] == [1, 2, 3, 4, 5, 6]
    with pytest.raises(ValueError, match="no readable image"):
        make_trainer("none", pictures(2, broken=(0, 1))).train()


class OneOfTwoProcesses(Accelerator):
    """Simulates a second process that has no image in the steps `without`."""

    def __init__(self, without: set[int]) -> None:
        super().__init__()
        self.without, self.asked = without, -1

    @property
    def num_processes(self) -> int:
        return 2

    def reduce(self, tensor: Tensor, reduction: str = "sum", scale: float = 1.0) -> Tensor:
        assert reduction == "sum"
        self.asked += 1
        return tensor + float(self.asked in self.without)


def test_a_step_without_images_on_one_process_is_passed_over_by_all(make_trainer: TrainerFactory) -> None:
    # Five steps an epoch: the third is broken here, the first on the other process.
    table = pictures(5, broken=(2,))
    trainer = make_trainer("run", table, per_device_train_batch_size=1, image_size=SIDE)
    loader = dataset_module.build_dataloader(trainer.train_dataset, batch_size=1, shuffle=False)
    loader.set_epoch = lambda epoch: None  # as that of accelerate has
    accelerator = OneOfTwoProcesses(without={0})
    steps = dataset_module.iterate_steps(loader, args=trainer.args, accelerator=accelerator)
    found = [next(steps) for _ in range(7)]
    assert [batches[0]["index"].item() for batches, _ in found] == [1, 3, 4, 0, 1, 3, 4]
    assert [position for _, position in found] == [(0, 2), (0, 4), (0, 5), (1, 1), (1, 2), (1, 4), (1, 5)]
    assert accelerator.asked == 9  # once a step on every process, or they would not meet

    # An epoch without a step is not the end: in another order both may have an image.
    (batch,), position = next(
        dataset_module.iterate_steps(loader, args=trainer.args, accelerator=OneOfTwoProcesses(without=set(range(5))))
    )
    assert (batch["index"].item(), position) == (0, (1, 1))
    nowhere = OneOfTwoProcesses(without=set(range(10_000)))
    with pytest.raises(ValueError, match="no readable image to train on on each of 2 processes"):
        next(dataset_module.iterate_steps(loader, args=trainer.args, accelerator=nowhere))


@pytest.mark.parametrize(
    ("dataset", "kwargs"),
    [(pictures(2), {"image_size": 4}), (pictures(2), {"image_size": 20}), ([{"images": torch.zeros(3, 16, 12)}], {})],
    ids=["smaller", "no multiple", "ready"],
)
def test_images_that_are_no_whole_patches_are_refused(
    make_trainer: TrainerFactory, dataset: Any, kwargs: dict[str, Any]
) -> None:
    side = "16 x 12" if not kwargs else f"{kwargs['image_size']} x {kwargs['image_size']}"
    with pytest.raises(ValueError, match=rf"images have {side} pixels.* patches of Dinov2Model 8 x 8"):
        make_trainer("run", dataset, **kwargs)


def test_the_size_that_a_base_was_made_for_need_be_no_multiple(make_base: BaseFactory) -> None:
    check_patches(make_base("dinov2", image_size=20), (20, 20))
    check_patches(make_base("dinov2"), (16, 24))
    with pytest.raises(ValueError, match="20 x 20"):
        check_patches(make_base("dinov2"), (20, 20))


def test_fewer_images_than_a_batch(make_trainer: TrainerFactory) -> None:
    assert make_trainer("run", random_images(3)).train().global_step == 4


# What a run tells


def test_train_output_and_log(make_trainer: TrainerFactory) -> None:
    trainer = make_trainer(logging_steps=2, max_steps=5, lr_scheduler_type="linear")
    result = trainer.train()
    assert isinstance(result, TrainOutput)
    rows = read_csv(trainer.output_dir)
    assert rows == trainer.log_history
    assert [row["step"] for row in rows] == [2, 4, 5]
    assert all(tuple(row) == LOG_COLUMNS for row in rows)
    assert result.global_step == 5
    assert result.metrics == rows[-1]
    # The rate that the step was made with: linear from the first, to zero after the last.
    assert [row["learning_rate"] for row in rows] == pytest.approx([0.02 * 4 / 5, 0.02 * 2 / 5, 0.02 * 1 / 5])
    for row in rows:
        assert row["loss"] == pytest.approx(-(row["invariance_cosine"] + row["adversarial_cosine"]))

    every = make_trainer("every", max_steps=5, lr_scheduler_type="linear")
    expected = every.train()
    assert expected.training_loss == pytest.approx(sum(row["loss"] for row in every.log_history) / 5)
    assert expected.training_loss == result.training_loss


def test_the_baseline_is_the_cosine_without_tokens(make_trainer: TrainerFactory) -> None:
    runs = [make_trainer(f"run{seed}", num_attack_steps=3) for seed in range(2)]
    with torch.no_grad():
        runs[1].model.robustness_tokens.normal_()
    for run in runs:
        run.train()
    baselines = [[row["baseline_cosine"] for row in run.log_history] for run in runs]
    assert baselines[0] == baselines[1]
    assert runs[0].log_history[0]["adversarial_cosine"] != runs[1].log_history[0]["adversarial_cosine"]


def test_the_progress_bar_shows_cosines_and_baseline(
    make_trainer: TrainerFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = make_trainer(disable_tqdm=False)
    trainer.train()
    shown = capsys.readouterr().err
    last = trainer.log_history[-1]
    assert "4/4" in shown
    assert (
        f"cosine clean {last['invariance_cosine']:.3f}, attacked {last['adversarial_cosine']:.3f} "
        f"(without tokens {last['baseline_cosine']:.3f})"
    ) in shown


def test_the_recipe_is_in_the_config_and_survives_saving(make_trainer: TrainerFactory) -> None:
    trainer = make_trainer(attack_through="both", max_grad_norm=1.0)
    trainer.train()
    trainer.save_model()
    stored = json.loads((trainer.output_dir / "config.json").read_text(encoding="utf-8"))["training"]
    reloaded = RobustnessTokenModel.from_pretrained(trainer.output_dir, base_model=trainer.model.unload())
    assert reloaded.config.training == stored
    assert stored["attack_through"] == "both"
    assert stored["eps"] == 16 / 255
    assert stored["max_grad_norm"] == 1.0
    assert stored["num_steps_done"] == stored["max_steps"] == 4
    assert stored["num_processes"] == 1
    assert not {"output_dir", "disable_tqdm", "save_steps"} & set(stored)


def test_the_recipe_says_what_was_left_to_defaults(make_trainer: TrainerFactory) -> None:
    settings: dict[str, Any] = {"max_steps": 1, "num_attack_steps": 5}
    table = pictures(8)
    table.info.dataset_name, table.info.config_name = "pets", "small"
    whole, ready = make_trainer("table", table, **settings), make_trainer("ready", **settings)
    streamed = table.to_iterable_dataset()
    streamed.info.dataset_name, streamed.info.config_name = "pets", "small"  # as load_dataset does
    stream = make_trainer("stream", streamed, resize="processor", **settings)
    for trainer, dataset in (
        (whole, {"num_images": 8, "name": "pets", "config": "small"}),
        (ready, {"num_images": 8}),
        (stream, {"name": "pets", "config": "small"}),
    ):
        trainer.train()
        recipe = trainer.model.config.training
        assert recipe is not None
        assert recipe["image_size"] == SIDE
        assert recipe["step_size"] == pytest.approx(8 / 255)
        assert recipe["dataset"] == dataset
        assert "previous" not in recipe


def test_max_grad_norm_clips(make_trainer: TrainerFactory) -> None:
    free, clipped = make_trainer("free"), make_trainer("clipped", max_grad_norm=1e-12)
    # Adam divides by the gradient's size, all but its epsilon of 1e-8: so small a gradient hardly moves.
    start = free.model.robustness_tokens.detach().clone()
    assert (trained_tokens(clipped) - start).abs().max() < 1e-4
    assert (trained_tokens(free) - start).abs().max() > 1e-2


def test_an_accumulation_of_the_launcher_scales_no_gradient(
    make_trainer: TrainerFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = trained_tokens(make_trainer("plain", max_grad_norm=0.01))
    # As `accelerate launch` sets it from its own config.
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1000")
    assert torch.equal(trained_tokens(make_trainer("launched", max_grad_norm=0.01)), expected)


def test_an_adapter_can_be_trained_further(make_trainer: TrainerFactory, tmp_path: Path) -> None:
    first = make_trainer("first")
    tokens = trained_tokens(first)
    first.save_model()
    model = RobustnessTokenModel.from_pretrained(first.output_dir, base_model=first.model.unload())
    args = RobustnessTokenTrainingArguments(output_dir=str(tmp_path / "second"), max_steps=2, disable_tqdm=True, **PGD)
    RobustnessTokenTrainer(model, args, random_images(8)).train()
    assert not torch.equal(model.robustness_tokens, tokens)
    torch.testing.assert_close(model.robustness_tokens.detach(), tokens, rtol=0, atol=0.01)


def test_the_recipe_of_earlier_training_is_kept(make_trainer: TrainerFactory) -> None:
    trainer = make_trainer(max_steps=2, save_steps=1, overwrite_output_dir=True)
    trainer.model.config.training = {"source": "elsewhere"}
    trainer.train()
    assert trainer.model.config.training["previous"] == {"source": "elsewhere"}
    first = trainer.model.config.training
    trainer.train()
    assert trainer.model.config.training["previous"] == first

    # A resumed run has no other history than the one that it goes on with.
    resumed = make_trainer(max_steps=3, save_steps=1, resume_from_checkpoint=True)
    resumed.train()
    assert resumed.model.config.training is not None
    assert resumed.model.config.training["previous"] == first


# What can be trained


@pytest.mark.parametrize(
    ("break_it", "named"),
    [
        (lambda model: model.injector.set_enabled(False), "outside of disable_adapter"),
        (lambda model: model.to(torch.bfloat16), r"torch.bfloat16.*model\.injector\.float\(\)"),
        (lambda model: model.requires_grad_(False), "tokens are frozen"),
        (lambda model: model.requires_grad_(True), r"parameters of the base are trainable .*requires_grad_\(False\)"),
    ],
    ids=["off", "bfloat16", "frozen", "base too"],
)
def test_a_model_that_would_be_trained_wrongly_is_refused(
    make_trainer: TrainerFactory, break_it: Callable[[Any], Any], named: str
) -> None:
    trainer = make_trainer()
    break_it(trainer.model)
    with pytest.raises(ValueError, match=named):
        trainer.train()
    assert not trainer.output_dir.exists()


def test_the_advice_for_such_models_helps(make_trainer: TrainerFactory) -> None:
    trainer = make_trainer(max_steps=1)
    trainer.model.requires_grad_(True).bfloat16()
    trainer.model.injector.float()
    trainer.model.requires_grad_(False)
    trainer.model.robustness_tokens.requires_grad_(True)
    assert trainer.train().global_step == 1


def test_a_model_without_tokens_is_refused(make_base: BaseFactory, tmp_path: Path) -> None:
    args = RobustnessTokenTrainingArguments(output_dir=str(tmp_path / "run"))
    with pytest.raises(ValueError, match=r"Dinov2Model, which has no tokens.*RobustnessTokenModel\.from_base"):
        RobustnessTokenTrainer(make_base("dinov2"), args, random_images(8))
