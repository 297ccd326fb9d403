import os
import pickle
import runpy
import subprocess
import sys
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from robustness_tokens.data import image_datasets
from robustness_tokens.data.image_datasets import (
    BrokenImage,
    BrokenImageLog,
    ImageDataset,
    IterableImageDataset,
    TensorImageDataset,
    build_dataloader,
    choose_rows,
    collate_images,
    validate_images,
)
from robustness_tokens.data.labels import LabelReader
from robustness_tokens.data.loading import find_image_column, find_label_column, load_image_dataset
from robustness_tokens.data.prepare import prepare_images
from robustness_tokens.data.preprocessing import ImageTransform, to_rgb


NUM_IMAGES = 6
TRANSFORM = ImageTransform(image_size=4)


def picture(value: int, size: int = 4) -> Image.Image:
    return Image.new("RGB", (size, size), (value, 2 * value, 3 * value))


def encoded(image: Image.Image) -> dict[str, Any]:
    file = BytesIO()
    image.save(file, "png")
    return {"bytes": file.getvalue(), "path": None}


def table(
    pictures: list[Any], *, image: str = "image", label: str = "label", **columns: list[Any]
) -> datasets.Dataset:
    features: dict[str, Any] = {image: datasets.Image(), label: datasets.ClassLabel(names=["even", "odd"])}
    rows = {image: pictures, label: [row % 2 for row in range(len(pictures))], **columns}
    inferred = datasets.Dataset.from_dict(columns).features
    return datasets.Dataset.from_dict(rows, features=datasets.Features({**features, **inferred}))


def small_table() -> datasets.Dataset:
    return table([encoded(picture(row)) for row in range(NUM_IMAGES)])


def values(batches: Any) -> list[int]:
    """The red 8-bit value that `picture` gave each image, in order."""
    return [round(255 * red) for batch in batches for red in batch["images"][:, 0, 0, 0].tolist()]


# Loading


def write_source(kind: str, folder: Path) -> Path:
    dataset = small_table()
    if kind == "imagefolder":
        for split in ("train", "test"):
            for row in range(NUM_IMAGES):
                file = folder / split / ("even", "odd")[row % 2] / f"{row}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                picture(row).save(file)
    elif kind == "parquet folder":
        for split in ("train", "test"):
            dataset.to_parquet(folder / f"{split}.parquet")
    elif kind == "parquet file":
        dataset.to_parquet(folder / "pictures.parquet")
        return folder / "pictures.parquet"
    elif kind == "saved dataset":
        dataset.save_to_disk(folder / "saved")
        return folder / "saved"
    else:
        datasets.DatasetDict({"train": dataset, "test": dataset}).save_to_disk(folder / "saved")
        return folder / "saved"
    return folder


SOURCES = ["imagefolder", "parquet folder", "parquet file", "saved dataset", "saved splits"]


@pytest.mark.parametrize("kind", SOURCES)
def test_sources_load_map_style(kind: str, tmp_path: Path) -> None:
    source = write_source(kind, tmp_path)
    dataset = load_image_dataset(source, cache_dir=tmp_path / "cache")
    items = ImageDataset(dataset, TRANSFORM)
    assert sorted(values([collate_images([items[row] for row in range(len(items))])])) == list(range(NUM_IMAGES))
    assert [items[row]["index"] for row in range(NUM_IMAGES)] == list(range(NUM_IMAGES))
    assert all(item["labels"] == values([collate_images([item])])[0] % 2 for item in (items[0], items[5]))


@pytest.mark.parametrize("kind", SOURCES)
def test_sources_load_streaming(kind: str, tmp_path: Path) -> None:
    source = write_source(kind, tmp_path)
    stream = load_image_dataset(source, streaming=True, cache_dir=tmp_path / "cache")
    assert isinstance(stream, datasets.IterableDataset)
    items = list(IterableImageDataset(stream, TRANSFORM))
    assert sorted(values([collate_images(items)])) == list(range(NUM_IMAGES))
    assert [item["index"] for item in items] == list(range(NUM_IMAGES))
    assert all(item["labels"] == round(255 * item["images"][0, 0, 0].item()) % 2 for item in items)


def test_slices_of_splits(tmp_path: Path) -> None:
    source = write_source("parquet folder", tmp_path)
    assert len(load_image_dataset(source, split="test[:2]", cache_dir=tmp_path / "cache")) == 2


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", SOURCES)
def test_an_unknown_split_lists_the_splits(kind: str, streaming: bool, tmp_path: Path) -> None:
    source = write_source(kind, tmp_path)
    with pytest.raises(ValueError, match=r"split='validation'.*train") as error:
        load_image_dataset(source, split="validation", streaming=streaming, cache_dir=tmp_path / "cache")
    assert ("test" in str(error.value).partition("train")[2]) == (kind not in ("parquet file", "saved dataset"))


def write_pictures(root: Path, *files: str) -> Path:
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        picture(1).save(root / file)
    return root


