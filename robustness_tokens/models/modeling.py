"""The models: a frozen base with robustness tokens, saved and loaded as a small adapter."""

from __future__ import annotations

import inspect
import logging
import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal, Self, get_args

import torch
from huggingface_hub import CommitInfo
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, BaseImageProcessor, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from ..configuration import (
    AUTO_MAP,
    HEAD_PREFIX,
    REMOTE_CODE,
    REMOTE_CODE_FILE,
    TOKENS,
    FeatureView,
    GainsAndShifts,
    RobustnessTokenConfig,
    SimilarityAxis,
    TokenState,
    check_gains_and_shifts,
)
from ..data import normalization_of, with_normalization
from ..hub import (
    CARD_FILE,
    CONFIG_FILE,
    PROCESSOR_FILE,
    Adapter,
    cached_commit,
    check_base_is_repo_id,
    check_no_other_model,
    is_generated,
    is_repo_id,
    load_adapter,
    push_adapter,
    read_card,
    render_card,
    report_of,
    update_card,
    write_adapter,
)
from ..report import RobustnessReport
from ..utils import digest, local_path
from .features import default_feature_view, extract_features, head_parameters, size_inputs
from .injection import (
    TokenInjector,
    as_state,
    attach_tokens,
    attribute,
    check_state,
    new_state,
    remove_tokens,
    tokens_in,
)
from .layer_stack import base_fingerprint, check_base, find_layer_stack, vision_config
from .loading import (
    HUB_KWARGS,
    headless_class_name,
    load_base,
    load_classifier,
    no_head_error,
    processor_of,
    vision_class,
)
from .merging import merge
from .verification import verify_injection


logger = logging.getLogger(__name__)

# Arguments of PreTrainedModel.save_pretrained, now or in version 4, that mean nothing for files as small as these.
_IGNORED_ON_SAVING = {"distributed_checkpoint", "max_shard_size", "safe_serialization", "save_function", "variant"}
_IGNORED_ON_SAVING |= {"save_original_format", "save_peft_format"}


