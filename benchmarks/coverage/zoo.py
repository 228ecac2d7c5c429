"""Networks of other public packages, small: for each, its inputs, and what it is called with. Data.

Networks only, not the wrappers that train them, whose forward draws random numbers. Left out are networks that take
their examples as a list, what needs torchvision (`others.txt` goes in without it), and pytorchcv's menet108_8x1_g3,
whose gradients explode with random weights: the loop's own norms move by 2e-6 where the inputs move by 1e-15.
"""

from __future__ import annotations

from typing import Any

from others import Case, New, causal, floats, hidden, ids, keys, shared, times
from zoo_diffusers import DIFFUSERS

# fmt: off
WORDS = {"x": ids(16, 6)}


def layers(kind: str, **options: Any) -> New:
    """The layers of x-transformers."""
    return New(f"x_transformers.{kind}", dim=16, depth=2, heads=2, attn_dim_head=8, **options)


def text(kind: str = "Decoder", wrapper: dict[str, Any] | None = None, **options: Any) -> dict[str, Any]:
    """What a language model of x-transformers is called with."""
    return {"num_tokens": 16, "max_seq_len": 8, "attn_layers": layers(kind, **options)} | (wrapper or {})


VARIANTS = {
    "rotary": {"rotary_pos_emb": True}, "alibi": {"alibi_pos_bias": True}, "t5 bias": {"rel_pos_bias": True},
    "dynamic bias": {"dynamic_pos_bias": True}, "swiglu": {"ff_glu": True, "ff_swish": True},
    "talking heads": {"attn_pre_talking_heads": True, "attn_post_talking_heads": True},
    "memory keys": {"attn_num_mem_kv": 2}, "sparse": {"attn_sparse_topk": 3}, "gated residual": {"gate_residual": True},
    "residual attention": {"residual_attn": True}, "macaron": {"macaron": True}, "shifted": {"shift_tokens": 1},
    "hyper-connections": {"num_residual_streams": 2}, "tied layers": {"weight_tie_layers": True},
    "cope": {"attn_use_cope": True, "attn_cope_max_pos": 8},
}
X_TRANSFORMERS = {f"TransformerWrapper ({name})": (WORDS, text(**options)) for name, options in VARIANTS.items()} | {
    "TransformerWrapper": (WORDS, text()),
    "TransformerWrapper (encoder)": (
        WORDS | {"mask": keys(6)}, text("Encoder", {"num_memory_tokens": 2, "use_cls_token": True})),
    "TransformerWrapper (cross)": (
        WORDS | {"context": floats(4, 16), "context_mask": keys(4)}, text(cross_attend=True)),
    "TransformerWrapper (mixture of softmax)": (
        WORDS, text(wrapper={"mixture_of_softmax": True, "mixture_of_softmax_k": 2})),
    "XValTransformerWrapper": (
        {"x": ids(8, 6), "x_num": floats(6)}, text() | {"num_tokens": 8, "numerical_token_id": 3}),
    "ContinuousTransformerWrapper": (
        {"x": floats(6, 4), "mask": keys(6)},
        {"dim_in": 4, "dim_out": 5, "max_seq_len": 8, "attn_layers": layers("Encoder")}),
    "ViTransformerWrapper": (
        {"img": floats(3, 16, 16)},
        {"image_size": 16, "patch_size": 4, "num_classes": 5, "attn_layers": layers("Encoder")}),
    "NeoMLP": ({"x": floats(3)}, {"dim_in": 3, "dim_hidden": 4, "dim_out": 2, "dim_model": 16, "depth": 1}),
}