@pytest.mark.parametrize(
    ("folders", "split", "classes", "count"),
    [
        (("bus", "car", "train_station"), "train", ["bus", "car", "train_station"], 6),
        (("flask", "test_tube"), "train", ["flask", "test_tube"], 4),
        (("test_tube", "train_station"), "train", ["test_tube", "train_station"], 4),
        (("bus", "train"), "train", ["bus", "train"], 4),
        (("data/val", "data/bus"), "train", ["bus", "val"], 4),
        (("train/test_tube", "train/bus", "test/bus", "test/test_tube"), "test", ["bus", "test_tube"], 4),
        (("images/train2017/a", "images/val2017/a", "images/val2017/b"), "validation", ["a", "b"], 4),
        (("training_set/a", "training_set/b", "eval/a", "eval/b"), "test", ["a", "b"], 4),
        (("a[1]/b", "a[1]/dev_kit"), "train", ["b", "dev_kit"], 4),
    ],
)
def test_words_of_splits_in_names_of_classes_lose_no_picture(
    folders: tuple[str, ...], split: str, classes: list[str], count: int, tmp_path: Path
) -> None:
    source = write_pictures(tmp_path / "source", *(f"{folder}/{row}.png" for folder in folders for row in range(2)))
    for streaming in (False, True):
        dataset = load_image_dataset(source, split=split, streaming=streaming, cache_dir=tmp_path / "cache")
        assert dataset.features is not None
        assert dataset.features["label"].names == classes
        assert len(list(dataset)) == count


def test_pictures_without_folders_are_one_split(tmp_path: Path) -> None:
    source = write_pictures(tmp_path / "source", "train_0.png", "test_1.png", "test.png", ".hidden/2.png")
    assert len(load_image_dataset(source, cache_dir=tmp_path / "cache")) == 3


