"""Whatever a user gives as a dataset becomes images in [0, 1], described and identified once."""

from typing import Any

import datasets
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset
from transformers import ViTImageProcessor

from robustness_tokens.data.image_datasets import (
    BrokenImage,
    ImageDataset,
    IterableImageDataset,
    SegmentationDataset,
    TensorImageDataset,
)
from robustness_tokens.data.prepare import prepare_images


def pictures(*sizes: tuple[int, int], **columns: Any) -> datasets.Dataset:
    rows = {name: [Image.new("RGB", size) for size in sizes] for name in ("image", *columns)}
    return datasets.Dataset.from_dict(
        {**rows, "label": [3] * len(sizes)},
        features=datasets.Features({**dict.fromkeys(rows, datasets.Image()), "label": datasets.Value("int64")}),
    )


def ready(num_images: int = 3, height: int = 4, width: int = 4) -> list[dict[str, Any]]:
    return [{"images": torch.full((3, height, width), row / 8), "labels": row} for row in range(num_images)]


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(ready())


def test_pictures_become_images_of_the_processors_size() -> None:
    processor = ViTImageProcessor(size={"height": 6, "width": 6})
    images = prepare_images(pictures((9, 5), (4, 4)), image_processor=processor)
    assert isinstance(images.dataset, ImageDataset)
    assert images.dataset[0].keys() == {"images", "index"}
    assert images.dataset[0]["images"].shape == (3, 6, 6)
    assert (images.num_images, images.shape, images.image_size) == (2, (6, 6), 6)
    assert images.description["num_images"] == 2
    smaller = prepare_images(pictures((9, 5)), image_processor=processor, image_size=3)
    assert smaller.image_size == 3
    with pytest.raises(ValueError, match="image_size must be given"):
        prepare_images(pictures((9, 5)))


def test_a_processor_may_leave_every_image_its_own_shape() -> None:
    processor = ViTImageProcessor(size={"shortest_edge": 6}, do_center_crop=False)
    images = prepare_images(pictures((9, 5)), resize="processor", image_processor=processor)
    assert images.shape is None
    assert images.image_size is None


def test_labels_and_masks_are_read_where_the_task_needs_them() -> None:
    classified = prepare_images(pictures((4, 4)), task="classification", image_size=4)
    assert classified.dataset[0]["labels"] == 3
    table = pictures((4, 4), mask=())
    table = table.map(lambda row: {"mask": row["mask"].convert("L")})
    segmented = prepare_images(table, task="segmentation", image_size=4)
    assert isinstance(segmented.dataset, SegmentationDataset)
    assert segmented.dataset[0]["labels"].shape == (4, 4)
    assert segmented.shape == (4, 4)
    for task, kept in (("features", False), ("classification", True), ("segmentation", True)):
        assert ("labels" in prepare_images(ready(), task=task).dataset[0]) == kept


def test_ready_images_keep_their_size_and_broken_ones() -> None:
    items: list[dict[str, Any]] = [{"broken_image": BrokenImage(7, None, "cut")}, *ready(height=2)]
    images = prepare_images(items, broken_images=True)
    assert isinstance(images.dataset, TensorImageDataset)
    assert images.dataset[0] == {"broken_image": BrokenImage(7, None, "cut"), "index": 0}
    assert (images.num_images, images.shape, images.image_size) == (4, (2, 4), [2, 4])
    assert images.description == {"num_images": 4}
    assert prepare_images(items[:1], broken_images=True).shape is None
    with pytest.raises(ValueError, match=r"dataset\[0\] must be a dict with 'images', got keys \['broken_image'\]"):
        prepare_images(items).dataset[0]
    unused: dict[str, Any]
    for unused in ({"image_size": 4}, {"image_column_name": "image"}):
        with pytest.raises(ValueError, match=f"{next(iter(unused))}=.* can't be applied to a list of ready images"):
            prepare_images(ready(), **unused)


