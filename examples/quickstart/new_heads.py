"""Puts new heads on an adapter that was trained without any, and attacks through them.

    python examples/quickstart/prepare_data.py --all --output outputs/fashion-mnist
    python examples/quickstart/new_heads.py outputs/trade_off/head_distance-... --data outputs/fashion-mnist

Tokens that were trained by `objective="head_distance"` know no head. Here the classes of Fashion-MNIST are grouped
into five new ones, and two heads are made from training images: a linear probe, and a vote of the nearest neighbours.
Both are made twice, on features with tokens and without, and each is attacked through the features that it reads.
The table gives accuracies on test images.
"""

from __future__ import annotations

import argparse
from fractions import Fraction
from pathlib import Path

import datasets
import torch
from measuring import BASE, accuracy, load_training_images, normalizer_of
from torch import Tensor
from torch.nn import functional as F

from robustness_tokens import (
    ImageDataset,
    ImageTransform,
    ProbedModel,
    RobustnessTokenModel,
    evaluate_robustness,
    load_image_dataset,
    train_probe,
)
from robustness_tokens.data import collate_images
from robustness_tokens.models import ClassificationHead, ProbeHead, base_of, tokens_in


GROUPS = {
    "top": ("T-shirt/top", "Pullover", "Coat", "Shirt"),
    "trouser": ("Trouser",),
    "dress": ("Dress",),
    "shoe": ("Sandal", "Sneaker", "Ankle boot"),
    "bag": ("Bag",),
}


class NearestNeighbours(ProbeHead):
    """Classifies by a vote of the nearest images, weighted by `exp(cosine / temperature)`, as DINO's k-NN.

    Args:
        features: (N, F) features of images with labels.
        labels: (N,) their classes.
        num_labels: C.
        num_neighbours: Images that vote.
        temperature: The lower, the more the nearest ones count.

    Source: Wu et al., arXiv 1805.01978; Caron et al., "DINO", arXiv 2104.14294.
    """

    task = "classification"
    ignore_index = -100
    extract = staticmethod(ClassificationHead.extract)

    def __init__(
        self, features: Tensor, labels: Tensor, num_labels: int, *, num_neighbours: int = 20, temperature: float = 0.07
    ) -> None:
        super().__init__(features.shape[1], num_labels)
        self.num_neighbours, self.temperature = num_neighbours, temperature
        self.known: Tensor
        self.votes: Tensor
        self.register_buffer("known", F.normalize(features, dim=1))
        self.register_buffer("votes", F.one_hot(labels, num_labels).float())

    def forward(self, features: Tensor) -> Tensor:
        nearest = (F.normalize(features, dim=1) @ self.known.T).topk(self.num_neighbours, dim=1)
        weights = ((nearest.values - 1) / self.temperature).exp()  # (B, neighbours), at most 1
        # A small share for every class, so that the logarithm and its gradient stay finite.
        return ((weights[..., None] * self.votes[nearest.indices]).sum(dim=1) + 1e-6).log()


def grouped(images: datasets.Dataset) -> datasets.Dataset:
    """Returns the images with the labels of GROUPS."""
    names = images.features["label"].names
    group_of = {name: group for group, members in enumerate(GROUPS.values()) for name in members}
    labels = [group_of[names[label]] for label in images["label"]]
    return (
        images.remove_columns("label")
        .add_column("label", labels)
        .cast_column("label", datasets.ClassLabel(names=list(GROUPS)))
    )


@torch.no_grad()
def nearest_neighbours(model: RobustnessTokenModel, images: datasets.Dataset) -> NearestNeighbours:
    """Makes the head from the features of images, with or without tokens as the model is now."""
    normalizer = normalizer_of(model)
    dataset = ImageDataset(images, ImageTransform(image_size=28), with_labels=True)
    features, labels = [], []
    for start in range(0, len(dataset), 500):
        batch = collate_images([dataset[row] for row in range(start, min(start + 500, len(dataset)))])
        features.append(NearestNeighbours.extract(base_of(model), normalizer(batch["images"])))
        labels.append(batch["labels"])
    return NearestNeighbours(torch.cat(features), torch.cat(labels), len(GROUPS))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("adapter", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="folder with the images as parquet")
    parser.add_argument("--num_training_images", type=int, default=10_000, help="to make the heads from")
    parser.add_argument("--num_images", type=int, default=200, help="number of test images to attack")
    parser.add_argument("--attacks", nargs="+", default=["apgd_cross_entropy", "apgd_targeted_dlr"])
    parser.add_argument(
        "--eps", type=Fraction, nargs="+", default=[Fraction(8, 255), Fraction(16, 255)], help="in pixels"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    all_eps = [float(eps) for eps in args.eps]
    images, _ = load_training_images(args.data)
    images = grouped(images).shuffle(seed=args.seed)
    images = images.select(range(min(args.num_training_images, len(images))))
    test_images = grouped(load_image_dataset(args.data, split="test"))
    model = RobustnessTokenModel.from_pretrained(args.adapter, base_model=BASE).eval()
    linear, neighbours = [], []
    for with_tokens in (True, False):
        linear.append(
            train_probe(model, images, head_class=ClassificationHead, num_labels=len(GROUPS), with_tokens=with_tokens)
        )
        with tokens_in(model, model.injector.state if with_tokens else None):
            neighbours.append(nearest_neighbours(model, images))

    print(f"\nAccuracy on {args.num_images} test images in {len(GROUPS)} new classes; L-inf, eps in pixels,")
    print(f"attacker who knows all, worst case of {', '.join(args.attacks)}")
    columns = ["clean", *(f"{255 * eps:g}/255" for eps in all_eps)]
    print(f"{'head':<36}" + "".join(f"{column:>10}" for column in columns))
    for name, heads in (("linear", linear), ("nearest neighbours", neighbours)):
        report = evaluate_robustness(
            ProbedModel(model, heads[0], base_head=heads[1]),
            test_images,
            knowledge=("base", "full"),
            attacks=args.attacks,
            eps=all_eps,
            eps_sweep=(),
            budget="full",
            num_images=args.num_images,
            diagnostics=False,
            attack_precision="no",
            disable_tqdm=True,
        )
        for tokens, knowledge in (("none", "base"), ("trained", "full")):
            values = [accuracy(report, tokens=tokens)]
            values += [accuracy(report, tokens=tokens, knowledge=knowledge, eps=eps) for eps in all_eps]
            label = f"{name}, {'without' if tokens == 'none' else 'with'} tokens"
            print(f"{label:<36}" + "".join(f"{value:>10.3f}" for value in values), flush=True)


if __name__ == "__main__":
    main()