VIT = {"image_size": 16, "patch_size": 4, "num_classes": 5, "dim": 16, "depth": 2, "heads": 2, "mlp_dim": 16}
NO_SIZE = {name: value for name, value in VIT.items() if name not in ("image_size", "patch_size")}
CLIP = NO_SIZE | {"image_size": 16, "frames": 4, "image_patch_size": 4, "frame_patch_size": 2}
IMG, IMG32, IMG64 = ({"img": floats(3, size, size)} for size in (16, 32, 64))
X64 = {"x": floats(3, 64, 64)}
FOUR = {"num_classes": 5, "depth": (1, 1, 1, 1)}
VIT_PYTORCH = dict.fromkeys([
    "vit.ViT", "simple_vit.SimpleViT", "deepvit.DeepViT", "parallel_vit.ViT", "vit_for_small_dataset.ViT",
    "learnable_memory_vit.ViT", "simple_vit_with_qk_norm.SimpleViT", "simple_vit_with_register_tokens.SimpleViT",
    "simple_vit_with_value_residual.SimpleViT", "simple_vit_with_patch_dropout.SimpleViT",
    "simple_vit_with_sparse_gating.SimpleViTWithSparseGating",
    "simple_vit_with_specialized_cls.SimpleViT", "simple_vit_orthog_residual_update.SimpleViT",
    "simple_vit_attn_residual.SimpleViTAttnResidual", "attn_residual_with_dca_simple_vit.SimpleViT",
    "vit_with_patch_merger.ViT", "vit_with_patch_dropout.ViT", "vit_with_decorr.ViT", "vit_with_keel_post_ln.ViT",
    "vit_5.ViT", "vit_detpool.ViTDetPool", "rvt.RvT", "simple_flash_attn_vit.SimpleViT",
    "simple_uvit.SimpleUViT",
], (IMG, VIT)) | {
    "simple_vit_with_hyper_connections.SimpleViT": (IMG, VIT | {"num_residual_streams": 2}),
    "normalized_vit.nViT": ({"images": floats(3, 16, 16)}, VIT),
    "simple_vit_with_fft.SimpleViT": (IMG, VIT | {"freq_patch_size": 4}),
    "jumbo_vit.JumboViT": (IMG, VIT | {"num_jumbo_cls": 1, "jumbo_cls_k": 2, "jumbo_ff_mult": 2}),
    "ats_vit.ViT": (IMG, VIT | {"max_tokens_per_depth": (8, 4)}),
    "cait.CaiT": (IMG, VIT | {"cls_depth": 1}),
    "xcit.XCiT": (IMG, VIT | {"cls_depth": 1}),
    "pit.PiT": (IMG, VIT | {"depth": (1, 1)}),
    "vit_1d.ViT": ({"series": floats(3, 16)}, NO_SIZE | {"seq_len": 16, "patch_size": 4}),
    "simple_vit_1d.SimpleViT": ({"series": floats(3, 16)}, NO_SIZE | {"seq_len": 16, "patch_size": 4}),
    "vit_3d.ViT": ({"video": floats(3, 4, 16, 16)}, CLIP),
    "simple_vit_3d.SimpleViT": ({"video": floats(3, 4, 16, 16)}, CLIP),
    "vivit.ViViT": (
        {"video": floats(3, 4, 16, 16)},
        {name: value for name, value in CLIP.items() if name != "depth"} | {"spatial_depth": 1, "temporal_depth": 1}),
    "nest.NesT": (IMG32, {"image_size": 32, "patch_size": 4, "num_classes": 5, "dim": 8, "heads": 2,
                          "num_hierarchies": 2, "block_repeats": (1, 1)}),
    "t2t.T2TViT": (IMG32, NO_SIZE | {"image_size": 32, "t2t_layers": ((3, 2), (3, 2))}),
    "cct.CCT": ({"x": floats(3, 32, 32)},
                {"img_size": 32, "num_classes": 5, "embedding_dim": 16, "n_conv_layers": 1, "num_layers": 1,
                 "num_heads": 2, "kernel_size": 3, "stride": 2, "padding": 1, "mlp_ratio": 2}),
    "cross_vit.CrossViT": (
        IMG32, {"image_size": 32, "num_classes": 5, "depth": 1, "cross_attn_depth": 1, "cross_attn_heads": 2}
        | {f"{size}_{name}": value for size in ("sm", "lg") for name, value in (
            ("dim", 16), ("patch_size", 4 if size == "sm" else 8), ("enc_depth", 1), ("enc_heads", 2),
            ("enc_mlp_dim", 16))}),
    "max_vit.MaxViT": ({"x": floats(3, 32, 32)}, {"num_classes": 5, "dim_conv_stem": 8, "dim": 8, "dim_head": 4,
                                                  "depth": (1, 1), "window_size": 4}),
    "cvt.CvT": ({"x": floats(3, 32, 32)}, {"num_classes": 5, "s1_emb_dim": 8, "s2_emb_dim": 8, "s3_emb_dim": 8,
                                           "s2_heads": 2, "s3_heads": 2, "s3_depth": 1}),
    "levit.LeViT": (IMG64, {"image_size": 64, "num_classes": 5, "dim": (16, 32), "depth": 1, "heads": 2, "mlp_mult": 2,
                            "stages": 2}),
    "twins_svt.TwinsSVT": (
        X64, {"num_classes": 5} | {f"s{stage}_{name}": value for stage in (1, 2, 3, 4) for name, value in (
            ("emb_dim", 8), ("patch_size", 2), ("local_patch_size", 4), ("global_k", 4))}),
    "crossformer.CrossFormer": (X64, FOUR | {"dim": (32, 32, 32, 32), "global_window_size": (4, 2, 2, 1),
                                             "local_window_size": 2}),
    "regionvit.RegionViT": (X64, FOUR | {"dim": (8, 8, 8, 8), "window_size": 2}),
    "scalable_vit.ScalableViT": (IMG64, FOUR | {"dim": 8, "heads": (1, 1, 1, 1), "ssa_dim_key": (4, 4, 4, 4),
                                                "reduction_factor": (2, 2, 1, 1), "window_size": (4, 4, 2, 2)}),
    "sep_vit.SepViT": ({"x": floats(3, 224, 224)}, FOUR | {"dim": 8, "dim_head": 4, "heads": (1, 1, 1, 1)}),
    "mobile_vit.MobileViT": (X64, {"image_size": (64, 64), "dims": [16] * 3, "channels": [8] * 11, "num_classes": 5}),
}

