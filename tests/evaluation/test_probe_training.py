"""Heads on frozen features: what they read, how they train, that tokens only change what they should, their files."""

import json
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset
from transformers import PreTrainedModel

from robustness_tokens import Normalizer, RobustnessTokenModel, inject_tokens, pgd_attack
from robustness_tokens.attacks.objectives import cross_entropy_objective, pixel_cross_entropy_objective
from robustness_tokens.data.image_datasets import IGNORE_INDEX, ImageDataset, SegmentationDataset, collate_images
from robustness_tokens.data.preprocessing import ImageTransform
from robustness_tokens.evaluation.probe_training import train_probe
from robustness_tokens.models.features import extract_features
from robustness_tokens.models.heads import (
    ClassificationHead,
    ProbedModel,
    ProbeHead,
    SegmentationHead,
    load_head,
    save_head,
)
from robustness_tokens.models.layer_stack import base_fingerprint
from tests.support.bases import build_base
from tests.support.disks import full_disk
from tests.support.families import BASES, FAMILIES, HIDDEN_SIZE, hf
from tests.support.families import images as family_images


HEADS: list[type[ProbeHead]] = [ClassificationHead, SegmentationHead]
NUM_LABELS = 4
NORMALIZER = Normalizer([0.5] * 3, [0.25] * 3)
SQUARE_INPUTS = [name for name in BASES if name not in ("clip_two_towers", "siglip2_vision", "vit_masked")]
PREPARE = Path(__file__).parents[2] / "examples" / "quickstart" / "prepare_segmentation.py"