class RobustnessTokenPreTrainedModel(PreTrainedModel):
    """Shared by both models: the base is frozen and in eval mode, the tokens are the only trainable parameters."""

    config: RobustnessTokenConfig
    config_class = RobustnessTokenConfig
    base_model_prefix = "backbone"
    main_input_name = "pixel_values"
    input_modalities = "image"
    supports_gradient_checkpointing = True
    _load_base = staticmethod(load_base)
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(
        self, config: RobustnessTokenConfig, base_model: PreTrainedModel | None = None, *, verify: bool = True
    ) -> None:
        super().__init__(config)
        if base_model is None:
            raise ValueError(f"{type(self).__name__} needs its base: call from_base or from_pretrained")
        self.injector: TokenInjector = attach_tokens(base_model, new_state(base_model, config))
        if verify:
            verify_injection(base_model)
        self.backbone = base_model.requires_grad_(False)
        self.image_processor: BaseImageProcessor | None = None
        for name in ("id2label", "label2id", "problem_type"):  # for pipelines; to_dict leaves them out
            setattr(config, name, getattr(base_model.config, name, None))
        config._attn_implementation_internal = base_model.config._attn_implementation
        self.supports_gradient_checkpointing = base_model.supports_gradient_checkpointing
        self._head_digest = self._digest_head()
        self.post_init()
        self.eval()

    def init_weights(self) -> None:
        """Does nothing: the weights come from the base and the adapter."""

    @property
    def robustness_tokens(self) -> nn.Parameter:
        """The tokens, (K, D) float32, or (depth, K, D) where several layers have tokens of their own."""
        return self.injector.robustness_tokens

    @property
    def accepts_loss_kwargs(self) -> bool:
        """Tells `transformers.Trainer` whether the base's forward takes arguments for its loss."""
        base = self.get_base_model()
        parameters = inspect.signature(base.forward).parameters.values()
        return getattr(base, "accepts_loss_kwargs", any(p.kind == p.VAR_KEYWORD for p in parameters))

    @property
    def dtype(self) -> torch.dtype:
        """The base's dtype, to which pipelines cast images. The tokens stay float32 and are cast on insertion."""
        return self.get_base_model().dtype

    @classmethod
    def from_base(
        cls,
        base_model: str | os.PathLike[str] | PreTrainedModel,
        *,
        num_robustness_tokens: int = 10,
        token_depth: int | Literal["all"] = 1,
        gains_and_shifts: Sequence[GainsAndShifts] = (),
        initializer_range: float = 0.01,
        feature_view: FeatureView | None = None,
        similarity_axis: SimilarityAxis = "token",
        image_mean: Sequence[float] | None = None,
        image_std: Sequence[float] | None = None,
        image_processor: Any = None,
        revision: str | None = None,
        verify: bool = True,
        **base_kwargs: Any,
    ) -> Self:
        """Puts new, untrained tokens into a base.

        Args:
            base_model: Hub id or folder with safetensors weights, or a model in memory, which is changed in place.
            num_robustness_tokens: K, at least 1 (paper: 10), or 0 for gains and shifts alone.
            token_depth: Number of first layers that get K tokens of their own, or `"all"` (paper: 1, the input alone).
            gains_and_shifts: What is learned beside the tokens, as differences to the base: `"norm"` (gains and shifts
                of LayerNorm and LayerScale in the layers), `"linear"` (gains of linear layers that have a bias),
                `"bias"` (their shifts), `"patch_embedding"` (its weight and bias); by default nothing (paper).
            initializer_range: Standard deviation of the new tokens, at least 0 (paper: 0.01).
            feature_view: `"cls_and_patches"`, `"cls"`, `"patches"` or `"pooled"`, see [`extract_features`]; by default
                the paper's for the family.
            similarity_axis: `"token"` (as the published code computes) or `"feature"` (the paper's formula).
            image_mean, image_std: Per-channel normalisation of [0, 1] images to train with; by default the base's.
            image_processor: The base's image processor; by default loaded from the base, or built from its image size.
            revision: Branch, tag or commit of the base; for a model in memory, the one it was loaded from.
            verify: Check by two forward passes of one image that tokens act through the base's attention alone.
            base_kwargs: For the base's `from_pretrained`: `dtype`, `device_map`, `attn_implementation`, `token`, ...

        Returns:
            The model, in eval mode.

        Raises:
            ValueError: If the base is no vision transformer, has tokens already, has no safetensors weights, has fewer
                layers than `token_depth`, lacks what `gains_and_shifts` names, or can't be verified.
        """
        _check_is_pretrained(base_model)
        if isinstance(base_model, PreTrainedModel):
            _check_no_loading_arguments("the base is", base_kwargs)
            if isinstance(base_model, RobustnessTokenPreTrainedModel):
                raise ValueError(
                    f"{type(base_model).__name__} has robustness tokens already: give from_base its base, .unload()"
                )
            base, name = base_model, _absolute_if_folder(base_model.config.name_or_path or "")
            if two_towers := vision_class(base.config):
                raise ValueError(
                    f"{type(base).__name__} has two towers: give from_base its vision model, {two_towers.__name__} "
                    "(or the name or folder of this one), or use inject_tokens on the whole model"
                )
            base_class = type(base).__name__
        else:
            name = _absolute_if_folder(local_path(base_model))
            base_class = headless_class_name(name, revision, base_kwargs)
            base = cls._load_base(name, base_class, revision, base_kwargs)
        stack = find_layer_stack(base)
        depth: Any = len(stack.layers) if token_depth == "all" else token_depth
        if isinstance(depth, str):
            raise ValueError(f'token_depth must be a number of layers or "all", got {depth!r}')
        if image_processor is None:
            image_processor = processor_of(base, name, revision=revision, base_kwargs=base_kwargs)
        own_mean, own_std = normalization_of(image_processor)
        mean, std = tuple(image_mean or own_mean), tuple(image_std or own_std)
        image_processor = with_normalization(image_processor, mean, std)
        channels = getattr(vision_config(base), "num_channels", None)
        if channels not in (None, len(mean)):
            raise ValueError(
                f"{type(base).__name__} takes images of {channels} channels, its image processor normalises "
                f"{len(mean)}: robustness tokens are trained on RGB images"
            )
        # A model in memory doesn't say which revision it came from.
        is_pinned = revision is not None or base is not base_model
        cache_dir = base_kwargs.get("cache_dir")
        config = RobustnessTokenConfig(
            base_model_name_or_path=name,
            base_model_revision=cached_commit(name, revision=revision, cache_dir=cache_dir) if is_pinned else None,
            base_model_class=base_class,
            base_model_fingerprint=base_fingerprint(base),
            num_robustness_tokens=num_robustness_tokens,
            token_depth=depth,
            gains_and_shifts=_in_order(gains_and_shifts),
            hidden_size=stack.hidden_size,
            initializer_range=initializer_range,
            feature_view=feature_view or default_feature_view(base),
            similarity_axis=similarity_axis,
            image_mean=list(mean),
            image_std=list(std),
        )
        model = cls(config, base, verify=verify)
        model.image_processor = image_processor
        return model

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        config: RobustnessTokenConfig | None = None,
        base_model: str | os.PathLike[str] | PreTrainedModel | None = None,
        ignore_base_mismatch: bool = False,
        revision: str | None = None,
        subfolder: str = "",
        adapter_kwargs: Mapping[str, Any] | None = None,
        verify: bool = True,
        **base_kwargs: Any,
    ) -> Self:
        """Loads an adapter and its base.

        Args:
            pretrained_model_name_or_path: Folder or Hub id of the adapter.
            config: Passed by the Auto classes; only what the caller asked of it is used, for the base.
            base_model: Folder, Hub id or model in memory to use instead of the base that the adapter names.
            ignore_base_mismatch: Accept a base with another fingerprint than the tokens were trained on.
            revision: Branch, tag, commit or `refs/pr/N` of the adapter, which itself pins the commit of the base.
            subfolder: Folder of the adapter inside its repo.
            adapter_kwargs: Passed by the Auto classes for PEFT; not used.
            verify: As in [`from_base`].
            base_kwargs: For the base's `from_pretrained`: `dtype`, `device_map`, `attn_implementation`, `token`,
                `cache_dir`, `local_files_only`, `trust_remote_code`, ...

        Returns:
            The model, in eval mode.

        Raises:
            ValueError: If the adapter is damaged, or the base is not the one that its tokens were trained on.
        """
        if base_kwargs.pop("output_loading_info", False):
            raise ValueError("output_loading_info=True can't be used: loading an incomplete adapter is an error")
        hub_kwargs = {name: base_kwargs[name] for name in HUB_KWARGS if base_kwargs.get(name) is not None}
        adapter = load_adapter(pretrained_model_name_or_path, revision=revision, subfolder=subfolder, **hub_kwargs)
        if config is not None:  # AutoModel moved there what belongs to the base
            base_kwargs = {**config.asked_of_base, **base_kwargs}
            if config._attn_implementation is not None:
                base_kwargs.setdefault("attn_implementation", config._attn_implementation)
        _check_is_pretrained(base_model)
        image_processor = adapter.image_processor
        base_kwargs = {name: value for name, value in base_kwargs.items() if value is not None}
        if isinstance(base_model, PreTrainedModel):
            served = (*HUB_KWARGS, "trust_remote_code")  # for the adapter; AutoModel always passes one
            for_base = {name: value for name, value in base_kwargs.items() if name not in served}
            _check_no_loading_arguments("the base is", for_base)
            base = base_model
        elif base_model is not None:
            base = cls._load_base(
                local_path(base_model), adapter.config.base_model_class, None, base_kwargs, adapter.head
            )
        else:
            base = cls._load_named_base(adapter, base_kwargs)
        if not ignore_base_mismatch:
            _check_base(base, adapter.config)
        check_state(base, adapter.config, adapter.state, name=str(pretrained_model_name_or_path))
        model = cls(adapter.config, base, verify=verify)
        model._load_head(adapter.head)
        with torch.no_grad():
            for name, tensor in model.injector.state.items():
                tensor.copy_(adapter.state[name])
        model.image_processor = image_processor
        model.name_or_path = str(pretrained_model_name_or_path)
        return model

    @classmethod
    def _load_named_base(cls, adapter: Adapter, base_kwargs: Mapping[str, Any]) -> PreTrainedModel:
        config, name = adapter.config, adapter.config.base_model_name_or_path
        if not name:
            raise ValueError("the adapter doesn't name its base: pass base_model= (a folder, a Hub id or a model)")
        if adapter.commit is not None:  # from the Hub
            check_base_is_repo_id(name)
        elif not os.path.isdir(name) and not is_repo_id(name):
            raise ValueError(f"the adapter's base was the folder {name!r}, which is gone: pass base_model=")
        return cls._load_base(name, config.base_model_class, config.base_model_revision, base_kwargs, adapter.head)

    def train(self, mode: bool = True) -> Self:
        """Sets the training mode of the tokens and returns this model. The base stays in eval mode."""
        super().train(mode)
        if "backbone" in self._modules:
            self.backbone.eval()
            for module in self.backbone.modules():
                # transformers checkpoints a layer only in training mode; the modules inside it stay in eval mode.
                if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing:
                    module.training = mode
        return self

    def _set_gradient_checkpointing(self, *args: Any, **kwargs: Any) -> None:
        self.get_base_model()._set_gradient_checkpointing(*args, **kwargs)  # timm's has its own way
        self.train(self.training)  # sets the mode of the layers that checkpoint from now on

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> Any:
        """Runs the base with the tokens in its sequence.

        Args:
            pixel_values: (B, 3, H, W) normalised images; positions are interpolated if they have another size than the
                base's, where the family can (`interpolate_pos_encoding`).
            kwargs: Other arguments of the base's forward.

        Returns:
            The base's output, with the same class and shapes as without tokens.
        """
        base = self.get_base_model()
        return base(pixel_values=pixel_values.to(base.dtype), **{**size_inputs(base, pixel_values), **kwargs})

    def get_features(self, pixel_values: Tensor) -> Tensor:
        """Computes the features that the tokens were trained on, `config.feature_view`.

        Args:
            pixel_values: (B, 3, H, W) normalised images.

        Returns:
            (B, N, D) or (B, D) in the base's dtype, see [`extract_features`].
        """
        return extract_features(self.get_base_model(), pixel_values, feature_view=self.config.feature_view)

    def disable_adapter(self) -> AbstractContextManager[None]:
        """Turns the tokens off inside a `with` block: outputs are then bit-equal to the base's."""
        return tokens_in(self, None)

    def get_base_model(self) -> PreTrainedModel:
        """Returns the base with the tokens active in it, as in PEFT; `ValueError` after [`unload`]."""
        if "backbone" not in self._modules:
            raise ValueError("the base was taken out by unload(): load the adapter again")
        return self.backbone

    def unload(self) -> PreTrainedModel:
        """Removes the tokens and returns the frozen base, in eval mode. Do not use this model afterwards."""
        base: PreTrainedModel = remove_tokens(self.get_base_model())
        del self.backbone
        return base

    def merge_and_unload(self, image_size: int | None = None) -> PreTrainedModel:
        """Returns a plain model that holds the tokens as native registers; this model stays unchanged.

        Gains and shifts are folded into its weights. Tokens of deeper layers can't be merged: export to ONNX instead.

        Args:
            image_size: Side in pixels of the plain model's images; by default the base's image size.

        Returns:
            A plain transformers model with K more registers, in eval mode.

        Raises:
            ValueError: If the tokens are off or deep, the base's family has no registers, or `image_size` doesn't fit.
        """
        return merge(self.get_base_model(), image_size=image_size)

    def print_trainable_parameters(self) -> None:
        """Prints the number of trainable parameters, as in PEFT."""
        trainable, total = self.num_parameters(only_trainable=True), self.num_parameters()
        print(f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {100 * trainable / total:.4f}")

    @classmethod
    def register_for_auto_class(cls, auto_class: str | type | None = None) -> None:
        """Makes `save_pretrained` add a file to each adapter that imports this package.

        With `trust_remote_code=True`, the Auto class can then load the adapter before this package is imported; if it
        is not installed, transformers names it. Once the package is imported, the file never runs.

        Args:
            auto_class: `"AutoModel"` for features, `"AutoModelForImageClassification"` for a classifier; by default
                the one for this class.

        Raises:
            ValueError: If `auto_class` does not fit this class.
        """
        name = auto_class.__name__ if isinstance(auto_class, type) else auto_class
        own = next((name for name, code in AUTO_MAP.items() if code == f"modeling.{cls.__name__}"), None)
        if own is None or name not in (None, own):
            raise ValueError(f"auto_class must be {own!r} for {cls.__name__}, got {name!r}")
        super().register_for_auto_class(own)

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        push_to_hub: bool = False,
        *,
        repo_id: str | None = None,
        base_model_id: str | None = None,
        **push_kwargs: Any,
    ) -> None:
        """Writes the adapter: config.json, model.safetensors (what was learned), preprocessor_config.json, README.md.

        A classifier's head is written too if it is trainable or was changed; other changes of the base are not, which
        is logged. Replaces an adapter in the folder as a whole: a kill leaves the old one, the new one, or none. Other
        files stay; an evaluation.json that measured another adapter is ignored from then on. Other arguments of
        `PreTrainedModel.save_pretrained` are accepted and change nothing.

        Args:
            save_directory: Folder, created if needed. A README.md that a person wrote is kept.
            is_main_process: Write and push only on the main process of a distributed run.
            state_dict: Gathered state of this model to write, as Accelerate hands it over; by default the model's own.
            push_to_hub: Push as well, see [`push_to_hub`].
            repo_id: Repo to push to; by default the folder's name.
            base_model_id: Hub id to name as the base if it was loaded from a folder.
            push_kwargs: For [`push_to_hub`].

        Raises:
            ValueError: If the tokens are not finite, or the folder holds another model. Nothing is written then.
        """
        if push_kwargs.get("safe_serialization") is False:
            raise ValueError("safe_serialization=False can't be used: adapters are written as safetensors only")
        push_kwargs = {
            name: value
            for name, value in push_kwargs.items()
            if name not in _IGNORED_ON_SAVING and (push_to_hub or name != "token")
        }
        if push_kwargs and not push_to_hub:
            raise ValueError(f"save_pretrained got {sorted(push_kwargs)}, unknown, or for push_to_hub=True only")
        if not is_main_process:
            return
        self._check_base_as_loaded()
        if self.image_processor is None:
            raise ValueError(
                f"this {type(self).__name__} was made without an image processor, and could not be loaded: make it by "
                "from_base(base), or set its image_processor"
            )
        state = self.learned_state(state_dict)
        folder = Path(local_path(save_directory))
        folder.mkdir(parents=True, exist_ok=True)
        check_no_other_model(folder)
        config = RobustnessTokenConfig.from_dict(self.config.to_dict())
        config.architectures = [type(self).__name__]
        if base_model_id not in (None, config.base_model_name_or_path):
            config.base_model_name_or_path, config.base_model_revision = base_model_id, None
        config.auto_map, files = {}, {}
        if self._auto_class is not None:
            config.auto_map = {auto_class: AUTO_MAP[auto_class] for auto_class in ("AutoConfig", self._auto_class)}
            files[REMOTE_CODE_FILE] = REMOTE_CODE
        files[CONFIG_FILE] = config.to_json_string(use_diff=False)
        files[PROCESSOR_FILE] = self.image_processor.to_json_string()
        try:
            report = report_of(folder, state)
        except ValueError as exc:  # no reason to lose what was learned
            logger.warning("the card leaves out a report that can't be read: %s", exc)
            report = None
        text = render_card(config, name=os.fspath(save_directory), report=report)
        existing = read_card(folder, errors="surrogateescape")  # a person's card may have any encoding
        if existing is None or is_generated(existing):
            files[CARD_FILE] = update_card(existing, text)
        write_adapter(folder, state, {name: content.encode() for name, content in files.items()})
        if push_to_hub:
            push_adapter(folder, repo_id or folder.resolve().name, base_model_id=base_model_id, **push_kwargs)

    def learned_state(self, given: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Returns the tensors to save, from a state dict where it has them: the state, and a head that was trained."""
        own: dict[str, Tensor] = {f"injector.{attribute(name)}": t for name, t in self.injector.state.items()}
        head = head_parameters(self.get_base_model())
        if any(p.requires_grad for p in head.values()) or self._digest_head() != self._head_digest:
            own |= {f"{HEAD_PREFIX}{name}": tensor for name, tensor in head.items()}
        names = {f"injector.{attribute(name)}": name for name in self.injector.names}
        return {names.get(key, key): (given or {}).get(key, tensor) for key, tensor in own.items()}

    def _digest_head(self) -> str | None:
        head = head_parameters(self.get_base_model())
        return None if any(parameter.is_meta for parameter in head.values()) else digest(head)

    def _load_head(self, head: Mapping[str, Tensor]) -> None:
        own = head_parameters(self.get_base_model())
        if not own:
            return  # the features of a classifier
        expected = {f"{HEAD_PREFIX}{name}": tuple(tensor.shape) for name, tensor in own.items()}
        found = {name: tuple(tensor.shape) for name, tensor in head.items()}
        if head and found != expected:
            raise ValueError(
                f"the adapter holds the head {found}, the base's is {expected}: load it with the "
                "num_labels= that it was trained with"
            )
        with torch.no_grad():
            for name, tensor in head.items():
                own[name.removeprefix(HEAD_PREFIX)].copy_(tensor)
        if head:
            self._head_digest = ""  # it belongs to the adapter, whatever head the base has

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Loads a state dict of this model, or the tensors of a saved adapter, as `transformers.Trainer` does."""
        own = {name: f"injector.{attribute(name)}" for name in self.injector.names}
        result = super().load_state_dict({own.get(key, key): t for key, t in state_dict.items()}, *args, **kwargs)
        if not own.keys().isdisjoint(state_dict):  # an adapter has no base
            result.missing_keys[:] = [key for key in result.missing_keys if not key.startswith(HEAD_PREFIX)]
        return result

    def _check_base_as_loaded(self) -> None:
        """Warns if layers of the base are not those that the tokens belong to: they are not saved."""
        base, expected = self.get_base_model(), self.config.base_model_fingerprint or {}
        if any(parameter.is_meta for parameter in base.parameters()):
            return
        try:
            found = base_fingerprint(base)
        except ValueError:  # the layers differ now, or were quantised
            found = {}
        is_changed = not found or any(found[dtype] != expected[dtype] for dtype in found.keys() & expected.keys())
        head = {id(parameter) for parameter in head_parameters(base).values()}
        if is_changed or any(p.requires_grad and id(p) not in head for p in base.parameters()):
            logger.warning(
                "The layers of %s were changed or trained (as by LoRA), and are not saved with the adapter: keep them "
                "by model.unload().save_pretrained(folder), and train the tokens on that model",
                type(base).__name__,
            )

    def push_to_hub(  # type: ignore[override]
        self, repo_id: str, *, report: RobustnessReport | None = None, **push_kwargs: Any
    ) -> CommitInfo:
        """Uploads the adapter in one commit, to a private repo unless `private=False`: the tokens are a secret.

        Args:
            repo_id: `user/name`.
            report: Evaluation of these tokens, uploaded with them and shown in the card.
            push_kwargs: `base_model_id` (required if the base was loaded from a folder), `private`, `token`,
                `revision`, `create_pr`, `commit_message`, `tags`, `subfolder`, see
                [`~robustness_tokens.hub.pushing.push_adapter`].

        Returns:
            The commit.

        Raises:
            ValueError: If the base is a folder and `base_model_id` is missing, or if the repo exists and is public.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            if report is not None:
                report.save(folder)
            return push_adapter(folder, repo_id, **push_kwargs)


class RobustnessTokenModel(RobustnessTokenPreTrainedModel):
    """A frozen vision transformer with robustness tokens. It returns its base's outputs: features."""


class RobustnessTokenForImageClassification(RobustnessTokenPreTrainedModel):
    """A frozen image classifier with robustness tokens. It returns its base's outputs: logits."""

    _load_base = staticmethod(
        lambda name, base_class, revision, base_kwargs, head=(): load_classifier(name, revision, base_kwargs, head)
    )

    def __init__(
        self, config: RobustnessTokenConfig, base_model: PreTrainedModel | None = None, *, verify: bool = True
    ) -> None:
        base_config: Any = type(getattr(base_model, "config", None))
        classifiers: Any = AutoModelForImageClassification._model_mapping.get(base_config, ())
        if base_model is not None and not isinstance(base_model, classifiers):
            raise no_head_error(f"{type(base_model).__name__} {base_model.config.name_or_path!r}")
        super().__init__(config, base_model, verify=verify)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **kwargs: Any) -> Any:
        """Runs the base with the tokens in its sequence.

        Args:
            pixel_values: (B, 3, H, W) normalised images.
            labels: (B,) classes, for the loss; `transformers.Trainer` looks for this name.
            kwargs: Other arguments of the base's forward.

        Returns:
            The base's output, with the same class and shapes as without tokens.
        """
        return super().forward(pixel_values, **kwargs, **({} if labels is None else {"labels": labels}))


