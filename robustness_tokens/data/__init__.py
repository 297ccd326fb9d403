"""Pictures -> images in [0, 1] -> batches."""

from .adversarial_pairs import (
    ATTACK_ARGUMENTS,
    IMAGE_COLUMNS,
    INFO_FILE,
    PAIR_TYPES,
    PAIRS_SPLIT,
    PAIRS_STEP,
    AdversarialPairs,
    PairsInfo,
    check_base,
    find_pairs,
    finish_folder,
    load_adversarial_pairs,
    missing_shards,
    pair_features,
    round_to_budget,
    to_images,
    to_pixels,
    write_shard,
)
from .image_datasets import (
    IGNORE_INDEX,
    BrokenImageLog,
    ImageDataset,
    IterableImageDataset,
    SegmentationDataset,
    build_dataloader,
    choose_rows,
    collate_images,
    validate_images,
)
from .image_processors import (
    build_image_processor,
    load_image_processor,
    normalization_of,
    processor_image_size,
    read_image_processor,
    with_normalization,
)
from .labels import LabelMatching, check_label_range, check_same_classes
from .loading import load_image_dataset
from .prepare import Images, prepare_images
from .preprocessing import ImageTransform, Normalizer, ResizeMode, height_and_width
