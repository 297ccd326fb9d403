"""Pairs of clean and attacked images: made once, stored in 8 bits, and trained on instead of attacking."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from robustness_tokens.attacks.objectives import cosine_similarity
from robustness_tokens.cli.parsing import DataArguments, load_train_dataset
from robustness_tokens.data import prepare as prepare_module
from robustness_tokens.data.adversarial_pairs import (
    ATTACK_ARGUMENTS,
    INFO_FILE,
    AdversarialPairs,
    PairsInfo,
    load_adversarial_pairs,
    missing_shards,
    round_to_budget,
    to_images,
    to_pixels,
)
from robustness_tokens.data.image_datasets import build_dataloader, choose_rows
from robustness_tokens.data.loading import load_image_dataset
from robustness_tokens.data.preprocessing import Normalizer
from robustness_tokens.hub.pushing import UNFINISHED_FILE, push_adversarial_pairs
from robustness_tokens.models.modeling import RobustnessTokenModel
from robustness_tokens.training.arguments import RobustnessTokenTrainingArguments
from robustness_tokens.training.dataset import take_pairs
from robustness_tokens.training.make_pairs import make_adversarial_pairs, max_pixel_difference
from robustness_tokens.training.step import TrainingStep
from robustness_tokens.training.trainer import RobustnessTokenTrainer
from tests.support.hub_client import ClientError, HubClient
from tests.support.hub_state import Hub


SIDE, NUM_IMAGES, BATCH = 16, 10, 4
PGD: dict[str, Any] = {"attack": "pgd", "eps": 4 / 255, "num_attack_steps": 2}
PAPER: dict[str, Any] = {"attack": "paper", "num_attack_steps": 3}

BaseFactory = Callable[..., Any]
Pixels = np.ndarray[Any, np.dtype[np.uint8]]


def random_pixels() -> Pixels:
    return np.random.default_rng(11).integers(0, 256, (NUM_IMAGES, SIDE, SIDE, 3), dtype=np.uint8)


def with_another_last_image() -> Pixels:
    pixels = random_pixels()
    pixels[-1] = 255 - pixels[-1]
    return pixels


def pictures(pixels: Pixels | None = None) -> datasets.Dataset:
    images = [Image.fromarray(one) for one in (random_pixels() if pixels is None else pixels)]
    return datasets.Dataset.from_dict({"image": images}, features=datasets.Features({"image": datasets.Image()}))


def new_model(base: Any, **kwargs: Any) -> RobustnessTokenModel:
    torch.manual_seed(3)
    return RobustnessTokenModel.from_base(base, num_robustness_tokens=2, **kwargs)


def arguments(output_dir: Path, **kwargs: Any) -> RobustnessTokenTrainingArguments:
    settings = {"per_device_train_batch_size": BATCH, "max_steps": 3, "learning_rate": 0.02, "image_size": SIDE}
    return RobustnessTokenTrainingArguments(output_dir=str(output_dir), **{**settings, "disable_tqdm": True, **kwargs})


def stored_pixels(pairs: AdversarialPairs, column: str) -> Pixels:
    return np.stack([np.frombuffer(row[column], np.uint8).reshape(SIDE, SIDE, 3) for row in pairs.stored])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of ten pairs of the tiny DINOv2 in three shards, by attack. Read only."""
    from tests.support.bases import build_base

    folders = {}
    for name, attack in (("pgd", PGD), ("paper", PAPER)):
        folders[name] = tmp_path_factory.mktemp(name)
        model = new_model(build_base("dinov2"))
        make_adversarial_pairs(model, arguments(folders[name], **attack), pictures(), images_per_shard=4)
    return folders


@pytest.fixture
def model(make_base: BaseFactory) -> RobustnessTokenModel:
    return new_model(make_base("dinov2"))


# What is stored


def test_the_folder_holds_whole_shards_and_their_description(made: dict[str, Path]) -> None:
    assert {path.name for path in made["pgd"].iterdir()} == {
        *(f"shard-0000{shard}-of-00003.arrow" for shard in range(3)),
        *(INFO_FILE, "state.json", "dataset_info.json"),
    }
    info = json.loads((made["pgd"] / INFO_FILE).read_text(encoding="utf-8"))
    assert info["attack"] == {
        "attack": "pgd",
        "eps": 4 / 255,
        "step_size": pytest.approx(5 / 255),
        "num_attack_steps": 2,
        "objective": "cosine",
    }
    assert (info["image_size"], info["num_images"], info["step"]) == ([SIDE, SIDE], NUM_IMAGES, 0)
    assert info["max_pixel_difference"] == 4


def test_datasets_reads_the_folder(made: dict[str, Path]) -> None:
    dataset = datasets.load_from_disk(str(made["pgd"]))
    assert isinstance(dataset, datasets.Dataset)
    assert dataset["index"][:] == list(range(NUM_IMAGES))
    assert dataset.cache_files, "memory-mapped"


