"""Trains robustness tokens on any folder or Hub dataset of images, on one process or many.

    accelerate launch examples/train.py --base_model facebook/dinov2-small --dataset ILSVRC/imagenet-1k \
        --output_dir outputs/dinov2-small-robtok

    accelerate launch examples/train.py examples/dinov2_small.yaml --learning_rate 5e-3

Every argument: python examples/train.py --help. `robtok train` is this script, installed.
"""

from __future__ import annotations

from transformers import set_seed

from robustness_tokens import RobustnessTokenModel, RobustnessTokenTrainer
from robustness_tokens.cli import load_eval_dataset, load_train_dataset, parse_arguments


def main() -> None:
    model_args, data_args, training_args = parse_arguments()

    set_seed(training_args.seed)  # of the new tokens; the trainer seeds everything else itself
    model = RobustnessTokenModel.from_base(model_args.base_model, **model_args.from_base_kwargs())
    trainer = RobustnessTokenTrainer(model, training_args, load_train_dataset(data_args), load_eval_dataset(data_args))
    if trainer.accelerator.is_main_process:
        model.print_trainable_parameters()
    result = trainer.train()
    trainer.save_model()
    trainer.accelerator.print(f"trained for {result.global_step} steps, adapter in {training_args.output_dir}")
    trainer.accelerator.end_training()  # save_model has waited for the others


if __name__ == "__main__":
    main()