PLANE, PLANE32 = {"x": floats(1, 16, 16)}, {"x": floats(1, 32, 32)}
FLAT = {"spatial_dims": 2, "in_channels": 1, "out_channels": 2}
STEPS = {"channels": (4, 8, 8), "strides": (2, 2)}
MONAI = {
    "UNet": (PLANE, FLAT | STEPS | {"num_res_units": 1}),
    "AttentionUnet": (PLANE, FLAT | STEPS),
    "BasicUNet": (PLANE32, FLAT | {"features": (4, 4, 8, 8, 8, 4)}),
    "BasicUNetPlusPlus": (PLANE32, FLAT | {"features": (4, 4, 8, 8, 8, 4)}),
    "DynUNet": (PLANE, FLAT | {"kernel_size": [3, 3, 3], "strides": [1, 2, 2], "upsample_kernel_size": [2, 2],
                               "filters": [4, 8, 8]}),
    "SegResNet": (PLANE, FLAT | {"init_filters": 8, "blocks_down": (1, 1), "blocks_up": (1,)}),
    "VNet": (PLANE, {"spatial_dims": 2}),
    "UNETR": ({"x_in": floats(1, 32, 32)}, FLAT | {"img_size": 32, "feature_size": 4, "hidden_size": 24, "mlp_dim": 24,
                                                  "num_heads": 3}),
    "SwinUNETR": ({"x_in": floats(1, 64, 64)}, FLAT | {"feature_size": 12, "depths": (1, 1, 1, 1),
                                                      "num_heads": (1, 1, 2, 2)}),
    "DiffusionModelUNet": (
        PLANE | {"timesteps": times}, FLAT | {"num_res_blocks": 1, "channels": (8, 8), "num_head_channels": 4,
                                              "attention_levels": (False, True), "norm_num_groups": 4}),
    "VQVAE": ({"images": floats(1, 16, 16)},
              FLAT | {"channels": (4, 8), "num_res_layers": 1, "num_res_channels": (4, 8), "num_embeddings": 8,
                      "embedding_dim": 4, "downsample_parameters": ((2, 4, 1, 1),) * 2,
                      "upsample_parameters": ((2, 4, 1, 1, 0),) * 2}),
    "DenseNet": (PLANE32, FLAT | {"init_features": 8, "growth_rate": 4, "block_config": (2, 2)}),
    "HighResNet": (PLANE, {"spatial_dims": 2}),
    "RegUNet": (PLANE, {"spatial_dims": 2, "in_channels": 1, "num_channel_initial": 4, "depth": 2}),
    "LocalNet": (PLANE, FLAT | {"num_channel_initial": 4, "extract_levels": [0, 1]}),
    "GlobalNet": (PLANE, {"image_size": [16, 16], "spatial_dims": 2, "in_channels": 1, "num_channel_initial": 4,
                          "depth": 2}),
    "VoxelMorphUNet": ({"concatenated_pairs": floats(2, 16, 16)},
                       {"spatial_dims": 2, "in_channels": 2, "unet_out_channels": 4, "channels": (4, 4, 4, 4),
                        "final_conv_channels": (4, 4)}),
    "Generator": ({"x": floats(5)}, {"latent_shape": (5,), "start_shape": (4, 4, 4), "channels": (4, 1),
                                     "strides": (2, 2)}),
    "PatchDiscriminator": (PLANE32, {"spatial_dims": 2, "channels": 4, "in_channels": 1, "num_layers_d": 2}),
    "MedNeXt": (PLANE32, FLAT | {"init_filters": 4, "encoder_expansion_ratio": 2, "decoder_expansion_ratio": 2,
                                 "bottleneck_expansion_ratio": 2, "blocks_down": (1, 1, 1, 1),
                                 "blocks_up": (1, 1, 1, 1), "blocks_bottleneck": 1}),
    "Quicknat": ({"input": floats(1, 32, 32)}, {"num_channels": 1, "num_filters": 8}),
    "SPADENet": ({"seg": floats(2, 16, 16), "x": floats(1, 16, 16)},
                 FLAT | {"label_nc": 2, "input_shape": [16, 16], "channels": [4, 4], "z_dim": 4, "is_vae": False}),
}