def test_the_clean_images_are_those_of_the_dataset(made: dict[str, Path]) -> None:
    for folder in made.values():
        assert np.array_equal(stored_pixels(load_adversarial_pairs(folder), "image"), random_pixels())


@pytest.mark.parametrize(("attack", "levels"), [("pgd", 4), ("paper", 2)])
def test_the_budget_is_kept_and_used(made: dict[str, Path], attack: str, levels: int) -> None:
    pairs = load_adversarial_pairs(made[attack])
    clean, adversarial = (stored_pixels(pairs, column) for column in ("image", "adversarial_image"))
    difference = np.abs(clean.astype(int) - adversarial)
    assert difference.max() == levels
    assert (difference.max(axis=(1, 2, 3)) > 0).all(), "every image was attacked"


@pytest.mark.parametrize("attack", ["pgd", "paper"])
def test_pairs_are_what_a_training_makes_in_its_first_step(
    made: dict[str, Path], model: RobustnessTokenModel, attack: str
) -> None:
    args = arguments(made[attack], **(PGD if attack == "pgd" else PAPER))
    normalizer = Normalizer(model.config.image_mean or (), model.config.image_std or ())
    images, index = to_images(random_pixels()[:BATCH]), torch.arange(BATCH)
    step = TrainingStep(model, args, normalizer)
    attacked = step.attack(images, step.base_outputs(normalizer(images)), step=0, index=index, through_tokens=False)
    pairs = load_adversarial_pairs(made[attack])
    expected = torch.stack([pairs[row]["adversarial_images"] for row in range(BATCH)])
    # The paper's images are on the grid as they come; pgd's are up to half a level off.
    tolerance = 0.5 / 255 + 1e-6 if attack == "pgd" else 1e-6
    assert (normalizer.inverse(attacked) - expected).abs().max() <= tolerance


def test_the_baseline_is_the_cosine_of_the_stored_images(made: dict[str, Path], model: RobustnessTokenModel) -> None:
    pairs = load_adversarial_pairs(made["pgd"])
    normalizer = Normalizer(model.config.image_mean or (), model.config.image_std or ())
    for row in (0, 9):
        features = [
            TrainingStep(model, arguments(made["pgd"], **PGD), normalizer).base_outputs(
                normalizer(pairs[row][key][None])
            )
            for key in ("images", "adversarial_images")
        ]
        cosine = cosine_similarity(*features, similarity_axis="token").mean().item()
        assert pairs[row]["baseline_cosine"] == pytest.approx(cosine, abs=1e-5)
        assert cosine < 1 - 1e-4


@pytest.mark.parametrize("changed", [{"seed": 1}, {"eps": 8 / 255}])
def test_the_pairs_follow_the_seed_and_the_attack(
    made: dict[str, Path], model: RobustnessTokenModel, tmp_path: Path, changed: dict[str, Any]
) -> None:
    other = make_adversarial_pairs(model, arguments(tmp_path, **{**PGD, **changed}), pictures())
    same = load_adversarial_pairs(made["pgd"])
    assert not np.array_equal(stored_pixels(other, "adversarial_image"), stored_pixels(same, "adversarial_image"))


def test_a_pgd_pair_depends_on_no_batch_shard_or_worker(
    made: dict[str, Path], model: RobustnessTokenModel, tmp_path: Path
) -> None:
    args = arguments(tmp_path, per_device_train_batch_size=3, dataloader_num_workers=1, **PGD)
    other = make_adversarial_pairs(model, args, pictures(), images_per_shard=7)
    difference = stored_pixels(other, "adversarial_image").astype(int) - stored_pixels(
        load_adversarial_pairs(made["pgd"]), "adversarial_image"
    )
    # A sign of a gradient next to zero may turn with the order of a sum.
    assert (difference != 0).mean() < 1e-3


def test_the_tokens_take_no_part(made: dict[str, Path], make_base: BaseFactory, tmp_path: Path) -> None:
    torch.manual_seed(99)
    model = RobustnessTokenModel.from_base(make_base("dinov2"), num_robustness_tokens=7, initializer_range=5.0)
    pairs = make_adversarial_pairs(model, arguments(tmp_path, **PGD), pictures(), images_per_shard=4)
    expected = stored_pixels(load_adversarial_pairs(made["pgd"]), "adversarial_image")
    assert np.array_equal(stored_pixels(pairs, "adversarial_image"), expected)


@pytest.mark.parametrize("clean", [0, 3, 128, 254, 255])
def test_rounding_is_undone_where_it_leaves_the_budget(clean: int) -> None:
    before = np.full((1, 2, 2, 3), clean, dtype=np.uint8)
    for offset in np.linspace(-6.5, 6.5, 53):
        adversarial = torch.full((1, 3, 2, 2), (clean + offset) / 255)
        rounded = round_to_budget(adversarial, before, 4).astype(int)
        assert np.abs(rounded - clean).max() <= 4
        wanted = np.clip(np.clip(clean + offset, 0, 255), clean - 4, clean + 4)
        assert np.abs(rounded - wanted).max() <= 0.5 + 1e-3