class Ready(Dataset[Any]):
    """Returns the items unchanged."""

    def __init__(self, items: list[dict[str, Any]]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.items[index]


class Stream(IterableDataset[Any]):
    def __init__(self, items: list[dict[str, Any]]) -> None:
        self.items = items

    def __iter__(self) -> Any:
        return iter(self.items)


def make_items(head_class: type[ProbeHead], num_images: int = 24) -> list[dict[str, Any]]:
    """Images of one colour per class; in segmentation a class per quarter of 8 pixels, and a row that is ignored."""
    generator = torch.Generator().manual_seed(3)
    colors = torch.tensor([[0.9, 0.1, 0.1], [0.1, 0.9, 0.1], [0.1, 0.1, 0.9], [0.9, 0.9, 0.1]])
    items = []
    for index in range(num_images):
        classes = torch.randint(NUM_LABELS, (2, 2), generator=generator)
        if head_class is ClassificationHead:
            classes = classes[:1, :1].expand(2, 2)
        pixels = classes.repeat_interleave(8, 0).repeat_interleave(8, 1)  # (16, 16)
        image = colors[pixels].permute(2, 0, 1) + 0.05 * torch.rand(3, 16, 16, generator=generator)
        labels: Any = int(classes[0, 0])
        if head_class is SegmentationHead:
            labels = pixels.clone()
            labels[0] = IGNORE_INDEX
        items.append({"images": image.contiguous(), "labels": labels, "index": index})
    return items


def train(model: PreTrainedModel, head_class: type[ProbeHead], **kwargs: Any) -> ProbeHead:
    options = {"num_epochs": 20, "batch_size": 8, "learning_rate": 1e-2, "normalizer": NORMALIZER, **kwargs}
    dataset = options.pop("dataset", None) or Ready(make_items(head_class))
    return train_probe(model, dataset, head_class=head_class, num_labels=NUM_LABELS, disable_tqdm=True, **options)


def with_tokens(dtype: torch.dtype = torch.float32) -> RobustnessTokenModel:
    model = RobustnessTokenModel.from_base(build_base("dinov2").to(dtype), num_robustness_tokens=3)
    with torch.no_grad():
        model.robustness_tokens.copy_(torch.randn(3, HIDDEN_SIZE, generator=torch.Generator().manual_seed(0)))
    return model


DIGESTS = {"float16": "0" * 64}


def random_head(head_class: type[ProbeHead], in_features: int | None = None, **kwargs: Any) -> ProbeHead:
    size = in_features or (2 * HIDDEN_SIZE if head_class is ClassificationHead else HIDDEN_SIZE)
    head = head_class(size, NUM_LABELS, **kwargs)
    for parameter in head.parameters():
        nn.init.normal_(parameter, std=0.5)
    return head.eval()


def share_right(probed: ProbedModel, items: list[dict[str, Any]]) -> float:
    batch = collate_images(items)
    with torch.inference_mode():
        predictions = probed(NORMALIZER(batch["images"])).argmax(dim=1)
    counted = batch["labels"] != IGNORE_INDEX
    return (predictions == batch["labels"])[counted].float().mean().item()


@pytest.mark.parametrize("name", SQUARE_INPUTS)
def test_the_heads_read_cls_and_patches_of_every_family(name: str) -> None:
    base, pixel_values = FAMILIES[name].build(), family_images()["pixel_values"]
    with torch.no_grad():
        patches = extract_features(base, pixel_values, feature_view="patches")
        vector, grid = (head.extract(base, pixel_values) for head in HEADS)
        expected = [patches.mean(dim=1)]
        if "cls" in FAMILIES[name].prefix:
            expected.insert(0, extract_features(base, pixel_values, feature_view="cls"))
    torch.testing.assert_close(vector, torch.cat(expected, dim=1))
    assert grid.shape == (2, HIDDEN_SIZE, 2, 2)
    for row, column in np.ndindex(2, 2):
        assert torch.equal(grid[:, :, row, column], patches[:, 2 * row + column])


def test_a_grid_that_is_not_square_keeps_rows_and_columns() -> None:
    base, pixel_values = build_base("dinov2"), torch.randn(1, 3, 16, 40)
    with torch.no_grad():
        grid = SegmentationHead.extract(base, pixel_values)
        patches = extract_features(base, pixel_values, feature_view="patches")
    assert grid.shape == (1, HIDDEN_SIZE, 2, 5)
    assert torch.equal(grid[:, :, 1, 3], patches[:, 8])


def test_the_classification_head_is_that_of_dinov2() -> None:
    classifier = build_base("dinov2", classifier=True)
    head = ClassificationHead(2 * HIDDEN_SIZE, classifier.config.num_labels)
    head.linear.load_state_dict(classifier.classifier.state_dict())
    pixel_values = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        logits = ProbedModel(classifier.dinov2, head)(pixel_values)
        torch.testing.assert_close(logits, classifier(pixel_values).logits)


@pytest.mark.parametrize("head_class", HEADS)
@pytest.mark.parametrize("tokens", [False, True], ids=["without_tokens", "with_tokens"])
def test_a_probe_learns_what_it_has_seen(head_class: type[ProbeHead], tokens: bool) -> None:
    model = with_tokens()
    head = train(model, head_class, with_tokens=tokens)
    assert head.trained_with_tokens is tokens
    assert not any(parameter.requires_grad for parameter in head.parameters())
    assert not head.training
    probed, held_out = ProbedModel(model, head), make_items(head_class, 40)[24:]
    if tokens:
        assert share_right(probed, held_out) > 0.9
        return
    with probed.disable_adapter():
        assert share_right(probed, held_out) > 0.9


@pytest.mark.parametrize("head_class", HEADS)
def test_with_and_without_tokens_a_probe_trains_on_other_features(head_class: type[ProbeHead]) -> None:
    injected = inject_tokens(build_base("dinov2"), with_tokens().robustness_tokens)
    heads = [
        train(build_base("dinov2"), head_class, num_epochs=1),
        train(with_tokens(), head_class, num_epochs=1),
        train(with_tokens(), head_class, num_epochs=1, with_tokens=True),
        train(injected, head_class, num_epochs=1, with_tokens=True),
    ]
    plain, without, seen, seen_too = ([*head.state_dict().values()] for head in heads)
    assert all(torch.equal(a, b) for a, b in zip(plain, without, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(seen, seen_too, strict=True))
    assert not torch.allclose(plain[0], seen[0])


def test_a_head_of_its_own_serves_the_base() -> None:
    model = with_tokens()
    head, base_head = (random_head(ClassificationHead) for _ in range(2))
    probed, pixel_values = ProbedModel(model, head, base_head=base_head), torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(probed(pixel_values), head(head.extract(model.get_base_model(), pixel_values)))
        with probed.disable_adapter():
            assert torch.equal(probed(pixel_values), base_head(head.extract(model.get_base_model(), pixel_values)))


@pytest.mark.parametrize("head_class", HEADS)
def test_without_the_tokens_a_probed_model_is_the_base_under_the_same_head(head_class: type[ProbeHead]) -> None:
    head, pixel_values = random_head(head_class), torch.randn(2, 3, 16, 16)
    probed, plain = ProbedModel(with_tokens(), head), ProbedModel(build_base("dinov2"), head)
    with torch.no_grad():
        expected = plain(pixel_values)
        with probed.disable_adapter():
            assert torch.equal(probed(pixel_values), expected)
        assert not torch.allclose(probed(pixel_values), expected)
        injected = ProbedModel(inject_tokens(build_base("dinov2"), with_tokens().robustness_tokens), head)
        assert torch.equal(injected(pixel_values), probed(pixel_values))
        with injected.disable_adapter():
            assert torch.equal(injected(pixel_values), expected)
        with plain.disable_adapter():
            assert torch.equal(plain(pixel_values), expected)


@pytest.mark.parametrize(("head_class", "shape"), [(ClassificationHead, (2, 4)), (SegmentationHead, (2, 4, 24, 16))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_float32_and_segmentations_as_large_as_the_image(
    head_class: type[ProbeHead], shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    probed = ProbedModel(with_tokens(dtype=dtype), random_head(head_class))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = probed(torch.randn(2, 3, 24, 16))
    assert logits.shape == shape
    assert logits.dtype == torch.float32


def test_the_upsampling_is_bilinear_between_centres() -> None:
    head = random_head(SegmentationHead)
    base, pixel_values = build_base("dinov2"), torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        grid = head(SegmentationHead.extract(base, pixel_values))[0, 0]  # (2, 2)
        logits = ProbedModel(base, head)(pixel_values)[0, 0]  # (16, 16)
    assert logits[0, 0] == pytest.approx(grid[0, 0].item(), abs=1e-6)
    # Pixel 8 lies 4.5 / 8 of the way from the first patch's centre, at 3.5, to the second's.
    assert logits[0, 8].item() == pytest.approx(torch.lerp(grid[0, 0], grid[0, 1], 4.5 / 8).item(), abs=1e-6)


@pytest.mark.parametrize("head_class", HEADS)
def test_a_probed_model_stays_in_eval_mode_and_only_tokens_are_trainable(head_class: type[ProbeHead]) -> None:
    model = with_tokens()
    probed = ProbedModel(model, random_head(head_class)).train()
    assert not any(module.training for module in probed.modules())
    trainable = [parameter for parameter in probed.parameters() if parameter.requires_grad]
    assert len(trainable) == 1
    assert trainable[0] is model.robustness_tokens


@pytest.mark.parametrize("head_class", HEADS)
def test_training_leaves_the_model_as_it_was(head_class: type[ProbeHead]) -> None:
    model = with_tokens()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.random.get_rng_state()
    train(model, head_class, num_epochs=1)
    states = [model.injector.enabled]
    with model.disable_adapter():
        train(model, head_class, with_tokens=True, num_epochs=1)
        states.append(model.injector.enabled)
    assert states == [True, False]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("head_class", HEADS)
def test_a_head_follows_from_its_seed_and_not_from_where_the_features_lie(head_class: type[ProbeHead]) -> None:
    base = build_base("dinov2")
    first, again, other = (train(base, head_class, seed=seed, num_epochs=2) for seed in (1, 1, 2))
    streamed = train(base, head_class, seed=1, num_epochs=2, max_cache_bytes=0)
    for name, tensor in first.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)
        torch.testing.assert_close(streamed.state_dict()[name], tensor, rtol=1e-3, atol=1e-5)
    weights = next(iter(first.parameters())), next(iter(other.parameters()))
    assert head_class is SegmentationHead or not torch.allclose(*weights)


@pytest.mark.parametrize("limit", [None, 0, 24 * (4 * 2 * HIDDEN_SIZE + 8), 24 * (4 * 2 * HIDDEN_SIZE + 8) - 1])
def test_features_are_computed_once_where_they_fit(limit: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    extract = ClassificationHead.extract

    def counted(base: PreTrainedModel, pixel_values: Tensor) -> Tensor:
        seen.append(len(pixel_values))
        return extract(base, pixel_values)

    monkeypatch.setattr(ClassificationHead, "extract", staticmethod(counted))
    bound = {} if limit is None else {"max_cache_bytes": limit}
    train(build_base("dinov2"), ClassificationHead, num_epochs=3, **bound)
    fits = limit is None or limit >= 24 * (4 * 2 * HIDDEN_SIZE + 8)
    # One batch tells how wide features are; of what won't fit one more is enough to see it.
    assert sum(seen) == (8 + 24 if fits else 8 + 8 + 3 * 24)


@pytest.mark.parametrize("max_cache_bytes", [0, 1 << 20])
def test_a_stream_trains_a_probe_too(max_cache_bytes: int) -> None:
    dataset = Stream(make_items(ClassificationHead))
    base = build_base("dinov2")
    head = train(base, ClassificationHead, dataset=dataset, max_cache_bytes=max_cache_bytes)
    assert share_right(ProbedModel(base, head), make_items(ClassificationHead)) > 0.9


def as_picture(item: dict[str, Any]) -> Image.Image:
    return Image.fromarray((item["images"].clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy())


def test_a_dataset_of_pictures_is_prepared_by_the_models_own_processor() -> None:
    items = make_items(ClassificationHead)
    columns = {"image": [as_picture(item) for item in items], "label": [item["labels"] for item in items]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(NUM_LABELS)})
    dataset = datasets.Dataset.from_dict(columns, features=features)
    model = with_tokens()
    ready = ImageDataset(dataset, ImageTransform(image_size=16))
    processor: Any = model.image_processor
    normalizer = Normalizer(processor.image_mean, processor.image_std)
    heads = [
        train(model, ClassificationHead, dataset=dataset, normalizer=None, num_epochs=1),
        train(model, ClassificationHead, dataset=ready, normalizer=normalizer, num_epochs=1),
        train(
            build_base("dinov2"),
            ClassificationHead,
            dataset=dataset,
            normalizer=normalizer,
            image_size=16,
            num_epochs=1,
        ),
    ]
    for head in heads[1:]:
        assert all(torch.equal(a, b) for a, b in zip(head.parameters(), heads[0].parameters(), strict=True))


def test_broken_pictures_are_left_out() -> None:
    items = make_items(ClassificationHead)
    pictures: list[Any] = [as_picture(item) for item in items]
    pictures[3] = {"bytes": b"no picture", "path": None}
    columns = {"image": pictures, "label": [item["labels"] for item in items]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(NUM_LABELS)})
    dataset = datasets.Dataset.from_dict(columns, features=features)
    base = build_base("dinov2")
    head = train(base, ClassificationHead, dataset=dataset, image_size=16)
    assert share_right(ProbedModel(base, head), items) > 0.9


def test_a_batch_without_a_labelled_pixel_changes_nothing_but_the_norm() -> None:
    items = make_items(SegmentationHead, 8)
    for item in items:
        item["labels"] = torch.full((16, 16), IGNORE_INDEX)
    head = train(build_base("dinov2"), SegmentationHead, dataset=Ready(items), num_epochs=1)
    assert all(parameter.isfinite().all() for parameter in head.parameters())


def without_labels(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in item.items() if key != "labels"} for item in items]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset": make_items(ClassificationHead)}, r"dataset must be a datasets.Dataset .*, got a list"),
        ({"dataset": Ready(without_labels(make_items(ClassificationHead)))}, "dataset has no labels"),
        ({"dataset": Ready(make_items(SegmentationHead))}, r"labels must have shape \(8,\) for classification"),
        (
            {"dataset": Ready([{**item, "labels": 4} for item in make_items(ClassificationHead)])},
            "labels go from 4 to 4",
        ),
        ({"dataset": Stream([])}, "dataset has no images"),
        ({"image_size": 16}, "image_size=16 can't be applied to a Ready"),
        ({"with_tokens": True}, "with_tokens=True, but Dinov2Model has no robustness tokens"),
        ({"normalizer": None}, "normalizer is needed: Dinov2Model doesn't say"),
        ({"num_epochs": 0}, "num_epochs must be above 0, got 0"),
        ({"learning_rate": float("nan")}, "learning_rate must be above 0, got nan"),
    ],
)
def test_what_cannot_be_trained_on_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(build_base("dinov2"), ClassificationHead, **options)


NAMES = ["red", "green", "blue", "yellow"]


def tables(labels: list[Any], feature: Any, **columns: Any) -> datasets.Dataset:
    shots = [(255 * item["images"]).byte().permute(1, 2, 0).numpy() for item in make_items(ClassificationHead)]
    rows = {"photo": [Image.fromarray(shot) for shot in shots], "kind": labels, **columns}
    features = {"photo": datasets.Image(), "kind": feature, **dict.fromkeys(columns, datasets.Image())}
    return datasets.Dataset.from_dict(rows, features=datasets.Features(features))


def test_a_head_keeps_the_names_of_its_classes(tmp_path: Path) -> None:
    labels = [item["labels"] for item in make_items(ClassificationHead)]
    masks = [Image.new("L", (16, 16))] * len(labels)
    dataset = tables(labels, datasets.ClassLabel(names=NAMES), other=masks)
    options: dict[str, Any] = {"dataset": dataset, "image_size": 16, "num_epochs": 1}
    with pytest.raises(ValueError, match=r"several columns of datasets.Image, .*: choose by image_column_name"):
        train(build_base("dinov2"), ClassificationHead, **options)
    head = train(build_base("dinov2"), ClassificationHead, **options, image_column_name="photo")
    assert head.label_names == NAMES
    save_head(head, tmp_path)
    assert load_head(tmp_path).label_names == NAMES
    with pytest.raises(ValueError, match="head and base_head must have the same classes in the same order"):
        ProbedModel(build_base("dinov2"), head, base_head=random_head(ClassificationHead, label_names=NAMES[::-1]))
    ProbedModel(build_base("dinov2"), head, base_head=random_head(ClassificationHead))  # unknown names
    segmented = train(
        build_base("dinov2"), SegmentationHead, **options, image_column_name="photo", mask_column_name="other"
    )
    assert segmented.label_names is None
    save_head(segmented, tmp_path)
    assert load_head(tmp_path).label_names is None


@pytest.mark.parametrize("names", [["red"], [*NAMES, "pink"], [1, 2, 3, 4]])
def test_names_of_classes_are_checked(names: Any) -> None:
    with pytest.raises(ValueError, match="label_names must"):
        random_head(ClassificationHead, label_names=names)


@pytest.mark.parametrize("label", [-1, 4])
def test_labels_of_a_table_are_checked_before_a_feature_is_computed(
    label: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ClassificationHead, "extract", lambda *_: pytest.fail("computed"))
    dataset = tables([0] * 23 + [label], datasets.Value("int64"))
    with pytest.raises(ValueError, match=f"labels must be from 0 to 3, .* got {label}"):
        train(build_base("dinov2"), ClassificationHead, dataset=dataset, image_size=16, label_column_name="kind")


def test_labels_of_pixels_are_as_large_as_the_image() -> None:
    items = [{**item, "labels": item["labels"][:8]} for item in make_items(SegmentationHead)]
    with pytest.raises(ValueError, match=r"labels must have shape \(8, 16, 16\) for segmentation, got \(8, 8, 16\)"):
        train(build_base("dinov2"), SegmentationHead, dataset=Ready(items))


def test_class_255_of_a_classification_counts_as_any_other() -> None:
    items = [{**item, "labels": 255} for item in make_items(ClassificationHead, 8)]
    base = build_base("dinov2")
    head = train_probe(
        base,
        Ready(items),
        head_class=ClassificationHead,
        num_labels=256,
        normalizer=NORMALIZER,
        learning_rate=1e-2,
        num_epochs=5,
        disable_tqdm=True,
    )
    with torch.no_grad():
        logits = ProbedModel(base, head)(NORMALIZER(collate_images(items)["images"]))
    assert (logits.argmax(dim=1) == 255).all()
    with pytest.raises(ValueError, match="num_labels must be at most 255"):
        SegmentationHead(HIDDEN_SIZE, 256)


def test_a_training_that_diverges_is_an_error() -> None:
    base = build_base("dinov2")
    base.layernorm.weight.data.fill_(1e38)
    with pytest.raises(FloatingPointError, match=r"the loss of the head is .*: lower learning_rate=0.01"):
        train(base, ClassificationHead)


def test_a_head_of_another_base_is_refused() -> None:
    head = train(build_base("dinov2"), ClassificationHead, num_epochs=1)
    other = build_base("dinov2")
    other.encoder.layer[0].mlp.fc1.bias.data.add_(1)
    with pytest.raises(ValueError, match=r"head was trained on .*the base given is Dinov2Model '', with other"):
        ProbedModel(other, head)
    ProbedModel(other, head, ignore_base_mismatch=True)
    ProbedModel(with_tokens(dtype=torch.bfloat16), head)


def test_two_heads_must_fit_each_other() -> None:
    with pytest.raises(ValueError, match="of one task and number of classes, got classification of 4 and segment"):
        ProbedModel(build_base("dinov2"), random_head(ClassificationHead), base_head=random_head(SegmentationHead))


def assert_same_weights(head: ProbeHead, other: ProbeHead) -> None:
    assert set(head.state_dict()) == set(other.state_dict())
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in head.state_dict().items())


