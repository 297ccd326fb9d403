"""The names in a report in plain words, in the order in which they are shown."""

from __future__ import annotations


METRICS = {
    "accuracy": "accuracy",
    "miou": "mean IoU",
    "mean_image_miou": "mean of the images' mean IoU",
    "cosine": "cosine with the clean features",
}
ATTACKERS = {
    "full_worst_case": "everything, worst case over all attacks",
    "full": "everything, tokens included",
    "own_tokens": "backbone and training recipe, own tokens",
    "base": "the backbone, not the tokens",
    "none": "nothing (noise, queries)",
    None: "(clean images)",
}
TOKENS = {
    "none": "without tokens",
    "trained": "with tokens",
    "untrained": "untrained tokens",
    "zero": "zero tokens",
    "mean": "mean of the tokens",
}
TASKS = {"classification": "Classification", "segmentation": "Segmentation", "features": "Features"}