@pytest.mark.parametrize(
    ("attack", "image_std", "levels"),
    [
        ({"attack": "pgd", "eps": 1 / 255}, [0.2], 1),
        ({"attack": "pgd", "eps": 1.9 / 255}, [0.2], 1),
        *(({"attack": "pgd", "eps": level / 255}, [0.2], level) for level in (2, 3, 4, 8, 16)),
        ({"attack": "paper"}, [0.229, 0.224, 0.225], 2),
        ({"attack": "paper"}, [0.25, 0.25, 0.25], 3),  # as its last step cuts towards black, a level more
        ({"attack": "paper"}, [0.5, 0.5, 0.5], 5),
    ],
)
def test_the_budget_in_levels(attack: dict[str, Any], image_std: list[float], levels: int) -> None:
    assert max_pixel_difference(arguments(Path("x"), **attack), image_std) == levels


@pytest.mark.parametrize(
    ("attack", "image_std"), [({"attack": "pgd", "eps": 0.9 / 255}, [0.2]), ({"attack": "paper"}, [0.1, 0.3, 0.3])]
)
def test_what_eight_bits_cannot_hold_is_refused(attack: dict[str, Any], image_std: list[float]) -> None:
    with pytest.raises(ValueError, match="less than 1/255"):
        max_pixel_difference(arguments(Path("x"), **attack), image_std)


def test_pixels_and_images_are_inverse() -> None:
    pixels = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    assert np.array_equal(to_pixels(to_images(pixels)), pixels)


# Making them


def test_what_is_to_be_made_is_told_first(
    model: RobustnessTokenModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = arguments(tmp_path, **PGD, disable_tqdm=False)
    make_adversarial_pairs(model, args, pictures(), num_images=5, images_per_shard=2)
    size = 5 * (2 * 3 * SIDE * SIDE + 64)
    assert f"5 images of 16 x 16 pixels take {size:,} bytes in 3 shards" in capsys.readouterr().out
    assert len(load_adversarial_pairs(tmp_path)) == 5


def test_a_full_disk_is_refused_before_anything_is_attacked(
    model: RobustnessTokenModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=NUM_IMAGES * 1536))
    monkeypatch.setattr(TrainingStep, "attack", lambda *_, **__: pytest.fail("attacked"))
    with pytest.raises(ValueError, match="15,360 bytes free, the pairs need 16,000"):
        make_adversarial_pairs(model, arguments(tmp_path, **PGD), pictures())