def test_a_stream_is_shared_out_where_streams_will_do() -> None:
    stream = pictures(*[(4, 4)] * 6).to_iterable_dataset()
    parts: list[Any] = [
        prepare_images(stream, image_size=4, streams=True, rank=rank, world_size=2) for rank in range(2)
    ]
    assert all(isinstance(part.dataset, IterableImageDataset) for part in parts)
    assert sorted(item["index"] for part in parts for item in part.dataset) == list(range(6))
    assert (parts[0].num_images, parts[0].shape, parts[0].identity) == (None, (4, 4), None)
    assert prepare_images(given := Stream(), streams=True).dataset is given
    for dataset, task, streams in (
        (stream, "features", False),
        (Stream(), "features", False),
        (stream, "segmentation", True),
    ):
        with pytest.raises(ValueError, match="read by row, got a stream"):
            prepare_images(dataset, task=task, image_size=4, streams=streams)


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (
            datasets.DatasetDict({"test": pictures((4, 4))}),
            r"eval_dataset has the splits \['test'\].*\['test'\]",
        ),
        ([], "eval_dataset has no rows"),
        (iter([]), "eval_dataset must be a datasets.Dataset or a torch dataset .*, got a list_iterator"),
        ("folder", "eval_dataset must be .*, got a str: load pictures by load_image_dataset"),
    ],
    ids=["splits", "empty", "iterator", "name"],
)
def test_other_things_are_refused_by_the_arguments_name(dataset: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prepare_images(dataset, argument="eval_dataset", image_size=4)


def test_an_identity_tells_images_apart() -> None:
    def identity(images: list[Tensor]) -> str | None:
        return prepare_images([{"images": image} for image in images]).identity

    stored = [image["images"] for image in ready(80)][:8]
    assert identity(stored) == identity([image.clone() for image in stored])
    assert identity(stored) != identity([*stored[:-1], stored[-1] / 2])


@pytest.mark.parametrize("row", [0, 1, -1])
@pytest.mark.parametrize("made_of", ["pictures", "tensors"])
def test_every_image_and_label_counts_for_the_identity(made_of: str, row: int) -> None:
    def identity(change: str = "") -> str | None:
        images = [torch.full((3, 4, 4), value / 255) for value in range(40)]
        labels = list(range(40))
        images[row] = images[row] + 1 / 255 * (change == "image")
        labels[row] += change == "label"
        if made_of == "tensors":
            items = [{"images": image, "labels": label} for image, label in zip(images, labels, strict=True)]
            return prepare_images(items, task="classification").identity
        shown = [Image.fromarray((255 * image).round().byte().permute(1, 2, 0).numpy()) for image in images]
        features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
        table = datasets.Dataset.from_dict({"image": shown, "label": labels}, features=features)
        return prepare_images(table, task="classification", image_size=4).identity

    assert identity() == identity()
    assert len({identity(), identity("image"), identity("label")}) == 3


def test_the_preprocessing_counts_for_the_identity() -> None:
    table = pictures((6, 4))
    processors = [ViTImageProcessor(size={"height": size, "width": size}) for size in (4, 5)]
    found = [prepare_images(table, image_size=size).identity for size in (4, 5)]
    found += [prepare_images(table, resize="processor", image_processor=one).identity for one in processors]
    assert len(set(found)) == len(found)


def test_images_that_differ_at_each_reading_have_no_identity() -> None:
    class Augmented(Dataset[Any]):
        def __len__(self) -> int:
            return 20

        def __getitem__(self, row: int) -> dict[str, Tensor]:
            return {"images": torch.rand(3, 4, 4)}

    assert prepare_images(Augmented()).identity is None


PROCESSOR = ViTImageProcessor(size={"height": 6, "width": 4})


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({}, (6, 4)),  # a rectangle, as the processor makes
        ({"recipe": {}}, (6, 4)),
        ({"recipe": {"resize": "squash", "image_size": 5}}, (5, 5)),
        ({"recipe": {"resize": "squash", "image_size": [3, 5]}}, (3, 5)),
        ({"recipe": {"resize": "processor", "image_size": [6, 4]}}, (6, 4)),
        ({"recipe": {"resize": "processor", "image_size": 5}, "image_size": 3}, (3, 3)),
        ({"recipe": {"image_size": 5}, "resize": "processor"}, (6, 4)),
        ({"image_size": (3, 5)}, (3, 5)),
    ],
)
@pytest.mark.parametrize("task", ["features", "segmentation"])
def test_pictures_are_resized_as_the_recipe_says(options: dict[str, Any], shape: tuple[int, int], task: str) -> None:
    table = pictures((9, 7))
    if task == "segmentation":
        table = pictures((9, 7), mask=()).map(lambda row: {"mask": row["mask"].convert("L")})
    images = prepare_images(table, task=task, image_processor=PROCESSOR, **options)
    if task == "features" or options.get("resize") is None:
        assert images.shape == shape
        assert images.dataset[0]["images"].shape == (3, *shape)
    if task == "segmentation":
        assert images.dataset[0]["labels"].shape == images.dataset[0]["images"].shape[1:]
    assert prepare_images(images.dataset).dataset is images.dataset, "prepared already"


@pytest.mark.parametrize("image_size", [0, 5000, [4], [4, 4, 4], [4, 0], [4, 5.0], "4"])
def test_sizes_that_are_none_are_refused(image_size: Any) -> None:
    for options in ({"image_size": image_size}, {"recipe": {"image_size": image_size}}):
        with pytest.raises(ValueError, match="image_size must be"):
            prepare_images(pictures((9, 7)), image_processor=PROCESSOR, **options)


def test_the_numbering_of_labels_counts_for_the_identity() -> None:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["dog", "cat"])})
    rows = {"image": [Image.new("RGB", (4, 4))] * 2, "label": [0, 1]}
    table = datasets.Dataset.from_dict(rows, features=features)
    found = [
        prepare_images(table, task="classification", image_size=4, label_names=names).identity
        for names in (None, ["dog", "cat"], ["cat", "dog"])
    ]
    assert len(set(found)) == 3


def test_a_transform_of_the_users_own_is_read() -> None:
    def dark(picture: Image.Image) -> Tensor:
        return torch.zeros(3, 4, 4)

    def light(picture: Image.Image) -> Tensor:
        return torch.ones(3, 4, 4)

    found = [prepare_images(ImageDataset(pictures((4, 4)), transform)).identity for transform in (dark, light)]
    assert None not in found
    assert len(set(found)) == 2
