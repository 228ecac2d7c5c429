"""What the generic rules do not get right, by family: data, and shapes of tensors."""

from __future__ import annotations

from typing import Any

import torch

MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
RESNET = {
    "model_type": "resnet",
    "embedding_size": 16,
    "hidden_sizes": [16, 16, 32, 32],
    "depths": [1, 1, 1, 1],
    "layer_type": "basic",
    "out_features": ["stage2", "stage3", "stage4"],
}
NO_TIMM = {"use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None, "backbone_config": RESNET}

HGNET = {
    "backbone_config.stage_in_channels": [48, 64, 64, 64],
    "backbone_config.stage_mid_channels": [16, 16, 16, 16],
    "backbone_config.stage_out_channels": [64, 64, 64, 64],
    "decoder_in_channels": [64, 64, 64],
}
HIERA = {
    "hidden_size": 16,
    "embed_dim_per_stage": [16, 32, 32, 32],
    "num_attention_heads_per_stage": [1, 2, 2, 2],
    "blocks_per_stage": [1, 1, 1, 1],
    "image_size": [64, 64],
    "global_attention_blocks": [3],
    "window_size_per_stage": [8, 4, 4, 2],
}
NECK = {"backbone_channel_list": [32, 32, 32, 16], "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]]}


def under(prefix: str, values: dict[str, Any]) -> dict[str, Any]:
    """The same values, of a configuration within."""
    return {f"{prefix}.{name}": value for name, value in values.items()}


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
    "cohere_compass": {
        "text_config.rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 1e4},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        }
    },
    "cohere_compass_text": {
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 1e4},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        }
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "deepseek_ocr2": {"text_config.mlp_layer_types": ["dense", "sparse"]},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "diffusion_gemma": {
        "text_config.num_experts": 4,
        "text_config.top_k_experts": 2,
        "text_config.moe_intermediate_size": 64,
        "canvas_length": 8,
    },
    "donut-swin": {"window_size": 2},
    "mask2former": {"backbone_config.window_size": 2},
    "emu3": {"vocabulary_map": {"<|extra_200|>": 150, "<image>": 151}},
    "chameleon": {"vocabulary_map": {"<image>": 151, "IMGIMGBS00000I": 152}},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "granite4_vision": {
        "deepstack_layer_map": [[0, 0]],
        "downsample_rate": "1/2",
        "spatial_target_layers": [0, 0, 1, 1],
    },
    "mimi": {"codebook_dim": 64, "vector_quantization_hidden_dimension": 64, "upsample_groups": 64},
    "rt_detr": {"encoder_in_channels": [64, 64, 64], "decoder_in_channels": [64, 64, 64], "encode_proj_layers": [2]},
    "rt_detr_v2": {"encoder_in_channels": [64, 64, 64], "decoder_in_channels": [64, 64, 64], "encode_proj_layers": [2]},
    "d_fine": HGNET,
    "deimv2": HGNET,
    "pp_doclayout_v3": HGNET,
    "pp_doclayout_v4": HGNET,
    "sam2_hiera_det_model": HIERA,
    "sam2_vision_model": under("backbone_config", HIERA) | NECK,
    "sam2": under("vision_config.backbone_config", HIERA) | under("vision_config", NECK),
    "qwen4_exp": {
        "text_config.indexer_n_heads": 2,
        "text_config.indexer_kv_heads": 1,
        "text_config.indexer_head_dim": 16,
        "text_config.indexer_budget": 4,
        "text_config.indexer_compress_ratio": 2,
    },
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
    },
    "sam": {
        "vision_config.num_pos_feats": 32,
        "vision_config.global_attn_indexes": [1],
        "vision_config.window_size": 2,
    },
    "sam_hq": {
        "vision_config.num_pos_feats": 32,
        "vision_config.global_attn_indexes": [1],
        "vision_config.window_size": 2,
    },
    "lilt": {"hidden_size": 96, "num_attention_heads": 4},
    "depth_anything": {"neck_hidden_sizes": [16, 32, 32, 32]},
    "align": {
        "vision_config.width_coefficient": 0.25,
        "vision_config.depth_coefficient": 0.3,
        "vision_config.hidden_dim": 320,
        "projection_dim": 80,
    },
    "efficientnet": {"width_coefficient": 0.25, "depth_coefficient": 0.3, "hidden_dim": 320},
    "dbrx": {
        "attn_config": {"clip_qkv": 8, "kv_n_heads": 2, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "perceiver": {
        "d_latents": 64,
        "d_model": 64,
        "num_latents": 6,
        "num_self_attends_per_block": 1,
        "num_self_attention_heads": 4,
        "num_cross_attention_heads": 4,
    },
    "gemma3": {"mm_tokens_per_image": 4},
    "aria": {"projector_patch_to_query_dict": {16: 4}},
    "qwen2_audio": {"audio_config.max_source_positions": 32},
    "muse_spark": {
        "audio_config.patch_sizes": [4, 4],
        "audio_config.hidden_sizes": [64, 64],
        "audio_config.depths": [1, 1],
    },
    "fun_asr_nano": {"adaptor_config.intermediate_size": 16},
    "molmo2": {"adapter_config.vision_feature_layer": [1, 0]},
    "zamba": {"num_hidden_layers": 4, "layer_types": ["mamba", "hybrid", "mamba", "hybrid"]},
    "mllama": {"vision_config.intermediate_layers_indices": [0, 1], "vision_config.vision_output_dim": 192},
    "pp_doclayout_v2": HGNET | {"class_thresholds": [0.5, 0.5], "class_order": [0, 1]},
    "lw_detr": {"projector_scale_factors": [1.0]},
    "gemma4": {
        "vision_config": {
            "model_type": "gemma4_vision",
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "head_dim": 16,
            "position_embedding_size": 64,
            "pooling_kernel_size": 2,
        }
    },
    "slanet": {"backbone_config.stage_out_channels": [64, 64, 64, 64]},
    "clap": {"audio_config.window_size": 2, "audio_config.hidden_size": 512},
    "colqwen2": {"vlm_config.text_config.rope_parameters": MROPE},
    "tvp": {"max_img_size": 448},
    "ernie4_5_vl_moe": {"text_config.rope_parameters": MROPE | {"mrope_section": [3, 3, 2]}},
    "layoutlmv3": {"coordinate_size": 12, "shape_size": 8},
    "superpoint": {"keypoint_decoder_dim": 65},
    "superglue": {"keypoint_detector_config.keypoint_decoder_dim": 65},
    "lightglue": {"keypoint_detector_config.keypoint_decoder_dim": 65},
    "muse_spark_audio": {"patch_sizes": [4, 4], "hidden_sizes": [64, 64], "depths": [1, 1]},
    "nemotron_h_omni": {"vision_config.video_temporal_patch_size": 2},
    "pix2struct": {"vision_config.patch_embed_hidden_size": 768},
    "seggpt": {"image_size": [128, 64]},
    "step3p7": {"text_config.sliding_window": 4},
    "vjepa2": {"crop_size": 32},
    "xmod": {"default_language": "en_XX"},
    "hunyuan_vl": {"text_config.head_dim": 16, "text_config.rope_parameters": MROPE | {"mrope_section": [2, 2, 2, 2]}},
    "hunyuan_vl_text": {"head_dim": 16, "rope_parameters": MROPE | {"mrope_section": [2, 2, 2, 2]}},
    "esm": {"vocab_size": 160, "pad_token_id": 1, "mask_token_id": 2},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "ministral": {"head_dim": 16},
    "nemotron": {"head_dim": 16, "num_key_value_heads": 2},
    "detr": NO_TIMM,
    "conditional_detr": NO_TIMM,
    "dab-detr": NO_TIMM,
    "deformable_detr": NO_TIMM,
    "table-transformer": NO_TIMM,
    "autoformer": {"prediction_length": 8, "context_length": 16, "lags_sequence": [1, 2], "num_time_features": 1},
    "informer": {"prediction_length": 8, "context_length": 16, "lags_sequence": [1, 2], "num_time_features": 1},
    "time_series_transformer": {
        "prediction_length": 8,
        "context_length": 16,
        "lags_sequence": [1, 2],
        "num_time_features": 1,
    },
    "bit": {"num_groups": 4},
    "blip-2": {"image_token_index": 150},
    "instructblip": {"image_token_index": 150},
    "instructblipvideo": {"video_token_index": 150},
    "cvt": {"embed_dim": [16, 32, 32], "num_heads": [2, 2, 2], "depth": [1, 2, 3], "drop_path_rate": [0.0, 0.0, 0.0]},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "blt": {"encoder_hash_byte_group_vocab": 32},
    "reformer": {"axial_pos_embds_dim": [32, 32], "axial_pos_shape": [4, 8]},
    "gemma3n_text": {"intermediate_size": [96, 96], "num_kv_shared_layers": 0},
}


def pixels(*shape: int) -> Any:
    """Images of another shape than (channels, height, width)."""
    return lambda maker: maker.floats(*shape)


def same(value: Any) -> Any:
    """The same value for every example."""
    return lambda maker: maker.every(value)


def ids(*shape: int) -> Any:
    """Random words."""
    return lambda maker: maker.words(*shape)


SERIES = {
    "past_values": pixels(18),
    "past_time_features": pixels(18, 1),
    "past_observed_mask": same([1.0] * 18),
    "future_values": pixels(8),
    "future_time_features": pixels(8, 1),
}
PATCHES = {"pixel_values": pixels(16, 768), "pixel_attention_mask": same([1] * 16), "spatial_shapes": same([4, 4])}

# Inputs, by model type: a value, or a function of the maker. None takes an input away.
INPUTS: dict[str, dict[str, Any]] = {
    "autoformer": SERIES,
    "informer": SERIES,
    "time_series_transformer": SERIES,
    "siglip2": PATCHES,
    "siglip2_vision_model": PATCHES,
    "lfm2_vl": PATCHES,
    "bros": {"bbox": pixels(8, 8)},
    "idefics": {"pixel_values": pixels(1, 3, 56, 56), "image_attention_mask": same([[1]] * 8)},
    "idefics2": {"pixel_values": pixels(1, 3, 128, 128)},
    "idefics3": {"pixel_values": pixels(1, 3, 128, 128)},
    "smolvlm": {"pixel_values": pixels(1, 3, 128, 128)},
    "lightglue": {"pixel_values": pixels(2, 3, 64, 64)},
    "superglue": {"pixel_values": pixels(2, 3, 64, 64)},
    "llava_next": {"pixel_values": pixels(3, 3, 56, 56)},
    "instructblip": {"qformer_input_ids": ids(5)},
    "instructblipvideo": {"qformer_input_ids": ids(5), "pixel_values": pixels(2, 3, 56, 56)},
    "oneformer": {"task_inputs": ids(77)},
    "video_llama_3": {"image_merge_sizes": same(2)},
    "lxmert": {"visual_feats": pixels(4, 64), "visual_pos": pixels(4, 4)},
    "pi0": {
        "state": pixels(32),
        "pixel_values": pixels(1, 3, 56, 56),
        "pixel_attention_mask": same([1]),
        "actions": pixels(50, 32),
        "noise": pixels(50, 32),
        "timestep": pixels(),
    },
    "pix2struct": {
        "flattened_patches": lambda maker: torch.cat([torch.ones(3, 8, 2), maker.floats(8, 768)], -1),
        "attention_mask": same([1] * 8),
    },
    "seggpt": {
        "pixel_values": pixels(3, 64, 64),
        "prompt_pixel_values": pixels(3, 64, 64),
        "prompt_masks": pixels(3, 64, 64),
    },
    "blip_2_qformer": {"query_embeds": pixels(6, 64), "encoder_hidden_states": pixels(9, 64)},
    "univnet": {"input_features": pixels(8, 100), "noise_sequence": pixels(8, 64)},
    "vit_mae": {"noise": pixels(16)},
    "hiera": {"noise": pixels(4)},
    "decision_transformer": {
        "states": pixels(5, 17),
        "actions": pixels(5, 4),
        "rewards": pixels(5, 1),
        "returns_to_go": pixels(5, 1),
        "timesteps": ids(5),
        "attention_mask": same([1] * 5),
    },
    "dia": {"decoder_input_ids": ids(5, 9)},
    "musicgen": {"input_values": None, "decoder_input_ids": lambda m: m.words(4, 5).flatten(0, 1)},
    "clap": {"input_features": pixels(1, 64, 64)},
    "mllama": {
        "pixel_values": pixels(1, 4, 3, 56, 56),
        "aspect_ratio_ids": same([1]),
        "aspect_ratio_mask": same([[1] * 4]),
        "cross_attention_mask": same([[[1] * 4]] * 12),
    },
    "colqwen2": {"pixel_values": pixels(16, 1176)},
    "gemma4_audio": {"input_features": pixels(64, 128)},
    "gemma4_vision": {
        "pixel_values": pixels(16, 768),
        "pixel_position_ids": same([[i // 4, i % 4] for i in range(16)]),
    },
    "gemma4": {"pixel_values": pixels(16, 768), "image_position_ids": same([[i // 4, i % 4] for i in range(16)])},
    "granite_speech5_ctc": {"input_features": pixels(64, 320)},
    "granite_speech5_encoder": {"input_features": pixels(64, 320)},
    "kimi_k25_vision": {"pixel_values": lambda maker: maker.floats(16, 3, 14, 14).flatten(0, 1)},
    "kimi_k25": {"pixel_values": lambda maker: maker.floats(16, 3, 14, 14).flatten(0, 1)},
    "kyutai_speech_to_text": {"input_ids": ids(8, 33)},
    "kosmos-2": {"image_embeds_position_mask": same([0, 1, 1, 1, 1, 1, 1, 0])},
    "pp_ocrv5_mobile_rec": {"pixel_values": pixels(3, 96, 160)},
    "pp_ocrv5_server_rec": {"pixel_values": pixels(3, 96, 160)},
    "qwen3_asr": {"input_features": pixels(128, 100), "input_features_mask": same([1] * 100)},
    "qwen3_asr_encoder": {"input_features": pixels(128, 100), "input_features_mask": same([1] * 100)},
    "qwen2_audio": {"feature_attention_mask": same([1] * 64)},
    "radio": {"pixel_values": pixels(3, 64, 64), "image_grid_hw": None},
    "speech-encoder-decoder": {"input_features": None, "input_values": pixels(2400)},
    "udop": {"bbox": same([[0.1, 0.1, 0.5, 0.5]] * 8), "pixel_values": None},
    "video_llama_3_vision": {"merge_sizes": same(2)},
    "layoutlmv3": {"bbox": same([[1, 1, 5, 5]] * 8)},
}