def test_a_killed_run_goes_on_after_the_last_whole_shard(
    made: dict[str, Path], model: RobustnessTokenModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, indices = TrainingStep.attack, []

    def killed(*args: Any, index: Tensor, **kwargs: Any) -> Tensor:
        if 5 in index:
            raise KeyboardInterrupt
        return real(*args, index=index, **kwargs)

    def counted(*args: Any, index: Tensor, **kwargs: Any) -> Tensor:
        indices.extend(index.tolist())
        return real(*args, index=index, **kwargs)

    monkeypatch.setattr(TrainingStep, "attack", killed)
    with pytest.raises(KeyboardInterrupt):
        make_adversarial_pairs(model, arguments(tmp_path, **PGD), pictures(), images_per_shard=4)
    info = PairsInfo.from_dict(json.loads((tmp_path / INFO_FILE).read_text(encoding="utf-8")))
    assert missing_shards(tmp_path, info) == [1, 2]
    with pytest.raises(ValueError, match="1 of 3 shards"):
        load_adversarial_pairs(tmp_path)

    monkeypatch.setattr(TrainingStep, "attack", counted)
    pairs = make_adversarial_pairs(model, arguments(tmp_path, **PGD), pictures(), images_per_shard=4)
    assert indices == list(range(4, NUM_IMAGES))
    expected = stored_pixels(load_adversarial_pairs(made["pgd"]), "adversarial_image")
    assert np.array_equal(stored_pixels(pairs, "adversarial_image"), expected)


def test_fewer_images_are_a_random_choice_with_their_own_noise(
    made: dict[str, Path], model: RobustnessTokenModel, tmp_path: Path
) -> None:
    pairs = make_adversarial_pairs(model, arguments(tmp_path, **PGD), pictures(), num_images=6, images_per_shard=4)
    rows = pairs.stored["index"][:]
    assert rows == choose_rows(NUM_IMAGES, 6, seed=0)
    assert sorted(rows) != list(range(6)), "a folder that is sorted by class would give the first classes alone"
    assert np.array_equal(stored_pixels(pairs, "image"), random_pixels()[rows])
    everything = stored_pixels(load_adversarial_pairs(made["pgd"]), "adversarial_image")
    # A sign of a gradient next to zero may turn with the order of a sum.
    assert (stored_pixels(pairs, "adversarial_image") != everything[rows]).mean() < 1e-3


def test_a_killed_run_goes_on_with_the_same_choice(
    model: RobustnessTokenModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = list(choose_rows(NUM_IMAGES, 6, seed=0))
    real, indices = TrainingStep.attack, []

    def killed(*args: Any, index: Tensor, **kwargs: Any) -> Tensor:
        indices.append(index.tolist())
        if len(indices) == 2:
            raise KeyboardInterrupt
        return real(*args, index=index, **kwargs)

    monkeypatch.setattr(TrainingStep, "attack", killed)
    with pytest.raises(KeyboardInterrupt):
        make_adversarial_pairs(model, arguments(tmp_path, **PGD), pictures(), num_images=6, images_per_shard=4)
    pairs = make_adversarial_pairs(model, arguments(tmp_path, **PGD), pictures(), num_images=6, images_per_shard=4)
    assert indices == [rows[:4], rows[4:], rows[4:]]
    assert pairs.stored["index"][:] == rows


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"eps": 8 / 255}, "attack: "),
        ({"seed": 1}, "seed: 0 -> 1"),
        ({"dataset": pictures(random_pixels()[::-1].copy())}, "images_digest: "),
        ({"dataset": pictures(with_another_last_image())}, "images_digest: "),
        ({"images_per_shard": 5}, "images_per_shard: 4 -> 5"),
    ],
)
def test_pairs_made_otherwise_are_replaced_only_when_asked(
    made: dict[str, Path], model: RobustnessTokenModel, tmp_path: Path, changed: dict[str, Any], named: str
) -> None:
    folder = Path(shutil.copytree(made["pgd"], tmp_path / "pairs"))
    files = {path: path.read_bytes() for path in folder.iterdir()}
    changed = dict(changed)
    dataset, per_shard = changed.pop("dataset", pictures()), changed.pop("images_per_shard", 4)
    with pytest.raises(ValueError, match=named):
        make_adversarial_pairs(model, arguments(folder, **PGD | changed), dataset, images_per_shard=per_shard)
    assert {path: path.read_bytes() for path in folder.iterdir()} == files
    args = arguments(folder, **PGD | changed, overwrite_output_dir=True)
    pairs = make_adversarial_pairs(model, args, dataset, images_per_shard=per_shard)
    fresh = make_adversarial_pairs(
        model, arguments(tmp_path / "fresh", **PGD | changed), dataset, images_per_shard=per_shard
    )
    assert np.array_equal(stored_pixels(pairs, "adversarial_image"), stored_pixels(fresh, "adversarial_image"))


def test_a_folder_of_something_else_is_left_alone(model: RobustnessTokenModel, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work", encoding="utf-8")
    with pytest.raises(ValueError, match="holds files other than adversarial pairs"):
        make_adversarial_pairs(model, arguments(tmp_path, **PGD, overwrite_output_dir=True), pictures())
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_replacement_that_was_cut_short_can_be_made_again(
    made: dict[str, Path], model: RobustnessTokenModel, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(made["pgd"], tmp_path / "pairs"))
    (folder / INFO_FILE).unlink()
    (folder / ".shard-00000-of-00099.arrow.part").write_bytes(b"half")
    with pytest.raises(ValueError, match=f"no {INFO_FILE}.*overwrite_output_dir=True"):
        make_adversarial_pairs(model, arguments(folder, **PGD), pictures(), images_per_shard=5)
    args = arguments(folder, **PGD, overwrite_output_dir=True)
    assert len(make_adversarial_pairs(model, args, pictures(), images_per_shard=5)) == NUM_IMAGES
    assert {path.name for path in folder.iterdir()} == {
        *(f"shard-0000{shard}-of-00002.arrow" for shard in (0, 1)),
        *("state.json", "dataset_info.json", INFO_FILE),
    }


@pytest.mark.parametrize("through", ["tokens", "both"])
def test_an_attacker_who_sees_the_tokens_makes_no_pairs(
    model: RobustnessTokenModel, tmp_path: Path, through: str
) -> None:
    with pytest.raises(ValueError, match="attack_through"):
        make_adversarial_pairs(model, arguments(tmp_path, **PGD, attack_through=through), pictures())


def test_a_stream_is_refused(model: RobustnessTokenModel, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="without streaming"):
        make_adversarial_pairs(model, arguments(tmp_path, **PGD), pictures().to_iterable_dataset())


def test_broken_images_have_no_pair(model: RobustnessTokenModel, tmp_path: Path) -> None:
    rows = [
        {"bytes": b"no picture", "path": None} if row == 3 else image for row, image in enumerate(pictures()["image"])
    ]
    dataset = datasets.Dataset.from_dict({"image": rows}, features=datasets.Features({"image": datasets.Image()}))
    pairs = make_adversarial_pairs(model, arguments(tmp_path, **PGD), dataset, images_per_shard=4)
    assert [row["index"] for row in pairs.stored] == [row for row in range(NUM_IMAGES) if row != 3]


def test_features_that_are_not_finite_stop_it(model: RobustnessTokenModel, tmp_path: Path) -> None:
    with torch.no_grad():
        next(model.get_base_model().parameters()).fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="not finite"):
        make_adversarial_pairs(model, arguments(tmp_path, **PGD), pictures())