STREETS = {"x": floats(3, 64, 64)}, {"in_size": (64, 64), "num_classes": 5}
PYTORCHCV = {name: ({"x": floats(3, 32, 32)}, {}) for name in [
    "resnet_cifar.resnet20_cifar10", "preresnet_cifar.preresnet20_cifar10", "seresnet_cifar.seresnet20_cifar10",
    "densenet_cifar.densenet40_k12_bc_cifar10", "rir_cifar.rir_cifar10", "nin_cifar.nin_cifar10",
    "diaresnet_cifar.diaresnet20_cifar10", "ror_cifar.ror3_56_cifar10",
    "shakeshakeresnet_cifar.shakeshakeresnet20_2x16d_cifar10", "shakedropresnet_cifar.shakedropresnet20_cifar10",
]} | {name: ({"x": floats(3, 224, 224)}, {}) for name in [
    "mobilenet.mobilenet_wd4", "mobilenetv2.mobilenetv2_wd4", "mobilenetv3.mobilenetv3_small_w7d20",
    "shufflenet.shufflenet_g3_wd4", "shufflenetv2.shufflenetv2_wd2", "igcv3.igcv3_wd4",
    "squeezenet.squeezenet_v1_1", "ghostnet.ghostnet",
]} | dict.fromkeys([
    "enet.enet_cityscapes", "erfnet.erfnet_cityscapes", "cgnet.cgnet_cityscapes", "unet.unet_cityscapes",
], STREETS)