def inject_tokens(
    model: PreTrainedModel,
    adapter: str | os.PathLike[str] | Tensor | TokenState,
    *,
    ignore_base_mismatch: bool = False,
    revision: str | None = None,
    subfolder: str = "",
    verify: bool = True,
    **hub_kwargs: Any,
) -> Any:
    """Puts trained tokens into a vision model in place; a classifier, DPT or UperNet keeps its own head.

    Args:
        model: A model that is, or contains, the vision transformer that the tokens were trained on.
        adapter: Folder or Hub id of the adapter. Or, without a check of the base, the tokens, (K, D) or (depth, K, D)
            floating; or a dictionary of them, as `"robustness_tokens"`, and of gains and shifts.
        ignore_base_mismatch: Accept a model with other weights than the tokens were trained on.
        revision: Branch, tag, commit or `refs/pr/N` of an adapter on the Hub.
        subfolder: Folder of the adapter inside its repo.
        verify: Check by two forward passes of one image that tokens act through the model's attention alone.
        hub_kwargs: `token`, `cache_dir`, `local_files_only`, `force_download`, as in `snapshot_download`.

    Returns:
        The same model, with frozen tokens in it. [`remove_tokens`] removes them.

    Raises:
        ValueError: If the model has tokens already, is no vision transformer, has other weights or can't be verified,
            or if the adapter is damaged.
    """
    if isinstance(adapter, Tensor | Mapping):
        given = {"revision": revision, "subfolder": subfolder or None, **hub_kwargs}
        _check_no_loading_arguments("the tokens are", given)
        state = {name: tensor.detach().clone() for name, tensor in as_state(adapter).items()}
        for name, tensor in state.items():
            is_empty = tensor.numel() == 0 and (name != TOKENS or len(state) == 1)
            if not tensor.is_floating_point() or is_empty or not tensor.isfinite().all():
                raise ValueError(
                    "robustness tokens must be at least one row of finite floating-point numbers, (K, D), got "
                    f"{name} in {tensor.dtype} of shape {tuple(tensor.shape)}"
                )
    else:
        loaded = load_adapter(adapter, revision=revision, subfolder=subfolder, **hub_kwargs)
        state = loaded.state
        if not ignore_base_mismatch:
            _check_base(model, loaded.config)
        check_state(model, loaded.config, state, name=os.fspath(adapter))
    injector = attach_tokens(model, state)
    injector.requires_grad_(False)
    if verify:
        verify_injection(model)
    model.register_state_dict_pre_hook(injector.warn_of_state_dict)
    return model