# Reading them


def test_workers_read_what_one_process_reads(made: dict[str, Path]) -> None:
    pairs = load_adversarial_pairs(made["pgd"])
    alone, workers = (
        list(build_dataloader(pairs, batch_size=4, shuffle=True, num_workers=workers)) for workers in (0, 2)
    )
    assert [len(batch["images"]) for batch in alone] == [4, 4, 2]
    for batch, other in zip(alone, workers, strict=True):
        for key in ("images", "adversarial_images", "baseline_cosine", "index"):
            assert torch.equal(batch[key], other[key])


def test_a_pair_over_its_budget_is_damage(made: dict[str, Path]) -> None:
    pairs = load_adversarial_pairs(made["pgd"])
    with_less = AdversarialPairs(pairs.stored, PairsInfo.from_dict({**vars(pairs.info), "max_pixel_difference": 3}))
    with pytest.raises(ValueError, match="differs by 4/255, more than the 3/255"):
        list(DataLoader(with_less, batch_size=None))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"schema_version": 4}, "reads up to 3"),
        ({"schema_version": "1"}, "whole number"),
        ({"extra": 1}, "unknown keys \\['extra'\\]"),
        ({"seed": ...}, "missing keys \\['seed'\\]"),
        ({"image_size": [16]}, "height and width"),
        ({"image_size": [16, 0]}, "at least 1"),
        ({"attack": {"attack": "pgd"}}, "attack has missing keys"),
        (
            {"attack": {**dict.fromkeys(ATTACK_ARGUMENTS, 1), "attack": "pgd", "eps": "8/255"}},
            "attack.eps must be a finite number, got '8/255'",
        ),
        ({"dataset": None}, "dataset must be a dictionary"),
        ({"base_model_fingerprint": {"float16": "1"}}, "must be 64 hexadecimal digits, got '1'"),
        ({"base_model_fingerprint": {"float16": 1}}, "must be a text"),
        ({"base_model": ["x"]}, "base_model must be a text"),
        ({"base_model_revision": 1}, "base_model_revision must be a text"),
        ({"feature_view": None}, "feature_view must be a text"),
        ({"image_mean": "x"}, "image_mean must be a list"),
        ({"image_std": [0.5, True, 0.5]}, r"image_std\[1\] must be a finite number, got True"),
        ({"seed": -1}, "seed must be a whole number of at least 0"),
        ({"step": "0"}, "step must be a whole number"),
        ({"mixed_precision": 16}, "mixed_precision must be a text"),
        ({"image_size": [16, 10**9]}, "height and width of at most 16,384"),
        ({"num_images": 10**9, "images_per_shard": 1}, "1,000,000,000 files, expected at most 99,999: raise images_"),
        ({"num_images": 10**9, "images_per_shard": 10**4}, "expected at most 99,999"),
    ],
)
def test_a_damaged_description_is_refused(
    made: dict[str, Path], tmp_path: Path, damage: dict[str, Any], message: str
) -> None:
    folder = Path(shutil.copytree(made["pgd"], tmp_path / "pairs"))
    values = {**json.loads((folder / INFO_FILE).read_text(encoding="utf-8")), **damage}
    kept = {name: value for name, value in values.items() if value is not ...}
    (folder / INFO_FILE).write_text(json.dumps(kept), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        load_adversarial_pairs(folder)


def test_a_folder_without_pairs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no adversarial pairs"):
        load_adversarial_pairs(tmp_path)


# Training on them


def train(model: RobustnessTokenModel, args: RobustnessTokenTrainingArguments, dataset: Any) -> RobustnessTokenTrainer:
    trainer = RobustnessTokenTrainer(model, args, dataset)
    trainer.train()
    return trainer


@pytest.mark.parametrize("attack", ["pgd", "paper"])
def test_the_trainer_takes_the_folder_and_attacks_nothing(
    made: dict[str, Path],
    model: RobustnessTokenModel,
    tmp_path: Path,
    attack: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(TrainingStep, "attack", lambda *_, **__: pytest.fail("attacked"))
    trainer = train(model, arguments(tmp_path / "run", max_steps=8, learning_rate=0.05), made[attack])
    recipe = model.config.training or {}
    info = load_adversarial_pairs(made[attack]).info
    assert {name: recipe[name] for name in info.attack} == info.attack
    assert recipe["dataset"]["adversarial_pairs"] == {
        "seed": 0,
        "step": 0,
        "batch_size": BATCH,
        "mixed_precision": "no",
        "digest": load_adversarial_pairs(made[attack]).digest(),
    }
    assert recipe["dataset"]["num_images"] == NUM_IMAGES
    first, last = trainer.log_history[0], trainer.log_history[-1]
    assert last["loss"] < first["loss"]


def test_the_first_step_is_that_of_a_training_which_attacks(
    make_base: BaseFactory, made: dict[str, Path], tmp_path: Path
) -> None:
    # The paper's images are on the 8-bit grid, so nothing is lost; one batch, so the attack's bounds are the same.
    images = pictures(random_pixels()[:BATCH])
    make_adversarial_pairs(new_model(make_base("dinov2")), arguments(tmp_path / "pairs", **PAPER), images)
    live = train(new_model(make_base("dinov2")), arguments(tmp_path / "live", max_steps=1, **PAPER), images)
    stored = train(new_model(make_base("dinov2")), arguments(tmp_path / "run", max_steps=1), tmp_path / "pairs")
    torch.testing.assert_close(stored.model.robustness_tokens, live.model.robustness_tokens, rtol=0, atol=1e-5)
    for key in ("loss", "invariance_cosine", "adversarial_cosine", "baseline_cosine"):
        assert stored.log_history[0][key] == pytest.approx(live.log_history[0][key], abs=1e-4)


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ({"attack": "paper"}, "attack='paper'"),
        ({"attack": "pgd", "eps": 8 / 255}, "eps="),
        ({"num_attack_steps": 30}, "num_attack_steps=30"),
        ({"attack": "pgd", "step_size": 1 / 255}, "step_size="),
        ({"attack_through": "both"}, "attack_through='both'"),
        ({"attack_through": "tokens"}, "attack_through='tokens'"),
        ({"image_size": 32}, "image_size=32"),
        ({"image_column_name": "image"}, "image_column_name"),
        ({"resize": "processor", "image_size": None}, "resize='processor'"),
    ],
)
def test_what_is_stated_otherwise_is_an_error(
    made: dict[str, Path], model: RobustnessTokenModel, tmp_path: Path, stated: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        take_pairs(made["pgd"], args=arguments(tmp_path, **stated), config=model.config)


@pytest.mark.parametrize("stated", [{}, {"attack": "pgd"}, PGD, {**PGD, "step_size": 5 / 255}, {"image_size": None}])
def test_what_agrees_is_taken(
    made: dict[str, Path], model: RobustnessTokenModel, tmp_path: Path, stated: dict[str, Any]
) -> None:
    pairs, args = take_pairs(str(made["pgd"]), args=arguments(tmp_path, **stated), config=model.config)
    assert isinstance(pairs, AdversarialPairs)
    assert {name: getattr(args, name) for name in pairs.info.attack} == pairs.info.attack
    assert args.max_steps == 3


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("vit", {}, "other weights"),
        ("dinov2", {"feature_view": "cls"}, "feature_view="),
        ("dinov2", {"similarity_axis": "feature"}, "similarity_axis="),
        ("dinov2", {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}, "image_mean="),
    ],
)
def test_pairs_of_another_base_or_features_are_an_error(
    made: dict[str, Path], make_base: BaseFactory, tmp_path: Path, family: str, settings: dict[str, Any], message: str
) -> None:
    model = new_model(make_base(family), **settings)
    with pytest.raises(ValueError, match=message):
        take_pairs(made["pgd"], args=arguments(tmp_path), config=model.config)