def test_a_folder_that_says_what_it_holds_is_left_alone(tmp_path: Path) -> None:
    source = write_pictures(tmp_path / "source", "train/0.png", "test_tube/0.png")
    configs = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: train/*\n---\n"
    (source / "README.md").write_text(configs)
    assert len(load_image_dataset(source, cache_dir=tmp_path / "cache")) == 1
    table = write_source("parquet folder", tmp_path / "table")
    write_pictures(table, "assets/logo.png")
    assert len(load_image_dataset(table, split="test", cache_dir=tmp_path / "cache")) == NUM_IMAGES


@pytest.mark.parametrize(("second", "count"), [("test_tube", 2), ("test", 1)])
def test_metadata_keep_their_pictures(second: str, count: int, tmp_path: Path) -> None:
    source = write_pictures(tmp_path / "source", "train/0.png", f"{second}/0.png")
    (source / "metadata.csv").write_text(f"file_name,caption\ntrain/0.png,b\n{second}/0.png,c\n")
    dataset = load_image_dataset(source, cache_dir=tmp_path / "cache")
    assert len(dataset) == count
    assert second == "test" or sorted(dataset["caption"]) == ["b", "c"]


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("source/source.py", b"x", "Dataset scripts are no longer supported, but found source.py"),
        ("source/a.zip", b"PK\x03\x04broken", "not a zip file"),
        ("source/a.tar", b"bad" * 300, "invalid header"),
        ("source/a.tar.gz", b"\x1f\x8bbroken", "header"),
        ("source/a.parquet", b"PAR1broken", "Parquet magic bytes not found"),
        ("source/state.json", b"{", "damaged"),
    ],
)
def test_damaged_and_unknown_sources_end_in_one_clear_error(
    file: str, content: bytes, message: str, tmp_path: Path
) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match=rf"source'.*can't be loaded.*{message}"):
        load_image_dataset(tmp_path / "source", cache_dir=tmp_path / "cache")


@pytest.mark.parametrize("kind", ["struct", "bytes alone", "binary"])
def test_parquet_without_a_schema_of_datasets_holds_pictures(kind: str, tmp_path: Path) -> None:
    stored = encoded(picture(7))
    cell = {
        "struct": {**stored, "path": "7.png"},
        "bytes alone": {"bytes": stored["bytes"]},
        "binary": stored["bytes"],
    }
    pq.write_table(pa.table({"photo": pa.array([cell[kind]]), "label": [1]}), tmp_path / "a.parquet")
    for streaming in (False, True):
        dataset = load_image_dataset(tmp_path / "a.parquet", streaming=streaming, cache_dir=tmp_path / "cache")
        if kind == "binary":
            with pytest.raises(
                ValueError, match=r"name the one that holds it by image_column_name.*'photo' \(binary\)"
            ):
                find_image_column(dataset)
        column = "photo" if kind == "binary" else None
        make: Any = IterableImageDataset if streaming else ImageDataset
        (item,) = make(dataset, TRANSFORM, image_column_name=column)
        assert torch.equal(item["images"], TRANSFORM(picture(7)))
        assert item["labels"] == 1


# Classes


def labelled(labels: list[Any], names: list[str] | None) -> datasets.Dataset:
    kind = "string" if isinstance(labels[0], str) else "int64"
    label = datasets.Value(kind) if names is None else datasets.ClassLabel(names=names)
    rows = {"image": [encoded(picture(row)) for row in range(len(labels))], "label": labels}
    return datasets.Dataset.from_dict(rows, features=datasets.Features({"image": datasets.Image(), "label": label}))


MODEL_NAMES = ["T-shirt/top", "Dress", "Bag"]


@pytest.mark.parametrize(
    ("labels", "names", "expected"),
    [
        ([0, 1, 2], ["Bag", "Dress", "T-shirt/top"], [2, 1, 0]),
        ([0, 1, 2], ["bag", "dress", "t_shirt / TOP"], [2, 1, 0]),  # spellings
        ([0, 1, 1], ["Bag", "T-shirt/top"], [2, 0, 0]),  # a part of the classes
        ([0, 1, 2], MODEL_NAMES, [0, 1, 2]),
        (["Bag", "dress"], None, [2, 1]),  # words
        ([2, 0], None, [2, 0]),  # numbers without names
        ([-1, 2], ["Bag", "Dress", "T-shirt/top"], [-1, 0]),  # no label: refused by its range
    ],
)
def test_labels_are_matched_by_name(labels: list[Any], names: list[str] | None, expected: list[int]) -> None:
    dataset = labelled(labels, names)
    items = ImageDataset(dataset, TRANSFORM, label_names=MODEL_NAMES)
    assert [items[row]["labels"] for row in range(len(labels))] == expected
    assert items.labels == set(expected)
    stream = IterableImageDataset(dataset.to_iterable_dataset(), TRANSFORM, label_names=MODEL_NAMES)
    assert [item["labels"] for item in stream] == expected


def test_without_names_of_the_model_numbers_stay() -> None:
    items = ImageDataset(labelled([1, 0], ["Bag", "Dress"]), TRANSFORM)
    assert [items[row]["labels"] for row in range(2)] == [1, 0]
    assert items.label_names == ["Bag", "Dress"]


@pytest.mark.parametrize(
    ("names", "model_names", "message"),
    [
        (
            ["Bag", "Shoe"],
            MODEL_NAMES,
            r"such as 'Shoe'.* has 'Bag', 'Shoe', the model 'T-shirt/top', 'Dress', 'Bag'.*index",
        ),
        (["crane", "ox"], ["crane", "ox", "crane"], "different classes, such as 'crane'"),  # which of the two?
        ([f"n{row}" for row in range(30)], MODEL_NAMES, r"'n11', ... \(30 in all\)"),
    ],
)
def test_other_classes_are_refused_with_both_lists(names: list[str], model_names: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageDataset(labelled([0, 1], names), TRANSFORM, label_names=model_names)


class Torchvision(list[Any]):
    """Image and class, as torchvision's datasets give them, with the names of the classes."""

    classes = ("Bag", "Dress", "T-shirt/top")


def test_names_of_ready_images_count_too() -> None:
    tuples = Torchvision([(torch.rand(3, 4, 4), torch.tensor(row)) for row in range(3)])
    ready = prepare_images(tuples, task="classification", label_names=MODEL_NAMES).dataset
    assert [int(ready[row]["labels"]) for row in range(3)] == [2, 1, 0]
    table = ImageDataset(labelled([0, 1], ["Bag", "Dress"]), TRANSFORM)
    again = prepare_images(table, task="classification", label_names=MODEL_NAMES).dataset
    assert [again[row]["labels"] for row in range(2)] == [2, 1]
    # Labels that are matched already are matched once.
    matched = ImageDataset(labelled([0, 1], ["Bag", "Dress"]), TRANSFORM, label_names=MODEL_NAMES)
    once = prepare_images(matched, task="classification", label_names=MODEL_NAMES).dataset
    assert [once[row]["labels"] for row in range(2)] == [2, 1]
    with pytest.raises(ValueError, match="different classes"):
        prepare_images(tuples, task="classification", label_names=["cat", "dog"])
    assert prepare_images(tuples, label_names=["cat", "dog"]).dataset[0].keys() == {"images", "index"}


def test_two_classes_of_one_name_are_no_problem_in_the_same_order() -> None:
    names = ["crane", "ox", "crane"]
    with pytest.raises(ValueError, match="are duplicated"):
        datasets.ClassLabel(names=names)
    reader = LabelReader(names, names)
    assert [reader(number) for number in range(3)] == [0, 1, 2]


def test_one_name_in_a_hundred_may_be_spelt_otherwise_where_all_others_stand_in_place() -> None:
    model_names = [f"class {row}" for row in range(200)]
    model_names[17] = model_names[150] = "crane"
    names = list(model_names)
    names[150] = "crane2"  # as in ImageNet on the Hub: a dataset can't have two classes of one name
    reader = LabelReader(names, model_names)
    assert [reader(number) for number in range(200)] == list(range(200))
    with pytest.raises(ValueError, match="different classes, such as 'crane'"):
        LabelReader([*names[1:], names[0]], model_names)
    with pytest.raises(ValueError, match="different classes, such as 'crane'"):
        LabelReader(names[:199], model_names)
    names[3] = "cat"
    with pytest.raises(ValueError, match="different classes, such as 'cat'"):
        LabelReader(names, model_names)


@pytest.mark.parametrize(
    ("labels", "model_names", "message"),
    [
        (
            ["Bag", "Shoe"],
            MODEL_NAMES,
            "label 'Shoe' must be a class of the model, one of 'T-shirt/top', 'Dress', 'Bag'",
        ),
        (["Bag"], None, r"labels are words, such as 'Bag', .*class_encode_column"),
        ([0, None], None, "1 rows have no 'label': filter"),
    ],
)
def test_labels_that_are_no_class_are_found_without_a_picture(
    labels: list[Any], model_names: list[str] | None, message: str
) -> None:
    items = ImageDataset(labelled(labels, None), TRANSFORM, label_names=model_names)
    items.transform = None  # type: ignore[assignment]
    with pytest.raises(ValueError, match=message):
        _ = items.labels


def test_labels_of_chosen_rows_alone_count() -> None:
    items = ImageDataset(labelled([0, 7, 1, 0], None).select([3, 2]), TRANSFORM)
    assert items.labels == {0, 1}


def test_a_saved_split_keeps_its_name(tmp_path: Path) -> None:
    dataset = load_image_dataset(write_source("imagefolder", tmp_path), split="test", cache_dir=tmp_path / "cache")
    dataset.save_to_disk(tmp_path / "saved")
    assert len(load_image_dataset(tmp_path / "saved", split="test")) == NUM_IMAGES
    with pytest.raises(ValueError, match=r"split='train'.*holds 'test'"):
        load_image_dataset(tmp_path / "saved")


@pytest.mark.parametrize("source", ["missing", "missing/pictures", "missing/pictures/here", "pictures.parquet"])
def test_a_missing_source_is_named(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=f"name_or_path='{source}'.*no such file or folder here"):
        load_image_dataset(source, cache_dir=tmp_path)


def test_sources_that_are_no_data_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match=r"empty.*doesn't contain any data files"):
        load_image_dataset(tmp_path / "empty", cache_dir=tmp_path / "cache")
    with pytest.raises(ValueError, match=r"must be a .parquet file, a folder or a Hub id, got .*notes.txt'"):
        load_image_dataset(tmp_path / "notes.txt")


def test_arguments_without_a_use_are_refused(tmp_path: Path) -> None:
    file = write_source("parquet file", tmp_path)
    with pytest.raises(ValueError, match="name='small'"):
        load_image_dataset(file, name="small")
    with pytest.raises(ValueError, match="revision='main'"):
        load_image_dataset(file, revision="main")


# Columns


def test_no_image_column_lists_the_columns() -> None:
    dataset = datasets.Dataset.from_dict({"file": ["a.png"], "kind": [3]})
    with pytest.raises(ValueError, match=r"no column of datasets.Image.*'file' \(string\), 'kind' \(int64\)"):
        find_image_column(dataset)
    with pytest.raises(ValueError, match=r"no column of datasets.Image"):
        ImageDataset(dataset, TRANSFORM)


def test_two_image_columns_must_be_named() -> None:
    dataset = small_table()
    dataset = dataset.add_column("mask", [encoded(picture(row + 50)) for row in range(NUM_IMAGES)])
    dataset = dataset.cast_column("mask", datasets.Image())
    with pytest.raises(ValueError, match=r"several columns of datasets.Image, \['image', 'mask'\].*image_column_name"):
        find_image_column(dataset)
    assert find_image_column(dataset, "mask") == "mask"
    items = ImageDataset(dataset, TRANSFORM, image_column_name="mask")
    assert values([collate_images([items[2]])]) == [52]


@pytest.mark.parametrize("named", ["photo", "label"])
def test_a_named_image_column_is_checked(named: str) -> None:
    message = f"image_column_name must name one of the dataset's columns of datasets.Image, got '{named}'"
    with pytest.raises(ValueError, match=message + r"; its columns are 'image' \(Image\), 'label' \(ClassLabel\)"):
        find_image_column(small_table(), named)


@pytest.mark.parametrize(
    ("features", "named", "expected"),
    [
        ({"kind": datasets.ClassLabel(names=["a"])}, None, "kind"),
        ({"label": datasets.Value("int64"), "kind": datasets.ClassLabel(names=["a"])}, None, "kind"),
        ({"labels": datasets.Value("uint8")}, None, "labels"),
        ({"label": datasets.Value("string"), "kind": datasets.Value("int64")}, None, "label"),
        ({"cls": datasets.Value("int64"), "__key__": datasets.Value("string")}, None, "cls"),  # webdataset
        ({"kind": datasets.Value("string"), "size": datasets.Value("int64")}, None, None),
        ({"kind": datasets.Value("string"), "size": datasets.Value("int64")}, "kind", "kind"),
        ({"label": datasets.Value("string"), "kind": datasets.Value("int64")}, "kind", "kind"),
    ],
)
def test_label_columns(features: dict[str, Any], named: str | None, expected: str | None) -> None:
    dataset = datasets.Dataset.from_dict({column: [] for column in features}, features=datasets.Features(features))
    assert find_label_column(dataset, named) == expected


def test_ambiguous_and_wrong_labels_are_refused() -> None:
    features = {"fine": datasets.ClassLabel(names=["a"]), "coarse": datasets.ClassLabel(names=["a"])}
    features["label"] = datasets.Value("float32")
    dataset = datasets.Dataset.from_dict({column: [] for column in features}, features=datasets.Features(features))
    with pytest.raises(ValueError, match=r"several columns of class labels, \['fine', 'coarse'\].*label_column_name"):
        find_label_column(dataset)
    with pytest.raises(ValueError, match=r"label_column_name must name .* columns of class labels, got 'label'"):
        find_label_column(dataset, "label")


def test_a_stream_with_unknown_features_is_looked_at() -> None:
    stream = small_table().to_iterable_dataset().map(lambda row: {"photo": row["image"]}, remove_columns=["image"])
    assert stream.features is None
    assert find_image_column(stream) == "photo"
    assert find_label_column(stream) == "label"
    assert values([collate_images(list(IterableImageDataset(stream, TRANSFORM)))]) == list(range(NUM_IMAGES))
    with pytest.raises(ValueError, match=r"'label' \(int64\)"):
        find_image_column(stream.remove_columns("photo"))


# Items


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1"])
def test_rgb_is_forced(mode: str) -> None:
    items = ImageDataset(table([encoded(picture(40).convert(mode))]), TRANSFORM)
    assert torch.equal(items[0]["images"], TRANSFORM(picture(40).convert(mode)))
    assert items[0]["images"].shape == (3, 4, 4)


def test_orientation_is_left_as_stored() -> None:
    file = BytesIO()
    exif = Image.Exif()
    exif[Image.ExifTags.Base.Orientation] = 3  # upside down
    stored = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
    stored.save(file, "png", exif=exif)
    items = ImageDataset(table([{"bytes": file.getvalue(), "path": None}]), TRANSFORM)
    assert torch.equal(items[0]["images"], TRANSFORM(stored))


def test_a_format_is_undone_and_a_transform_refused() -> None:
    formatted = small_table().with_format("numpy")
    assert torch.equal(ImageDataset(formatted, TRANSFORM)[3]["images"], TRANSFORM(picture(3)))
    with pytest.raises(ValueError, match="with_transform"):
        ImageDataset(small_table().with_transform(lambda rows: rows), TRANSFORM)


def test_a_row_without_a_label_is_named() -> None:
    dataset = datasets.Dataset.from_dict(
        {"image": [encoded(picture(1))], "label": [None]},
        features=datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")}),
    )
    with pytest.raises(ValueError, match="row 0 has no 'label'"):
        ImageDataset(dataset, TRANSFORM)[0]


def test_datasets_can_be_pickled() -> None:
    items = pickle.loads(pickle.dumps(ImageDataset(small_table(), TRANSFORM)))
    assert torch.equal(items[4]["images"], TRANSFORM(picture(4)))


# Broken images


def table_with_broken_rows(folder: Path) -> datasets.Dataset:
    """Whole rows 0, 3, 6; broken: no picture, a cut-off file, a missing file, nothing at all."""
    whole = [encoded(picture(row)) for row in range(7)]
    (folder / "cut.png").write_bytes(encoded(picture(1, size=64))["bytes"][:-40])
    whole[1] = {"bytes": b"not a picture", "path": "inside.png"}
    whole[2] = {"bytes": None, "path": str(folder / "cut.png")}
    whole[4] = {"bytes": None, "path": str(folder / "gone.png")}
    return table([*whole[:5], None, whole[6]])


def check_broken(batches: list[dict[str, Any]], folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert values(batches) == [0, 3, 6]
    assert torch.cat([batch["index"] for batch in batches]).tolist() == [0, 3, 6]
    assert torch.cat([batch["labels"] for batch in batches]).tolist() == [0, 1, 0]
    log = BrokenImageLog()
    for batch in [*batches, *batches]:  # two epochs: a row counts once
        log.update(batch)
    assert list(log.broken_images) == [1, 2, 4, 5]
    assert log.broken_images[2].path == str(folder / "cut.png")
    assert caplog.text.count("Skipped a broken image") == 4
    assert "row 1 ('inside.png'): UnidentifiedImageError" in caplog.text
    assert f"row 4 ({str(folder / 'gone.png')!r}): FileNotFoundError" in caplog.text
    assert "row 5: ValueError: the row holds no image" in caplog.text


@pytest.mark.parametrize("num_workers", [0, 2])
def test_broken_images_are_skipped_and_counted(
    num_workers: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    items = ImageDataset(table_with_broken_rows(tmp_path), TRANSFORM)
    loader = build_dataloader(items, batch_size=3, shuffle=False, num_workers=num_workers)
    batches = list(loader)
    assert [len(batch["broken_images"]) for batch in batches] == [2, 2, 0]
    check_broken(batches, tmp_path, caplog)


def test_broken_images_of_a_stream_are_skipped_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stream = table_with_broken_rows(tmp_path).to_iterable_dataset()
    loader = build_dataloader(IterableImageDataset(stream, TRANSFORM), batch_size=3, shuffle=False)
    check_broken(list(loader), tmp_path, caplog)


def test_too_many_broken_images_are_an_error(tmp_path: Path) -> None:
    items = ImageDataset(table_with_broken_rows(tmp_path), TRANSFORM)
    batch = collate_images([items[row] for row in range(7)])
    BrokenImageLog(max_broken_images=4).update(batch)
    with pytest.raises(ValueError, match=r"4 broken images, more than max_broken_images=3") as error:
        BrokenImageLog(max_broken_images=3).update(batch)
    assert all(f"row {row}" in str(error.value) for row in (1, 2, 4, 5))
    with pytest.raises(ValueError, match="max_broken_images must be at least 0, got -1"):
        BrokenImageLog(max_broken_images=-1)


def test_a_wholly_broken_batch_is_empty(tmp_path: Path) -> None:
    items = ImageDataset(table_with_broken_rows(tmp_path), TRANSFORM)
    batch = collate_images([items[4], items[5]])
    assert batch["images"].shape == (0, 3, 0, 0)
    assert batch["index"].shape == batch["labels"].shape == (0,)
    assert [image.index for image in batch["broken_images"]] == [4, 5]
    validate_images(batch["images"])


def test_a_decompression_bomb_is_a_broken_image(monkeypatch: pytest.MonkeyPatch) -> None:
    items = ImageDataset(table([encoded(picture(1, size=20))]), TRANSFORM)
    assert "images" in items[0]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert items[0]["broken_image"].reason.startswith("DecompressionBombError")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300)  # Pillow itself only warns below 600
    reason = items[0]["broken_image"].reason
    assert "it has 20 x 20 pixels, more than 300: make it smaller, or set the environment variable" in reason
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert "images" in items[0]


@pytest.mark.parametrize(("size", "is_whole"), [((1, 200), True), ((1, 201), False), ((20_000, 3), False)])
def test_a_strip_would_be_scaled_to_a_huge_picture(size: tuple[int, int], is_whole: bool) -> None:
    item = ImageDataset(table([encoded(Image.new("L", size))]), TRANSFORM)[0]
    assert ("images" in item) == is_whole
    assert is_whole or "one side 200 times the other" in item["broken_image"].reason


def test_the_environment_raises_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1)  # and restored afterwards
    monkeypatch.setenv("ROBTOK_MAX_IMAGE_PIXELS", "12345678901")
    runpy.run_module("robustness_tokens.data.image_datasets")
    assert Image.MAX_IMAGE_PIXELS == 12345678901


@pytest.mark.parametrize("source", ["bytes", "path"])
def test_a_picture_that_another_program_would_decode_is_a_broken_image(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(*_: Any, **__: Any) -> None:
        raise AssertionError("a program was started")

    for name in ("Popen", "check_call", "check_output", "run"):
        monkeypatch.setattr(subprocess, name, start)
    picture(1).save(path := tmp_path / "a.eps")
    stored = {"bytes": path.read_bytes(), "path": None} if source == "bytes" else {"bytes": None, "path": str(path)}
    reason = ImageDataset(table([stored]), TRANSFORM)[0]["broken_image"].reason
    assert reason.startswith("UnidentifiedImageError")


@pytest.mark.parametrize("file_format", ["AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP"])
def test_formats_of_pictures(file_format: str) -> None:
    picture(1).save(file := BytesIO(), file_format)
    assert "images" in ImageDataset(table([{"bytes": file.getvalue(), "path": None}]), TRANSFORM)[0]


@pytest.mark.parametrize("place", ["/dev/zero", "pipe"])
def test_a_path_without_an_end_is_a_broken_image(place: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    stored = {"bytes": None, "path": str(tmp_path / place)}  # an absolute place wins
    assert ImageDataset(table([stored]), TRANSFORM)[0]["broken_image"].reason.endswith("is no regular file")


@pytest.mark.parametrize("mode", ["L", "P", "LA", "RGBA", "PA", "CMYK", "I;16", "1"])
def test_a_large_picture_is_converted_in_strips(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (11, 7, 4), dtype=np.uint8)
    if mode == "I;16":
        image = Image.fromarray(pixels.view(np.uint16)[..., 0])
    else:
        image = (
            Image.fromarray(pixels)
            .convert("RGB" if mode in ("P", "CMYK", "1") else "LA" if mode == "PA" else "RGBA")
            .convert(mode)
        )
    if mode == "P":
        image.info["transparency"] = 3
    expected = np.array(to_rgb(image))
    monkeypatch.setattr(image_datasets, "_STRIP_PIXELS", 30)
    assert np.array_equal(np.array(image_datasets._to_rgb_in_strips(image)), expected)


# Without labels


def without_usable_labels() -> list[datasets.Dataset]:
    classes = datasets.ClassLabel(names=["a", "b"])
    features = datasets.Features({"image": datasets.Image(), "fine": classes, "coarse": classes})
    rows = [encoded(picture(row)) for row in range(2)]
    two = datasets.Dataset.from_dict({"image": rows, "fine": [0, 1], "coarse": [1, 0]}, features=features)
    null = table([encoded(picture(row)) for row in range(2)]).remove_columns("label")
    features = datasets.Features({**null.features, "label": datasets.ClassLabel(names=["a"])})
    return [two, datasets.Dataset.from_dict({"image": rows, "label": [0, None]}, features=features)]


@pytest.mark.parametrize("dataset", without_usable_labels(), ids=["two labels", "null"])
def test_labels_are_not_looked_at_where_nobody_wants_them(dataset: datasets.Dataset) -> None:
    with pytest.raises(ValueError, match=r"several columns|has no 'label'"):
        ImageDataset(dataset, TRANSFORM)[1]
    items = ImageDataset(dataset, TRANSFORM, with_labels=False)
    stream = IterableImageDataset(dataset.to_iterable_dataset(), TRANSFORM, with_labels=False)
    for item in (items[1], list(stream)[1]):
        assert item.keys() == {"images", "index"}
        assert (item["images"][0] * 255).round().unique().tolist() == [1]
    with pytest.raises(ValueError, match="leave one of them out"):
        ImageDataset(dataset, TRANSFORM, label_column_name="label", with_labels=False)


# Batches


def test_batches_do_not_depend_on_workers() -> None:
    items = ImageDataset(small_table(), TRANSFORM)
    passes = []
    global_state = torch.get_rng_state()
    for num_workers in (0, 2):
        loader = build_dataloader(items, batch_size=4, shuffle=True, seed=5, num_workers=num_workers)
        passes.append([batch for _ in range(2) for batch in loader])  # two epochs
    assert torch.equal(torch.get_rng_state(), global_state)
    for alone, shared in zip(*passes, strict=True):
        assert alone.keys() == shared.keys() == {"images", "index", "labels", "broken_images"}
        assert all(torch.equal(alone[key], shared[key]) for key in ("images", "index", "labels"))
    epochs = [torch.cat([batch["index"] for batch in passes[0][start : start + 2]]).tolist() for start in (0, 2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(NUM_IMAGES))
    assert epochs[0] != epochs[1]


def test_drop_last() -> None:
    items = ImageDataset(small_table(), TRANSFORM)
    assert len(list(build_dataloader(items, batch_size=4, shuffle=False, drop_last=True))) == 1


@pytest.mark.parametrize("num_shards", [1, 4])
def test_streams_are_shared_out_without_loss_or_repetition(num_shards: int) -> None:
    dataset = table([encoded(picture(row)) for row in range(16)])
    batches: list[dict[str, Any]] = []
    for rank in range(2):
        stream = dataset.to_iterable_dataset(num_shards)
        items = IterableImageDataset(stream, TRANSFORM, rank=rank, world_size=2)
        batches.extend(build_dataloader(items, batch_size=3, shuffle=False, num_workers=2))
    assert sorted(values(batches)) == list(range(16))
    index = torch.cat([batch["index"] for batch in batches])
    assert len(index.unique()) == 16


def test_a_shuffled_stream_changes_order_with_the_epoch() -> None:
    items = IterableImageDataset(small_table().to_iterable_dataset(3).shuffle(seed=0, buffer_size=6), TRANSFORM)
    orders = []
    for epoch in (0, 1, 0):
        items.set_epoch(epoch)
        orders.append(values(build_dataloader(items, batch_size=2, shuffle=False)))
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(NUM_IMAGES))
    assert orders[0] == orders[2] != orders[1]
    with pytest.raises(ValueError, match="shuffle=True with a stream"):
        build_dataloader(items, batch_size=2, shuffle=True)


def test_images_of_different_shapes_cannot_be_stacked() -> None:
    items = [{"images": torch.zeros(3, size, 4), "index": size} for size in (4, 5)]
    with pytest.raises(ValueError, match=r"\[\(3, 4, 4\), \(3, 5, 4\)\]"):
        collate_images(items)


def test_a_choice_of_rows_is_random() -> None:
    rows = choose_rows(1000, 50, seed=0)
    assert rows == choose_rows(1000, 50, seed=0) != choose_rows(1000, 50, seed=1)
    assert rows[:20] == choose_rows(1000, 20, seed=0)
    assert len({*rows}) == 50
    assert {row // 250 for row in rows[:20]} == {0, 1, 2, 3}, "of every class of a sorted folder"
    assert choose_rows(5, 5, seed=0) == choose_rows(5, 9, seed=0) != sorted(choose_rows(5, 5, seed=0))


# Ready images


class Ready(Dataset[Mapping[str, Any]]):
    def __init__(self, item: Any) -> None:
        self.item = item

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> Any:
        return self.item


def test_ready_images_are_numbered() -> None:
    image = torch.rand(3, 4, 4)
    items = TensorImageDataset(Ready({"images": image, "labels": torch.tensor(7), "file": "a.png"}))
    (batch,) = build_dataloader(items, batch_size=2, shuffle=False)
    assert torch.equal(batch["images"], torch.stack([image, image]))
    assert batch["index"].tolist() == [0, 1]
    assert batch["labels"].tolist() == [7, 7]
    assert "labels" not in collate_images([TensorImageDataset(Ready({"images": image}))[0]])
    assert "labels" not in TensorImageDataset(Ready({"images": image, "labels": None}), with_labels=False)[0]


@pytest.mark.parametrize("kind", [tuple, list])
def test_tuples_as_torchvision_gives_them_are_images_and_labels(kind: type) -> None:
    image = torch.rand(3, 4, 4)
    item = TensorImageDataset(Ready(kind((image, 2))))[1]
    assert torch.equal(item["images"], image)
    assert (item["labels"], item["index"]) == (2, 1)
    assert TensorImageDataset(Ready(kind((image,))))[0].keys() == {"images", "index"}
    assert "labels" not in TensorImageDataset(Ready(kind((image, 2))), with_labels=False)[0]


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"pixel_values": 1}, r"dataset\[0\] must be a dict with 'images', got keys \['pixel_values'\]"),
        ((1, 2, 3), r"must be a dict with 'images', got a tuple: give that, or \(image, label\)"),
        ((Image.new("RGB", (4, 4)), 0), r"must be a float tensor in .*, got a Image"),
        ({"images": torch.zeros(1, 3, 4, 4)}, r"must have 3 dimensions, \(C, H, W\), got shape \(1, 3, 4, 4\)"),
        ({"images": torch.zeros(3, 4, 4, dtype=torch.uint8)}, "divide 8-bit images by 255"),
    ],
)
def test_wrong_ready_images_are_refused(item: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TensorImageDataset(Ready(item))[0]


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.full((1, 3, 2, 2), 200, dtype=torch.uint8), r"dtype torch.uint8, minimum 200 and maximum 200"),
        (torch.full((1, 3, 2, 2), 1.5), r"maximum 1.5.*divide 8-bit images by 255"),
        (torch.full((1, 3, 2, 2), -0.25), r"minimum -0.25"),
        (torch.full((1, 3, 2, 2), float("nan")), r"minimum nan"),
        (torch.zeros(3, 2, 2), r"must have 4 dimensions, \(B, C, H, W\), got shape \(3, 2, 2\)"),
        (np.zeros((1, 3, 2, 2)), "ndarray"),
    ],
)
def test_validate_images(images: Tensor, message: str) -> None:
    validate_images(torch.tensor([0.0, 1.0]).view(1, 2, 1, 1))
    with pytest.raises(ValueError, match=message):
        validate_images(images)


def test_a_broken_image_without_a_path_is_named_by_its_row() -> None:
    assert str(BrokenImage(3, None, "cut")) == "row 3: cut"


# Memory

A_MILLION_ROWS = """
import resource, sys
import pyarrow as pa, pyarrow.parquet as pq
from pathlib import Path
from PIL import Image
from robustness_tokens.data import ImageDataset, ImageTransform, build_dataloader, load_image_dataset

folder, rows = Path(sys.argv[1]), 1_000_000
for number in range(10):
    Image.new("RGB", (32, 32), (number, 0, 0)).save(folder / f"{number}.png")
paths = pa.array([str(folder / f"{number}.png") for number in range(10)] * (rows // 10))
pictures = pa.StructArray.from_arrays([pa.nulls(rows, pa.binary()), paths], ["bytes", "path"])
features = '{"info": {"features": {"image": {"_type": "Image"}}}}'
pq.write_table(pa.table({"image": pictures}).replace_schema_metadata({"huggingface": features}), folder / "a.parquet")
del paths, pictures

loaded = load_image_dataset(folder / "a.parquet", cache_dir=folder / "cache")
dataset = ImageDataset(loaded, ImageTransform(image_size=32))
assert len(dataset) == rows
seen = 0
for batch in build_dataloader(dataset, batch_size=64, shuffle=True):
    assert not batch["broken_images"]
    assert (batch["images"][:, 0, 0, 0] * 255).round().tolist() == (batch["index"] % 10).tolist()
    seen += len(batch["index"])
    if seen >= 4000:
        break
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)  # kB
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kilobytes on Linux")
def test_a_million_rows_stay_under_1_5_gigabytes(tmp_path: Path) -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", A_MILLION_ROWS, str(tmp_path)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 1.5e6


def test_a_dataset_of_the_hub_is_described_by_its_id() -> None:
    dataset = small_table()
    commit = "0123456789abcdef0123456789abcdef01234567"
    dataset.info.dataset_name = "images"
    assert prepare_images(dataset, image_size=4).description["name"] == "images"
    dataset.info.download_checksums = {f"hf://datasets/user/images@{commit}/data/train-0.parquet": {"num_bytes": 1}}
    described = prepare_images(dataset, image_size=4).description
    assert (described["name"], described["revision"], described["num_images"]) == ("user/images", commit, NUM_IMAGES)
