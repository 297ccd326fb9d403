"""A dataset's labels, as numbers of the classes of a model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, Literal


LabelMatching = Literal["name", "index"]

_SHOWN = 12  # names of a list in an error


class LabelReader:
    """Turns words into numbers of a model's classes, and numbers where both sides have names; others stay unchanged.

    `names` are the dataset's class names, `model_names` the model's, both in the order of their numbers and None if
    unknown. `ValueError`, with both lists, if the dataset names a class that the model does not have.
    """

    def __init__(self, names: Sequence[str] | None, model_names: Sequence[str] | None) -> None:
        self._model_names = model_names
        self._names = None if model_names is None else list(map(_plain, model_names))
        self._numbers: list[int] | None = None
        if names is None or model_names is None or self._names is None:
            return
        if (plain := list(map(_plain, names))) == self._names:
            return
        # Two classes of one name can't be told apart by it.
        wrong = [row for row, name in enumerate(plain) if self._names.count(name) != 1 or plain.count(name) != 1]
        if len(wrong) <= len(plain) // 100 and len(plain) == len(self._names):
            in_place = all(row in wrong or name == self._names[row] for row, name in enumerate(plain))
            if wrong and in_place:
                return  # such as ImageNet's two cranes, which datasets call crane and crane2
        if wrong:
            raise ValueError(
                f"the dataset and the model name different classes, such as {names[wrong[0]]!r}: the dataset has "
                f"{_list(names)}, the model {_list(model_names)}. Rename the classes, or set label_matching='index' "
                "if equal numbers mean equal classes"
            )
        self._numbers = [self._names.index(name) for name in plain]

    @property
    def settings(self) -> list[Any]:
        """Tells what the numbers depend on besides the labels."""
        return [self._numbers, self._names]

    def __call__(self, label: Any) -> Any:
        """Returns the number of the model's class; `ValueError` for a word that is no class of the model."""
        if isinstance(label, str):
            if self._names is None or self._model_names is None:
                raise ValueError(
                    f"labels are words, such as {label!r}, and the model has no names of its classes: number them by "
                    "dataset.class_encode_column(...), or train a head that has label_names"
                )
            if self._names.count(_plain(label)) != 1:
                raise ValueError(f"label {label!r} must be a class of the model, one of {_list(self._model_names)}")
            return self._names.index(_plain(label))
        if self._numbers is not None and 0 <= label < len(self._numbers):
            return self._numbers[int(label)]
        return label


def check_label_range(labels: Iterable[int], num_labels: int) -> None:
    """Raises `ValueError` unless all labels are numbers of classes, from 0 to `num_labels` - 1."""
    if wrong := sorted({label for label in labels if not 0 <= label < num_labels}):
        raise ValueError(
            f"labels must be from 0 to {num_labels - 1}, the classes of the model, got "
            f"{', '.join(map(str, wrong[:9]))}: filter such rows out of the dataset (-1 often stands for no label)"
        )


def check_same_classes(names: Sequence[str] | None, others: Sequence[str] | None, *, whose: str) -> None:
    """Raises `ValueError`, which says `whose` they are, if the names of two models' classes are known and differ."""
    if names is not None and others is not None and list(map(_plain, names)) != list(map(_plain, others)):
        raise ValueError(
            f"{whose} must have the same classes in the same order, got {_list(names)} and {_list(others)}"
        )


def _plain(name: str) -> str:
    """Returns a class name without what differs between spellings of it, such as T-shirt/top and t_shirt / top."""
    return re.sub(r"[\W_]+", " ", str(name)).strip().casefold() or str(name)


def _list(names: Sequence[str]) -> str:
    more = f", ... ({len(names)} in all)" if len(names) > _SHOWN else ""
    return f"{', '.join(map(repr, names[:_SHOWN]))}{more}"