def test_the_baseline_is_along_the_axis_of_the_model(
    made: dict[str, Path], make_base: BaseFactory, tmp_path: Path
) -> None:
    model = new_model(make_base("dinov2"), similarity_axis="feature")
    args = arguments(tmp_path / "run", max_steps=1, per_device_train_batch_size=NUM_IMAGES)
    found = train(model, args, made["paper"]).log_history[0]["baseline_cosine"]
    pairs = load_adversarial_pairs(made["paper"])
    normalizer = Normalizer(pairs.info.image_mean, pairs.info.image_std)
    step = TrainingStep(model, args, normalizer)
    clean, attacked = (
        step.base_outputs(normalizer(torch.stack([pairs[row][name] for row in range(NUM_IMAGES)])))
        for name in ("images", "adversarial_images")
    )
    assert found == pytest.approx(
        cosine_similarity(attacked, clean, similarity_axis="feature").mean().item(), abs=1e-5
    )


def test_held_out_pictures_are_resized_as_the_pairs_were(
    made: dict[str, Path], model: RobustnessTokenModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare_module, "processor_image_size", lambda _: (2 * SIDE, 2 * SIDE))
    held_out = pictures(np.zeros((2, 3 * SIDE, 3 * SIDE, 3), dtype=np.uint8))
    trainer = RobustnessTokenTrainer(model, arguments(tmp_path / "run"), made["pgd"], held_out)
    assert trainer.eval_dataset is not None
    assert trainer.eval_dataset[0]["images"].shape == (3, SIDE, SIDE)
    args = arguments(tmp_path / "other", image_size=None)
    with pytest.raises(
        ValueError, match=r"eval_dataset has images of \(32, 32\) pixels, those to train on have \(16, 16\)"
    ):
        RobustnessTokenTrainer(model, args, made["pgd"], held_out)


