"""What the generic rules do not get right, by family: data, no code beyond a tensor's shape."""

from __future__ import annotations

from typing import Any

MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
RESNET = {"model_type": "resnet", "embedding_size": 16, "hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 1, 1], "layer_type": "basic", "out_features": ["stage2", "stage3", "stage4"]}  # fmt: skip
NO_TIMM = {"use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None, "backbone_config": RESNET}

# Values in the configuration, by dotted name.
CONFIG: dict[str, dict[str, Any]] = {
    "qwen2_vl": {"text_config.rope_parameters": MROPE},
    "qwen2_vl_text": {"rope_parameters": MROPE},
    "qwen2_5_vl": {"text_config.rope_parameters": MROPE},
    "qwen2_5_vl_text": {"rope_parameters": MROPE},
    "glm4v": {"text_config.rope_parameters": MROPE},
    "glm4v_text": {"rope_parameters": MROPE},
    "glm46v": {"text_config.rope_parameters": MROPE},
    "glm4v_moe": {"text_config.rope_parameters": MROPE | {"mrope_section": [2, 1, 1]}},
    "glm4v_moe_text": {"rope_parameters": MROPE | {"mrope_section": [2, 1, 1]}},
    "glm_ocr": {"text_config.rope_parameters": MROPE},
    "glm_ocr_text": {"rope_parameters": MROPE},
    "glm_image": {"text_config.rope_parameters": MROPE},
    "glm_image_text": {"rope_parameters": MROPE},
    "esm": {"vocab_size": 160, "pad_token_id": 1, "mask_token_id": 2},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "hunyuan_vl": {"text_config.head_dim": 16},
    "hunyuan_vl_text": {"head_dim": 16},
    "ministral": {"head_dim": 16},
    "nemotron": {"head_dim": 16},
    "detr": NO_TIMM,
    "conditional_detr": NO_TIMM,
    "dab-detr": NO_TIMM,
    "deformable_detr": NO_TIMM,
    "table-transformer": NO_TIMM,
    "autoformer": {"prediction_length": 8, "context_length": 16, "lags_sequence": [1, 2]},
    "informer": {"prediction_length": 8, "context_length": 16, "lags_sequence": [1, 2]},
    "time_series_transformer": {"prediction_length": 8, "context_length": 16, "lags_sequence": [1, 2]},
    "bit": {"hidden_sizes": [32, 32, 64, 64], "embedding_size": 32},
    "blip-2": {"image_token_index": 150},
    "instructblip": {"image_token_index": 150},
    "instructblipvideo": {"video_token_index": 150},
    "cvt": {"embed_dim": [16, 32, 32], "num_heads": [2, 2, 2], "depth": [1, 1, 1], "drop_path_rate": [0.0, 0.0, 0.0]},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "blt": {"encoder_hash_byte_group_vocab": 32},
    "reformer": {"axial_pos_embds_dim": [32, 32], "axial_pos_shape": [4, 8]},
    "gemma3n_text": {"intermediate_size": [96, 96]},
}

# Inputs: a value, or a function of the maker and of what it has made. None takes an input away.
# Not architectures of their own, or not to be run here.
SKIP: dict[str, str] = {}

INPUTS: dict[str, dict[str, Any]] = {}