TINY = {"dim": 16, "depth": 1, "heads": 2}
LM = {"num_tokens": 16} | TINY
TABLE = {"categories": (3, 4), "num_continuous": 5, "dim": 8, "dim_out": 2, "depth": 1, "heads": 2, "dim_head": 4}
MAMBA = {"d_model": 8, "n_layers": 2, "d_state": 4, "pscan": False}
HALF = {"channels": 4, "sources": ["a", "b"], "audio_channels": 1, "depth": 2}
SINGLE = {
    "perceiver_pytorch.Perceiver": (
        {"data": floats(6, 6, 3)},
        {"input_channels": 3, "input_axis": 2, "num_freq_bands": 2, "max_freq": 4.0, "depth": 2, "num_latents": 4,
         "latent_dim": 8, "cross_dim_head": 4, "latent_dim_head": 4, "latent_heads": 2, "num_classes": 5,
         "weight_tie_layers": True}),
    "perceiver_pytorch.PerceiverIO": (
        {"data": floats(6, 6), "mask": keys(6), "queries": shared(4, 5)},
        {"dim": 6, "queries_dim": 5, "logits_dim": 4, "depth": 1, "num_latents": 4, "latent_dim": 8,
         "cross_dim_head": 4, "latent_dim_head": 4, "latent_heads": 2}),
    "performer_pytorch.PerformerLM": (WORDS, LM | {"max_seq_len": 8, "dim_head": 8}),
    "performer_pytorch.Performer": ({"x": floats(6, 16)}, TINY | {"dim_head": 8, "causal": True}),
    "linformer.LinformerLM": (
        {"x": ids(16, 8)}, LM | {"seq_len": 8, "dim_head": 8, "k": 4, "one_kv_head": True, "share_kv": True}),
    "linear_attention_transformer.LinearAttentionTransformerLM": (
        {"x": ids(16, 16)}, LM | {"max_seq_len": 16, "causal": True, "blindspot_size": 4, "n_local_attn_heads": 1,
                                  "local_attn_window_size": 4}),
    "nystrom_attention.Nystromformer": (
        {"x": floats(6, 16), "mask": keys(6)}, TINY | {"dim_head": 8, "num_landmarks": 4, "pinv_iterations": 3}),
    "local_attention.LocalTransformer": (
        {"x": ids(16, 10), "mask": keys(10)},
        LM | {"max_seq_len": 16, "dim_head": 8, "local_attn_window_size": 4, "causal": True, "use_xpos": True}),
    "axial_attention.AxialAttention": (
        {"x": floats(8, 4, 4)}, {"dim": 8, "dim_index": 1, "heads": 2, "num_dimensions": 2}),
    "mega_pytorch.Mega": (
        WORDS, {"num_tokens": 16, "dim": 8, "depth": 2, "ema_heads": 4, "attn_dim_qk": 4, "attn_dim_value": 8,
                "laplacian_attn_fn": True}),
    "MEGABYTE_pytorch.MEGABYTE": (
        {"ids": ids(15, 12)}, {"num_tokens": 16, "dim": (16, 8), "depth": (1, 1), "max_seq_len": (4, 3), "dim_head": 4,
                               "heads": 2, "flash_attn": False}),
    "minGRU_pytorch.minLM.minLM": (WORDS, {"num_tokens": 16, "dim": 8, "depth": 2}),
    "conformer.Conformer": ({"x": floats(6, 8)}, TINY | {"dim": 8, "dim_head": 4, "conv_kernel_size": 3}),
    "g_mlp_pytorch.gMLP": (WORDS, {"num_tokens": 16, "dim": 8, "depth": 2, "seq_len": 6, "causal": True}),
    "g_mlp_pytorch.gMLPVision": (
        {"x": floats(3, 16, 16)}, {"image_size": 16, "patch_size": 4, "num_classes": 5, "dim": 8, "depth": 2}),
    "mlp_mixer_pytorch.MLPMixer": (
        {"input": floats(3, 16, 16)},
        {"image_size": 16, "channels": 3, "patch_size": 4, "dim": 8, "depth": 2, "num_classes": 5}),
    "lambda_networks.LambdaLayer": ({"x": floats(8, 6, 6)}, {"dim": 8, "dim_out": 8, "r": 3, "dim_k": 4, "heads": 2}),
    "halonet_pytorch.HaloAttention": (
        {"x": floats(8, 4, 4)}, {"dim": 8, "block_size": 2, "halo_size": 1, "dim_head": 4, "heads": 2}),
    "bottleneck_transformer_pytorch.BottleStack": (
        {"x": floats(8, 8, 8)}, {"dim": 8, "fmap_size": 8, "dim_out": 8, "proj_factor": 2, "downsample": True,
                                 "heads": 2, "dim_head": 4, "rel_pos_emb": True, "num_layers": 1}),
    "siren_pytorch.SirenNet": ({"x": floats(2)}, {"dim_in": 2, "dim_hidden": 8, "dim_out": 3, "num_layers": 3}),
    "glom_pytorch.Glom": (
        {"img": floats(3, 8, 8), "iters": 3}, {"dim": 8, "levels": 3, "image_size": 8, "patch_size": 4}),
    "egnn_pytorch.EGNN": (
        {"feats": floats(5, 8), "coors": floats(5, 3), "edges": floats(5, 5, 2), "mask": keys(5)},
        {"dim": 8, "edge_dim": 2, "norm_coors": True}),
    "egnn_pytorch.EGNN_Network": (
        {"feats": ids(7, 5), "coors": floats(5, 3)},
        {"num_tokens": 7, "num_positions": 5, "dim": 8, "depth": 2, "num_nearest_neighbors": 3, "num_global_tokens": 2,
         "global_linear_attn_every": 1, "global_linear_attn_heads": 2, "global_linear_attn_dim_head": 4}),
    "tab_transformer_pytorch.TabTransformer": (
        {"x_categ": ids(3, 2), "x_cont": floats(5)}, TABLE | {"mlp_act": New("torch.nn.ReLU")}),
    "tab_transformer_pytorch.FTTransformer": ({"x_categ": ids(3, 2), "x_numer": floats(5)}, TABLE),
    "mixture_of_experts.MoE": ({"inputs": floats(6, 8)}, {"dim": 8, "num_experts": 4, "hidden_dim": 8}),
    "mixture_of_experts.HeirarchicalMoE": (
        {"inputs": floats(6, 8)}, {"dim": 8, "num_experts": (2, 2), "hidden_dim": 8}),
    "st_moe_pytorch.MoE": ({"x": floats(6, 8)}, {"dim": 8, "num_experts": 4, "gating_top_n": 2}),
    "soft_moe_pytorch.SoftMoE": (
        {"x": floats(6, 8), "mask": keys(6)}, {"dim": 8, "seq_len": 6, "num_experts": 3, "geglu": True}),
    "demucs.demucs.Demucs": (
        {"mix": floats(1, 256)}, HALF | {"lstm_layers": 1, "resample": False, "norm_starts": 1, "norm_groups": 2}),
    "demucs.htdemucs.HTDemucs": (
        {"mix": floats(1, 512)}, HALF | {"samplerate": 100, "segment": 5.12, "nfft": 64, "t_layers": 1, "t_heads": 2,
                                         "bottom_channels": 0, "dconv_mode": 0}),
    "mambapy.mamba.Mamba": ({"x": floats(6, 8)}, {"config": New("mambapy.mamba.MambaConfig", **MAMBA)}),
    "mambapy.vim.VMamba": (
        {"x": floats(6, 8)}, {"config": New("mambapy.vim.MambaConfig", bidirectional=True, **MAMBA)}),
    "mambapy.jamba.Jamba": ({"x": floats(6, 8)}, {"config": New(
        "mambapy.jamba.JambaLMConfig", d_model=8, n_layers=2, mlp_size=8, num_attention_heads=2, d_state=4, pscan=False,
        num_key_value_heads=2, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1,
        num_experts=4, num_experts_per_tok=2)}),
    "pytorch_tcn.TCN": ({"x": floats(4, 12)}, {"num_inputs": 4, "num_channels": [6, 6], "kernel_size": 3,
                                               "use_norm": "weight_norm", "use_skip_connections": True}),
    "rtdl_revisiting_models.MLP": ({"x": floats(6)}, {"d_in": 6, "d_out": 2, "n_blocks": 2, "d_block": 8,
                                                      "dropout": 0.0}),
    "rtdl_revisiting_models.ResNet": (
        {"x": floats(6)}, {"d_in": 6, "d_out": 2, "n_blocks": 2, "d_block": 8, "d_hidden_multiplier": 2.0,
                           "dropout1": 0.0, "dropout2": 0.0}),
    "rtdl_revisiting_models.FTTransformer": (
        {"x_cont": floats(6), "x_cat": ids(3, 2)},
        {"n_cont_features": 6, "cat_cardinalities": [3, 4], "d_out": 2, "n_blocks": 1, "d_block": 8,
         "attention_n_heads": 2, "attention_dropout": 0.0, "ffn_d_hidden": 16, "ffn_d_hidden_multiplier": None,
         "ffn_dropout": 0.0, "residual_dropout": 0.0}),
    "tabm.TabM": (
        {"x_num": floats(6), "x_cat": ids(3, 2)},
        {"n_num_features": 6, "cat_cardinalities": [3, 4], "d_out": 2, "k": 4, "n_blocks": 2, "d_block": 8,
         "dropout": 0.0, "arch_type": "tabm", "start_scaling_init": "random-signs"}),
    "pytorch_tabnet.tab_network.TabNet": (
        {"x": floats(6)}, {"input_dim": 6, "output_dim": 3, "n_d": 4, "n_a": 4, "n_steps": 2,
                           "group_attention_matrix": New("torch.eye", n=6)}),
    "efficientnet_pytorch.EfficientNet.from_name": (
        {"inputs": floats(3, 32, 32)}, {"model_name": "efficientnet-b0", "num_classes": 5}),
}