def test_the_same_base_in_half_precision_is_known(
    made: dict[str, Path], make_base: BaseFactory, tmp_path: Path
) -> None:
    model = new_model(make_base("dinov2").to(torch.bfloat16))
    take_pairs(made["pgd"], args=arguments(tmp_path), config=model.config)


def test_a_bare_dataset_of_pairs_is_not_taken_for_images(
    made: dict[str, Path], model: RobustnessTokenModel, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="not how they were made"):
        take_pairs(datasets.load_from_disk(str(made["pgd"])), args=arguments(tmp_path), config=model.config)


def test_the_command_line_knows_a_folder_of_pairs(made: dict[str, Path]) -> None:
    assert isinstance(load_train_dataset(DataArguments(dataset=str(made["pgd"]))), AdversarialPairs)
    for unused in ({"streaming": True}, {"split": "test"}, {"dataset_config": "large"}):
        with pytest.raises(ValueError, match="holds adversarial pairs"):
            load_train_dataset(DataArguments(dataset=str(made["pgd"]), **unused))


@pytest.mark.parametrize("attack", ["pgd", "paper"])
def test_the_digest_tells_pairs_apart(made: dict[str, Path], attack: str) -> None:
    pairs = load_adversarial_pairs(made[attack])
    assert pairs.digest() == load_adversarial_pairs(made[attack]).digest() == pairs.without_baseline().digest()
    rows = range(NUM_IMAGES)
    others = [
        load_adversarial_pairs(made["paper" if attack == "pgd" else "pgd"]),
        pairs.select(rows[:-1]),
        pairs.select([0, 2, 1, *rows[3:]]),
        AdversarialPairs(pairs.stored.map(lambda row, i: _first_pixel_changed(row, i), with_indices=True), pairs.info),
        AdversarialPairs(pairs.stored.map(lambda row, i: _cosine_changed(row, i), with_indices=True), pairs.info),
    ]
    assert len({pairs.digest(), *(other.digest() for other in others)}) == 1 + len(others)
    assert pairs.select(rows).digest() == pairs.digest()


def _first_pixel_changed(row: dict[str, Any], index: int) -> dict[str, Any]:
    return {"image": bytes([row["image"][0] ^ 1]) + row["image"][1:]} if index == 0 else {}


def _cosine_changed(row: dict[str, Any], index: int) -> dict[str, Any]:
    return {"baseline_cosine": row["baseline_cosine"] + 1e-6} if index == 5 else {}


def test_a_run_on_other_pairs_is_not_resumed(
    made: dict[str, Path], model: RobustnessTokenModel, make_base: BaseFactory, tmp_path: Path
) -> None:
    other = make_adversarial_pairs(model, arguments(tmp_path / "pairs", **PGD), pictures(255 - random_pixels()))
    train(model, arguments(tmp_path / "run", save_steps=3), made["pgd"])
    args = arguments(tmp_path / "run", max_steps=4, resume_from_checkpoint=True)
    with pytest.raises(ValueError, match=r"made by another run .*images_digest: "):
        train(new_model(make_base("dinov2")), args, other)
    assert train(new_model(make_base("dinov2")), args, made["pgd"]).state.global_step == 4


# On the Hub

PUSH = {"repo_id": "alice/pairs", "token": "hf_alice", "base_model_id": "alice/base"}


def test_pairs_come_back_from_the_hub_bit_for_bit(made: dict[str, Path], hub: Hub, client: HubClient) -> None:
    for _ in range(2):  # a second push says the same
        read = client("push_pairs_and_read_them", folder=str(made["pgd"]), **PUSH)
    pairs = load_adversarial_pairs(made["pgd"])
    assert len(read) == len(pairs)
    assert {found["digest"] for found in read} == {pairs.digest()}
    for found, pair in zip(read, map(pairs.__getitem__, range(len(pairs))), strict=True):
        assert found["index"] == pair["index"]
        assert found["baseline_cosine"] == pair["baseline_cosine"]
        for key in ("images", "adversarial_images"):
            assert found[key] == pair[key].numpy().tobytes().hex()
    repo = hub.repos["alice/pairs"]
    assert repo.private
    files = repo.commit().files
    local = json.loads((made["pgd"] / INFO_FILE).read_text(encoding="utf-8"))
    assert json.loads(files[INFO_FILE].data) == {**local, "base_model": "alice/base"}
    card = files["README.md"].data.decode()
    assert card.count("# Adversarial pairs") == 1
    assert "The pairs reveal no tokens" in card
    assert any(name.endswith(".parquet") for name in files)


