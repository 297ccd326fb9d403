"""Models with robustness tokens, probe heads, exports, and speedups for frozen bases."""

from .features import (
    check_patches,
    count_patches,
    default_feature_view,
    extract_features,
    head_inputs,
    patch_grid,
    size_inputs,
)
from .gains_and_shifts import kinds_of
from .heads import (
    ClassificationHead,
    ProbedModel,
    ProbeHead,
    SegmentationHead,
    ZeroShotHead,
    base_of,
    check_head,
    head_digest,
    label_names,
    load_head,
    resize_logits,
    save_head,
)
from .identity import model_digest
from .injection import as_state, depth_of, find_injector, random_state, remove_tokens, tokens_in
from .layer_stack import base_fingerprint, find_layer_stack, headless_model
from .merging import extract_tokens
from .modeling import (
    RobustnessTokenForImageClassification,
    RobustnessTokenModel,
    RobustnessTokenPreTrainedModel,
    inject_tokens,
)
from .onednn import onednn_is_faster, packed_once
from .onnx_export import export_onnx
from .published_tokens import import_published_tokens
from .speedups import (
    AUTO,
    BASE,
    MixedPrecision,
    attention_configs,
    choose_attention,
    computing_faster,
    has_bfloat16,
    run_compiled,
    runs_in_half,
)
