"""Networks of diffusers, small: by class, the inputs and what the class is called with. Data."""

from __future__ import annotations

import torch
from others import floats, ids, keys, rows, shared, times

# fmt: off
TEXT = {"encoder_hidden_states": floats(5, 6), "timestep": times}
LATENT = {"hidden_states": floats(4, 8, 8)} | TEXT
VIDEO = {"hidden_states": floats(4, 2, 8, 8)} | TEXT
NOISY = {"sample": floats(4, 8, 8)} | TEXT
PACKED = {"hidden_states": floats(16, 4)} | TEXT | {"img_ids": shared(16, 3), "txt_ids": shared(5, 3)}
PICTURE = {"sample": floats(3, 8, 8)}
UNET = {"block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1, "sample_size": 8}
COND = UNET | {"in_channels": 4, "out_channels": 4, "cross_attention_dim": 6}
VAE = {"norm_num_groups": 4, "latent_channels": 4}
ENCODER, DECODER = ("DownEncoderBlock2D",) * 2, ("UpDecoderBlock2D",) * 2
HEADS = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "num_layers": 1}
SMALL = HEADS | {"out_channels": 4, "patch_size": 2}
IMAGE = SMALL | {"sample_size": 8}

# By class: inputs, and what the class is called with.
DIFFUSERS = {
    "UNet1DModel": (
        {"sample": floats(4, 16), "timestep": times},
        {"block_out_channels": (8, 8, 16, 16), "in_channels": 4, "out_channels": 4, "time_embedding_type": "positional",
         "use_timestep_embedding": True, "out_block_type": "OutConv1DBlock", "mid_block_type": "MidResTemporalBlock1D",
         "flip_sin_to_cos": False, "freq_shift": 1.0, "act_fn": "swish", "down_block_types": ("DownResnetBlock1D",) * 4,
         "up_block_types": ("UpResnetBlock1D",) * 3}),
    "UNet2DModel": (
        {"sample": floats(3, 8, 8), "timestep": times},
        UNET | {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "attention_head_dim": 4,
                "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}),
    "UNet2DConditionModel": (
        NOISY, COND | {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "attention_head_dim": 2,
                       "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}),
    "UNet3DConditionModel": (
        {"sample": floats(4, 2, 8, 8)} | TEXT,
        COND | {"down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"), "attention_head_dim": 2,
                "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D")}),
    "UNetSpatioTemporalConditionModel": (
        {"sample": floats(2, 4, 8, 8), "timestep": times, "encoder_hidden_states": floats(1, 6),
         "added_time_ids": floats(3)},
        {"down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"), "in_channels": 4,
         "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"), "cross_attention_dim": 6,
         "num_attention_heads": (2, 2), "addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 12,
         "block_out_channels": (32, 32), "layers_per_block": 1, "sample_size": 8}),
    "ControlNetModel": (
        NOISY | {"controlnet_cond": floats(3, 16, 16)},
        {"in_channels": 4, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "cross_attention_dim": 6,
         "attention_head_dim": 2, "block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1,
         "conditioning_embedding_out_channels": (4, 8)}),
    "UVit2DModel": (
        {"input_ids": ids(12, 8, 8), "encoder_hidden_states": floats(5, 8), "pooled_text_emb": floats(16),
         "micro_conds": floats(5)},
        {"hidden_size": 16, "cond_embed_dim": 16, "encoder_hidden_size": 8, "vocab_size": 16, "codebook_size": 12,
         "in_channels": 16, "block_out_channels": 16, "num_res_blocks": 1, "num_hidden_layers": 1, "sample_size": 8,
         "num_attention_heads": 2, "block_num_heads": 2, "intermediate_size": 16, "micro_cond_encode_dim": 4,
         "micro_cond_embed_dim": 20}),
    "Kandinsky3UNet": (
        {"sample": floats(4, 8, 8), "encoder_attention_mask": keys(5, torch.long)} | TEXT,
        {"in_channels": 4, "block_out_channels": (32, 64), "time_embedding_dim": 4, "groups": 4, "layers_per_block": 3,
         "attention_head_dim": 4, "cross_attention_dim": 32, "encoder_hid_dim": 6}),
    "StableCascadeUNet": (
        {"sample": floats(4, 8, 8), "timestep_ratio": times, "clip_text_pooled": floats(1, 6),
         "clip_text": floats(5, 6), "clip_img": floats(1, 6)},
        {"in_channels": 4, "out_channels": 4, "timestep_ratio_embedding_dim": 8, "patch_size": 1,
         "conditioning_dim": 16, "block_out_channels": (16, 16), "num_attention_heads": (2, 2),
         "down_num_layers_per_block": (1, 1), "up_num_layers_per_block": (1, 1), "clip_text_in_channels": 6,
         "clip_text_pooled_in_channels": 6, "clip_image_in_channels": 6, "down_blocks_repeat_mappers": (1, 1),
         "up_blocks_repeat_mappers": (1, 1), "block_types_per_layer": (("SDCascadeResBlock", "SDCascadeTimestepBlock",
         "SDCascadeAttnBlock"),) * 2, "switch_level": (False,)}),
    "T2IAdapter": ({"x": floats(3, 32, 32)}, {"channels": [8, 8], "num_res_blocks": 1, "downscale_factor": 8}),
    "AutoencoderKL": (
        PICTURE, VAE | {"down_block_types": ENCODER, "up_block_types": DECODER, "block_out_channels": (8, 16)}),
    "VQModel": (PICTURE, VAE | {"down_block_types": ENCODER, "up_block_types": DECODER, "block_out_channels": (8, 16),
                                "num_vq_embeddings": 12}),
    "AutoencoderTiny": (
        PICTURE, {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8), "latent_channels": 2,
                  "num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1), "upsampling_scaling_factor": 2}),
    "AsymmetricAutoencoderKL": (
        PICTURE, VAE | {"down_block_types": ENCODER, "up_block_types": DECODER, "down_block_out_channels": (8, 16),
                        "up_block_out_channels": (8, 16), "layers_per_down_block": 1, "layers_per_up_block": 1}),
    "AutoencoderKLTemporalDecoder": (
        PICTURE | {"num_frames": 1},
        {"block_out_channels": (32, 32), "down_block_types": ENCODER, "layers_per_block": 1, "latent_channels": 4}),
    "AutoencoderDC": (
        PICTURE, {"latent_channels": 4, "attention_head_dim": 4, "encoder_block_out_channels": (8, 8),
                  "encoder_block_types": ("ResBlock", "EfficientViTBlock"), "decoder_block_out_channels": (8, 8),
                  "decoder_block_types": ("ResBlock", "EfficientViTBlock"), "encoder_layers_per_block": (1, 1),
                  "decoder_layers_per_block": (1, 1), "encoder_qkv_multiscales": ((), (5,)),
                  "decoder_qkv_multiscales": ((), (5,))}),
    "AutoencoderOobleck": (
        {"sample": floats(2, 32)},
        {"encoder_hidden_size": 8, "downsampling_ratios": [2, 4], "decoder_channels": 8, "decoder_input_channels": 4,
         "channel_multiples": [1, 2]}),
    "AutoencoderKLCogVideoX": (
        {"sample": floats(3, 3, 8, 8)},
        {"down_block_types": ("CogVideoXDownBlock3D",) * 2, "up_block_types": ("CogVideoXUpBlock3D",) * 2,
         "block_out_channels": (8, 8), "latent_channels": 4, "layers_per_block": 1, "norm_num_groups": 2,
         "temporal_compression_ratio": 2}),
    "AutoencoderKLWan": (
        {"sample": floats(3, 5, 16, 16)},
        {"base_dim": 4, "z_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1,
         "temperal_downsample": [False, True, True]}),
    "AutoencoderKLQwenImage": (
        {"sample": floats(3, 1, 16, 16)},
        {"base_dim": 4, "z_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1,
         "temperal_downsample": [False, True, True], "latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}),
    "AutoencoderKLLTXVideo": (
        {"sample": floats(3, 9, 32, 32)},
        {"latent_channels": 4, "block_out_channels": (8, 8, 8, 8), "layers_per_block": (1, 1, 1, 1, 1),
         "decoder_block_out_channels": (8, 8, 8), "decoder_layers_per_block": (1, 1, 1, 1)}),
    "Transformer2DModel": (
        {"hidden_states": floats(8, 4, 4), "encoder_hidden_states": floats(5, 6)},
        {"num_attention_heads": 2, "attention_head_dim": 4, "in_channels": 8, "num_layers": 1, "norm_num_groups": 4,
         "cross_attention_dim": 6}),
    "TransformerTemporalModel": (
        {"hidden_states": rows(2, 8, 4, 4), "num_frames": 2},
        {"num_attention_heads": 2, "attention_head_dim": 4, "in_channels": 8, "num_layers": 1, "norm_num_groups": 4}),
    "PriorTransformer": (
        {"hidden_states": floats(6), "proj_embedding": floats(6), "attention_mask": keys(5, torch.long)} | TEXT,
        {"num_attention_heads": 2, "attention_head_dim": 4, "num_layers": 1, "embedding_dim": 6, "num_embeddings": 5,
         "additional_embeddings": 4}),
    "DiTTransformer2DModel": (
        {"hidden_states": floats(4, 8, 8), "timestep": ids(10), "class_labels": ids(10)},
        IMAGE | {"num_embeds_ada_norm": 10, "norm_num_groups": 4}),
    "PixArtTransformer2DModel": (
        LATENT | {"encoder_attention_mask": keys(5, torch.long)},
        IMAGE | {"cross_attention_dim": 16, "caption_channels": 6, "use_additional_conditions": False}),
    "SD3Transformer2DModel": (
        LATENT | {"pooled_projections": floats(7)},
        IMAGE | {"joint_attention_dim": 6, "caption_projection_dim": 16, "pooled_projection_dim": 7,
                 "pos_embed_max_size": 8, "qk_norm": "rms_norm"}),
    "FluxTransformer2DModel": (
        PACKED | {"pooled_projections": floats(7), "guidance": times},
        HEADS | {"patch_size": 1, "num_single_layers": 1, "joint_attention_dim": 6, "pooled_projection_dim": 7,
                 "guidance_embeds": True, "axes_dims_rope": (2, 2, 4)}),
    "ChromaTransformer2DModel": (
        PACKED, HEADS | {"patch_size": 1, "num_single_layers": 1, "attention_head_dim": 16, "joint_attention_dim": 6,
                         "axes_dims_rope": (4, 4, 8), "approximator_num_channels": 8, "approximator_hidden_dim": 16,
                         "approximator_layers": 1}),
    "BriaTransformer2DModel": (
        PACKED, HEADS | {"patch_size": 1, "num_single_layers": 1, "joint_attention_dim": 6,
                         "axes_dims_rope": (2, 2, 4)}),
    "QwenImageTransformer2DModel": (
        {"hidden_states": floats(16, 16), "img_shapes": [(1, 4, 4)]} | TEXT,
        HEADS | {"patch_size": 2, "in_channels": 16, "out_channels": 4, "attention_head_dim": 16,
                 "joint_attention_dim": 6, "axes_dims_rope": (8, 4, 4)}),
    "AuraFlowTransformer2DModel": (
        LATENT, {"sample_size": 8, "patch_size": 2, "in_channels": 4, "num_mmdit_layers": 1,
                 "num_single_dit_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2, "out_channels": 4,
                 "joint_attention_dim": 6, "caption_projection_dim": 16, "pos_embed_max_size": 16}),
    "SanaTransformer2DModel": (
        LATENT, IMAGE | {"num_cross_attention_heads": 2, "cross_attention_head_dim": 8, "cross_attention_dim": 16,
                         "caption_channels": 6}),
    "Lumina2Transformer2DModel": (
        LATENT | {"encoder_attention_mask": keys(5)},
        {"sample_size": 8, "patch_size": 2, "in_channels": 4, "hidden_size": 24, "num_layers": 1,
         "num_refiner_layers": 1, "num_attention_heads": 3, "num_kv_heads": 1, "multiple_of": 2,
         "axes_dim_rope": (4, 2, 2), "axes_lens": (32, 32, 32), "cap_feat_dim": 6}),
    "CogView3PlusTransformer2DModel": (
        LATENT | {"original_size": floats(2), "target_size": floats(2), "crop_coords": floats(2)},
        IMAGE | {"text_embed_dim": 6, "time_embed_dim": 8, "condition_dim": 2, "pos_embed_max_size": 8}),
    "CogView4Transformer2DModel": (
        LATENT | {"original_size": floats(2), "target_size": floats(2), "crop_coords": floats(2)},
        IMAGE | {"text_embed_dim": 6, "time_embed_dim": 8, "condition_dim": 2, "rope_axes_dim": (8, 8)}),
    "CogVideoXTransformer3DModel": (
        {"hidden_states": floats(3, 4, 8, 8)} | TEXT,
        SMALL | {"time_embed_dim": 2, "text_embed_dim": 6, "sample_width": 8, "sample_height": 8, "sample_frames": 9,
                 "max_text_seq_length": 5}),
    "LTXVideoTransformer3DModel": (
        {"hidden_states": floats(8, 4), "encoder_attention_mask": keys(5, torch.long), "num_frames": 2, "height": 2,
         "width": 2} | TEXT,
        SMALL | {"patch_size": 1, "patch_size_t": 1, "cross_attention_dim": 16, "caption_channels": 6}),
    "WanTransformer3DModel": (
        VIDEO, SMALL | {"patch_size": (1, 2, 2), "attention_head_dim": 12, "text_dim": 6, "freq_dim": 16,
                        "ffn_dim": 16, "rope_max_seq_len": 16}),
    "SkyReelsV2Transformer3DModel": (
        VIDEO, SMALL | {"patch_size": (1, 2, 2), "attention_head_dim": 12, "text_dim": 6, "freq_dim": 16,
                        "ffn_dim": 16, "rope_max_seq_len": 16}),
    "HunyuanVideoTransformer3DModel": (
        VIDEO | {"encoder_attention_mask": keys(5, torch.long), "pooled_projections": floats(7), "guidance": times},
        SMALL | {"attention_head_dim": 10, "num_single_layers": 1, "num_refiner_layers": 1, "patch_size_t": 1,
                 "guidance_embeds": True, "text_embed_dim": 6, "pooled_projection_dim": 7,
                 "rope_axes_dim": (2, 4, 4)}),
    "LatteTransformer3DModel": (
        VIDEO, IMAGE | {"cross_attention_dim": 16, "caption_channels": 6, "norm_type": "ada_norm_single",
                        "norm_elementwise_affine": False, "video_length": 2}),
    "AllegroTransformer3DModel": (
        VIDEO | {"encoder_hidden_states": floats(1, 5, 6)},
        SMALL | {"attention_head_dim": 12, "cross_attention_dim": 24, "sample_width": 8, "sample_height": 8,
                 "sample_frames": 2, "caption_channels": 6}),
    "MochiTransformer3DModel": (
        VIDEO | {"encoder_hidden_states": floats(5, 16), "encoder_attention_mask": keys(5)},
        HEADS | {"patch_size": 2, "num_layers": 2, "pooled_projection_dim": 16, "text_embed_dim": 16,
                 "time_embed_dim": 4, "max_sequence_length": 5}),
    "StableAudioDiTModel": (
        {"hidden_states": floats(4, 4), "encoder_hidden_states": floats(5, 4), "timestep": times,
         "global_hidden_states": floats(1, 6)},
        {"sample_size": 4, "in_channels": 4, "num_layers": 1, "attention_head_dim": 4, "num_attention_heads": 2,
         "num_key_value_attention_heads": 1, "out_channels": 4, "cross_attention_dim": 4, "time_proj_dim": 8,
         "global_states_input_dim": 6, "cross_attention_input_dim": 4}),
}
# fmt: on