def _in_order(kinds: Sequence[GainsAndShifts]) -> list[GainsAndShifts]:
    """Returns kinds of gains and shifts in one order, so that equal adapters have equal configs."""
    if isinstance(kinds, str):
        raise ValueError(f"gains_and_shifts must be a list, such as ['norm'], got {kinds!r}")
    check_gains_and_shifts(list(kinds))
    return [kind for kind in get_args(GainsAndShifts) if kind in kinds]


def _absolute_if_folder(name: str) -> str:
    """Makes a folder's path absolute: in another working directory, a relative one may mean something else."""
    return os.path.abspath(name) if name and os.path.isdir(name) else name


def _check_is_pretrained(base_model: Any) -> None:
    if isinstance(base_model, nn.Module) and not isinstance(base_model, PreTrainedModel):
        raise ValueError(
            f"the base is a {type(base_model).__name__}, expected a model of transformers, its name or its folder. "
            "Take it out of what is around it (torch.compile: model._orig_mod; DataParallel: model.module; PEFT: "
            "model.merge_and_unload()); load timm's models by transformers, as from_base('timm/...') or by "
            "TimmWrapperModel; or put tokens into any of them in place: inject_tokens(model, tokens)"
        )


def _check_no_loading_arguments(what: str, arguments: Mapping[str, Any]) -> None:
    if given := sorted(name for name, value in arguments.items() if value is not None):
        raise ValueError(f"{what} in memory already: {given} can't be applied, leave them out")


def _check_base(base: PreTrainedModel, config: RobustnessTokenConfig) -> None:
    revision = f" at {config.base_model_revision}" if config.base_model_revision else ""
    check_base(
        base,
        config.base_model_fingerprint or {},
        expected_name=f"{config.base_model_class} {config.base_model_name_or_path!r}{revision}",
        made="the tokens were trained on",
        fix="load that base",
    )


AutoConfig.register(RobustnessTokenConfig.model_type, RobustnessTokenConfig)
AutoModel.register(RobustnessTokenConfig, RobustnessTokenModel)
AutoModelForImageClassification.register(RobustnessTokenConfig, RobustnessTokenForImageClassification)