@pytest.mark.parametrize("head_class", HEADS)
def test_a_head_comes_back_from_its_two_files_bit_for_bit(head_class: type[ProbeHead], tmp_path: Path) -> None:
    head = train(with_tokens(), head_class, with_tokens=True, num_epochs=1)
    save_head(head, tmp_path / "head")
    assert sorted(path.name for path in (tmp_path / "head").iterdir()) == ["head.json", "head.safetensors"]
    loaded = load_head(tmp_path / "head")
    assert type(loaded) is head_class
    assert_same_weights(loaded, head)
    assert loaded.trained_with_tokens
    assert loaded.base_model_fingerprint == base_fingerprint(build_base("dinov2"))
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def edit_config(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        config = {**json.loads((folder / "head.json").read_text()), **changes}
        (folder / "head.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))

    return edit


def edit_weights(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / "head.safetensors")
        change(tensors)
        save_file(tensors, folder / "head.safetensors")

    return edit


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "head.json").unlink(), "it has no head.json"),
        (lambda folder: (folder / "head.json").write_text("{"), "is not valid JSON"),
        (lambda folder: (folder / "head.safetensors").write_bytes(b"no tensors"), "is not a valid safetensors file"),
        (
            lambda folder: (folder / "head.safetensors").write_bytes(b"0" * 100_000),
            "has 100,000 bytes, expected at most",
        ),
        (edit_config(schema_version=2), "schema_version 2, this package reads up to 1"),
        (edit_config(schema_version=None), "schema_version must be a whole number of at least 1, got None"),
        (edit_config(in_features=None), r"missing keys \['in_features'\]"),
        (edit_config(surprise=1), r"unknown keys \['surprise'\]"),
        (edit_config(task="depth"), r"task must be one of \['classification', 'segmentation'\], got 'depth'"),
        (edit_config(task=["depth"]), r"task must be one of .*, got \['depth'\]"),
        (edit_config(task="segmentation"), "must hold .*norm.weight"),
        (edit_config(num_labels=5), r"must hold .*\(5, 64\).*got .*\(4, 64\)"),
        (edit_config(num_labels=True), "num_labels must be a whole number of at least 1, got True"),
        (edit_config(in_features=0), "in_features must be a whole number of at least 1, got 0"),
        (edit_config(trained_with_tokens="no"), "trained_with_tokens must be true or false, got 'no'"),
        (
            edit_config(base_model_fingerprint={"bfloat16": "abc"}),
            r"base_model_fingerprint\['bfloat16'\] must be 64 hexadecimal",
        ),
        (edit_config(base_model_fingerprint={}), r"head\.json has no base_model_fingerprint, so it would be taken"),
        (edit_weights(lambda tensors: tensors.pop("linear.bias")), "must hold .*linear.bias"),
        (edit_weights(lambda tensors: tensors["linear.bias"].fill_(float("nan"))), "linear.bias is not finite"),
        (edit_weights(lambda tensors: tensors.update({"linear.bias": torch.zeros(4).half()})), "torch.float16"),
    ],
)
def test_damaged_heads_are_refused(damage: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    save_head(random_head(ClassificationHead, base_model_fingerprint=DIGESTS), tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_head(tmp_path)


def test_a_full_disk_is_an_error_and_leaves_the_head_before(tmp_path: Path) -> None:
    before = random_head(ClassificationHead, base_model_fingerprint=DIGESTS)
    save_head(before, tmp_path)
    with full_disk(), pytest.raises(OSError, match=r"File too large: .*head.safetensors'"):
        save_head(random_head(ClassificationHead, base_model_fingerprint=DIGESTS), tmp_path)
    assert_same_weights(load_head(tmp_path), before)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_head_of_an_unknown_base_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"base_model_fingerprint=base_fingerprint\(base\)"):
        save_head(random_head(ClassificationHead), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_head_that_is_not_finite_is_not_saved(tmp_path: Path) -> None:
    head: Any = random_head(ClassificationHead, base_model_fingerprint=DIGESTS)
    head.linear.bias.data[0] = torch.inf
    with pytest.raises(ValueError, match=r"refusing to save a head whose linear\.bias is not finite"):
        save_head(head, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("head_class", HEADS)
def test_attacks_go_through_a_probed_model(head_class: type[ProbeHead]) -> None:
    model, items = with_tokens(), make_items(head_class)
    probed = ProbedModel(model, train(model, head_class))
    batch = collate_images(items[:8])
    make = cross_entropy_objective if head_class is ClassificationHead else pixel_cross_entropy_objective
    objective = make(lambda images: probed(NORMALIZER(images)), batch["labels"])
    adversarial = pgd_attack(objective, batch["images"].clamp(0, 1), eps=8 / 255, num_steps=4)
    assert (adversarial - batch["images"].clamp(0, 1)).abs().max() <= 8 / 255 + 1e-6
    with torch.no_grad():
        assert (objective(adversarial) > objective(batch["images"])).all()


DPT: dict[str, Any] = {"hidden_size": HIDDEN_SIZE, "intermediate_size": 64, "num_attention_heads": 4, "image_size": 16}
DPT |= {"num_hidden_layers": 4, "patch_size": 8, "backbone_out_indices": [0, 1, 2, 3], "use_auxiliary_head": False}
DPT |= {"neck_hidden_sizes": [8] * 4, "fusion_hidden_size": 8, "reassemble_factors": [1, 1, 1, 0.5]}


@pytest.mark.parametrize(
    ("build", "num_labels"),
    [(hf("DPTForSemanticSegmentation", "DPTConfig", **DPT, num_labels=4), 4), (FAMILIES["upernet_on_beit"].build, 5)],
    ids=["dpt", "upernet"],
)
def test_dense_models_on_a_backbone_take_tokens_and_are_attacked_by_pixels(
    build: Callable[[], Any], num_labels: int
) -> None:
    model, images = build(), torch.rand(2, 3, 16, 16)
    labels = torch.randint(num_labels, (2, 16, 16))
    labels[:, :4] = IGNORE_INDEX

    def logits(images: Tensor) -> Tensor:
        maps = model(pixel_values=NORMALIZER(images)).logits
        return nn.functional.interpolate(maps, size=labels.shape[1:], mode="bilinear", align_corners=False)

    with torch.no_grad():
        plain = logits(images)
    inject_tokens(model, torch.randn(3, HIDDEN_SIZE))
    objective = pixel_cross_entropy_objective(logits, labels)
    adversarial = pgd_attack(objective, images, eps=16 / 255, num_steps=4)
    with torch.no_grad():
        assert logits(images).shape == plain.shape == (2, num_labels, 16, 16)
        assert not torch.allclose(logits(images), plain)
        assert (objective(adversarial) > objective(images)).all()
    assert (adversarial - images).abs().max() <= 16 / 255 + 1e-6
    # Pixels that don't count pull at nothing: whatever is said of them, the objective is the same.
    unlabelled = pixel_cross_entropy_objective(lambda x: logits(x) * (labels != IGNORE_INDEX)[:, None], labels)
    with torch.no_grad():
        torch.testing.assert_close(unlabelled(images), objective(images))


def masks_dataset(masks: list[Any]) -> datasets.Dataset:
    picture = Image.fromarray(np.full((6, 4, 3), 128, dtype=np.uint8))
    columns = {"photo": [picture] * len(masks), "annotation": masks}
    features = datasets.Features({"photo": datasets.Image(), "annotation": datasets.Image()})
    return datasets.Dataset.from_dict(columns, features=features)


@pytest.mark.parametrize("reduce", [False, True])
def test_masks_are_resized_to_the_nearest_pixel_and_reduced_on_request(reduce: bool) -> None:
    rows = [[0, 150], [255, 7]]
    dataset = masks_dataset([Image.fromarray(np.array(rows, dtype=np.uint8))])
    items = SegmentationDataset(
        dataset,
        image_size=4,
        image_column_name="photo",
        mask_column_name="annotation",
        do_reduce_labels=reduce,
    )
    assert len(items) == 1
    assert items[0]["images"].shape == (3, 4, 4)
    expected = torch.tensor([[255, 149], [255, 6]] if reduce else rows)
    assert items[0]["labels"].dtype == torch.int64
    assert torch.equal(items[0]["labels"], expected.repeat_interleave(2, 0).repeat_interleave(2, 1))
    batch = collate_images([items[0], items[0]])
    assert batch["labels"].shape == (2, 4, 4)
    assert batch["index"].tolist() == [0, 0]


def test_masks_of_16_bits_keep_their_classes() -> None:
    mask = Image.fromarray(np.array([[0, 300], [1000, 7]], dtype=np.uint16))
    names: dict[str, Any] = {"image_column_name": "photo", "mask_column_name": "annotation"}
    items = SegmentationDataset(masks_dataset([mask]), image_size=2, **names)
    assert items[0]["labels"].tolist() == [[0, 300], [1000, 7]]


@pytest.mark.parametrize(
    ("mask", "came"),
    [
        (None, "can't be read: ValueError: the row holds no image"),
        (Image.new("RGB", (4, 4)), "must have one channel of integers, got mode 'RGB'"),
        (Image.new("F", (4, 4)), "must have one channel of integers, got mode 'F'"),
        ({"bytes": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n", "path": None}, "can't be read: Unidentified"),
    ],
    ids=["none", "RGB", "F", "EPS"],
)
def test_what_is_no_mask_is_named(mask: Any, came: str) -> None:
    names: dict[str, Any] = {"image_column_name": "photo", "mask_column_name": "annotation"}
    items = SegmentationDataset(masks_dataset([mask]), image_size=4, **names)
    with pytest.raises(ValueError, match=f"the mask of row 0 {came}"):
        items[0]


def test_the_mask_column_must_hold_pictures() -> None:
    with pytest.raises(ValueError, match=r"mask_column_name must name one of .*, got 'mask'"):
        SegmentationDataset(masks_dataset([]), image_size=4, image_column_name="photo")


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(PREPARE))


def test_composites_follow_from_their_seed_and_their_masks_from_their_pixels(script: dict[str, Any]) -> None:
    load = script["load_segmentation"]
    dataset, again, other = (
        load("test", num_images=30),
        load("test", num_images=30),
        load("test", num_images=30, seed=1),
    )
    images, masks = (np.stack([np.asarray(row) for row in dataset[column]]) for column in ("image", "mask"))
    assert images.shape == masks.shape == (30, 28, 28)
    assert np.array_equal(np.stack([np.asarray(row) for row in again["image"]]), images)
    assert not np.array_equal(np.stack([np.asarray(row) for row in other["image"]]), images)
    # What is drawn decides what counts: nothing, a faint edge, cloth.
    assert np.array_equal(masks == 0, images == 0)
    assert np.array_equal(masks == 255, (images > 0) & (images < script["CLOTH_FROM"]))
    classes = set(np.unique(masks)) - {0, 255}
    assert classes <= set(range(1, script["NUM_LABELS"]))
    assert len(classes) > 5
    assert {len(set(np.unique(mask)) - {0, 255}) for mask in masks} == {1, 2}


def test_a_composite_shows_its_pictures_under_their_classes(script: dict[str, Any]) -> None:
    pictures = np.full((1, 28, 28), 200, dtype=np.uint8)
    canvas, mask = script["compose"](pictures, np.array([6]), np.random.default_rng(0))
    assert set(np.unique(mask)) <= {0, 7}
    assert np.array_equal(canvas, np.where(mask == 7, 200, 0))
    assert (mask == 7).sum() >= 20 * 20