def test_pairs_are_not_pushed_to_a_public_repo_unasked(made: dict[str, Path], hub: Hub, client: HubClient) -> None:
    push = {"folder": str(made["pgd"]), **PUSH}
    client("api", method="create_repo", token="hf_alice", repo_id="alice/pairs", repo_type="dataset", private=False)
    with pytest.raises(ClientError, match="is public: the pairs hold the images"):
        client("push_pairs_and_read_them", **push)
    assert INFO_FILE not in hub.repos["alice/pairs"].files()
    client("push_pairs_and_read_them", **push, private=False)
    assert INFO_FILE in hub.repos["alice/pairs"].files()


def test_pairs_replace_no_other_dataset(made: dict[str, Path], hub: Hub, client: HubClient, tmp_path: Path) -> None:
    repo: dict[str, Any] = {"repo_id": "alice/pairs", "repo_type": "dataset"}
    (tmp_path / "rows").write_bytes(b"rows")
    client("api", method="create_repo", token="hf_alice", **repo, private=True)

    def upload(name: str) -> None:
        file = {"path_or_fileobj": str(tmp_path / "rows"), "path_in_repo": name}
        client("api", method="upload_file", token="hf_alice", **repo, **file)

    upload("data/train-00000-of-00001.parquet")
    before = hub.repos["alice/pairs"].commit()
    with pytest.raises(ClientError, match=r"holds other files, such as data/train-00000-of-00001\.parquet"):
        client("push_pairs_and_read_them", folder=str(made["pgd"]), **PUSH)
    assert hub.repos["alice/pairs"].commit() == before

    upload(UNFINISHED_FILE)  # as a push that was cut short has
    client("push_pairs_and_read_them", folder=str(made["pgd"]), **PUSH)
    files = hub.repos["alice/pairs"].files()
    assert INFO_FILE in files
    assert UNFINISHED_FILE not in files


def test_no_pairs_are_not_pushed(model: RobustnessTokenModel, tmp_path: Path) -> None:
    rows = [{"bytes": b"no picture", "path": None}] * 2
    dataset = datasets.Dataset.from_dict({"image": rows}, features=datasets.Features({"image": datasets.Image()}))
    assert len(make_adversarial_pairs(model, arguments(tmp_path, **PGD), dataset)) == 0
    with pytest.raises(ValueError, match="holds no pair"):
        push_adversarial_pairs(tmp_path, "alice/pairs", base_model_id="alice/base")


def test_a_base_that_nobody_else_has_needs_a_name(made: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="pass base_model_id="):
        push_adversarial_pairs(made["pgd"], "alice/pairs")


def test_pairs_of_schema_1_are_read_where_their_attack_still_exists(made: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made["pgd"], tmp_path / "pairs"))
    values = json.loads((folder / INFO_FILE).read_text(encoding="utf-8"))
    del values["head"], values["attack"]["objective"]
    values["schema_version"] = 1
    for weight in (0.0, 4.0):
        values["attack"]["head_distance_weight"] = weight
        (folder / INFO_FILE).write_text(json.dumps(values), encoding="utf-8")
        if weight == 0:
            info = load_adversarial_pairs(folder).info
            assert (info.attack["objective"], info.head, info.schema_version) == ("cosine", None, 3)
        else:
            with pytest.raises(ValueError, match=r"made by an older package with head_distance_weight=4\.0.*again"):
                load_adversarial_pairs(folder)


@pytest.mark.parametrize("name", ["../other.arrow", "/etc/passwd", "sub/shard.arrow", "..", "", None, {}])
@pytest.mark.parametrize("load", [load_adversarial_pairs, load_image_dataset])
def test_a_state_that_names_files_elsewhere_is_refused(
    made: dict[str, Path], tmp_path: Path, load: Callable[[Path], Any], name: Any
) -> None:
    folder = Path(shutil.copytree(made["pgd"], tmp_path / "pairs"))
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    (folder / "state.json").write_text(json.dumps({**state, "_data_files": [{"filename": name}]}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"state\.json names .*, expected files of its own folder"):
        load(folder)


@pytest.mark.parametrize("split", ["../pairs", "..", "/etc", 3])
def test_splits_elsewhere_are_refused(tmp_path: Path, split: Any) -> None:
    (tmp_path / "dataset_dict.json").write_text(json.dumps({"splits": [split]}))
    with pytest.raises(ValueError, match=r"dataset_dict\.json names .*, expected files of its own folder"):
        load_image_dataset(tmp_path)