D = {"d_model": 8, "nhead": 2, "dim_feedforward": 16, "batch_first": True}
SEQUENCE = {"input_size": 4, "hidden_size": 5, "num_layers": 2, "batch_first": True}
TORCH = {
    "Transformer": (
        {"src": floats(5, 8), "tgt": floats(4, 8), "src_key_padding_mask": hidden(5), "tgt_mask": causal(4),
         "memory_key_padding_mask": hidden(5)},
        D | {"num_encoder_layers": 1, "num_decoder_layers": 1}),
    "TransformerEncoder": (
        {"src": floats(5, 8), "src_key_padding_mask": hidden(5)},
        {"encoder_layer": New("torch.nn.TransformerEncoderLayer", **D), "num_layers": 2}),
    "TransformerDecoder": (
        {"tgt": floats(5, 8), "memory": floats(6, 8)},
        {"decoder_layer": New("torch.nn.TransformerDecoderLayer", **D), "num_layers": 2}),
    "RNN": ({"input": floats(6, 4)}, SEQUENCE | {"bidirectional": True}),
    "GRU": ({"input": floats(6, 4)}, SEQUENCE | {"bidirectional": True}),
    "LSTM": ({"input": floats(6, 4)}, SEQUENCE | {"bidirectional": True}),
    "LSTM (projected)": ({"input": floats(6, 4)}, SEQUENCE | {"proj_size": 3}),
}
# fmt: on

BASES = {
    "torch.nn": TORCH,
    "diffusers": DIFFUSERS,
    "x_transformers": X_TRANSFORMERS,
    "vit_pytorch": VIT_PYTORCH,
    "monai.networks.nets": MONAI,
    "pytorchcv.models": PYTORCHCV,
    "": SINGLE,
}


def cases() -> dict[str, Case]:
    """All, by the names of their rows: package/class."""
    found = {}
    for base, table in BASES.items():
        for name, (inputs, options) in table.items():
            top, rest = (base.split(".")[0], name) if base else name.split(".", 1)
            path = f"{base}.{name}".strip(".").split(" (")[0]
            found[f"{top}/{rest}"] = Case(top, New(path, **options), inputs)
    return found


CASES = cases()
