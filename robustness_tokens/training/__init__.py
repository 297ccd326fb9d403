"""Trains tokens: attack, two losses, step."""

from .arguments import PAPER, RobustnessTokenTrainingArguments, check_recipe, resolve_preset, split_settings
from .dataset import classes_of, prepare_train_dataset
from .losses import LOGITS_OBJECTIVES, head_distance, robustness_loss
from .make_pairs import PairsArguments, make_adversarial_pairs, max_pixel_difference
from .run_folder import LOG_FILE, read_log, to_csv
from .sweep import SweepArguments, run_sweep
from .trainer import RobustnessTokenTrainer
