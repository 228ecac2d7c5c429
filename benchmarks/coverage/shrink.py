"""Make any configuration small: the same architecture, with widths, depths and vocabularies that run in a moment.

One table of attribute names serves all families. Every width becomes the same number, so that what has to agree
between the parts of a model still does; fix-ups by family are in `fixes.py`.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from transformers import PreTrainedConfig

WIDTH, HEADS, GROUPS, HEAD_DIM, INNER, LAYERS = 64, 4, 2, 16, 96, 2
VOCABULARY, WORDS, SPECIALS = 160, (10, 100), 101  # ordinary ids, and the first of the special ones
POSITIONS, IMAGE = 128, 64

# The first pattern that matches an attribute's whole name says what becomes of a number: an int to put in its
# place, None to leave it.
NUMBERS: list[tuple[str, int | None]] = [
    (r"type_vocab_size|.*(kernel|window|merge|chunk|block|stride|crop|shift|pool|grid|hop|fft|win)_size", None),
    (r"(temporal_)?patch_size|tubelet_size|patch_length|.*image_size.*", None),
    (r"num_channels|in_channels|in_chans|.*_factor", None),
    (r"(.*_)?vocab(ulary)?_size(_.*)?|n_vocab|num_buckets_vocab|vocab_size_or_config_json_file", VOCABULARY),
    (r"codebook_size|num_codevectors.*|num_hash_buckets|.*num_embeddings", 16),
    (r"codevector_dim|codebook_dim|.*num_(conv_pos_embedding|codevector)_groups", 4),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|.*max_sequence_length|max_.*positions.*", POSITIONS),
    (r"original_max_position_embeddings", 64),
    (r"sliding_window(_size)?|attention_window|attention_chunk_size|local_window_size|local_attention", 4),
    (r"num_(key_value|kv)_heads|n_head_kv|num_.*(key_value|kv)_heads|multi_query_group_num|n_kv_heads", GROUPS),
    (r".*num_attention_groups|num_query_groups", GROUPS),
    (r"(.*_)?(num_)?(attention_|attn_)?heads|n_heads?|.*num_.*heads|.*_n_heads|num_head", HEADS),
    (r"upsample_groups", WIDTH),
    (r"num_frames|frames_per_clip", 4),
    (r"rotary_dim", HEAD_DIM // 2),
    (r"qk_(nope|rope)_head_dim|index_head_dim", HEAD_DIM),
    (r"qk_head_dim", 2 * HEAD_DIM),
    (r"(.*_)?head_(dim|size)|d_kv|d_head|kv_channels|attention_head_(dim|size)|attention_key_value_channels", HEAD_DIM),
    (r".*_lora_rank|.*_rank|.*_lora_dim", 16),
    (r"(moe|expert|shared_expert)_.*(intermediate|ffn|hidden).*", WIDTH),
    (r".*(intermediate|ffn|inner|feed_?forward|_ff|mlp_dim|mlp_hidden).*(size|dim|hidden)?", INNER),
    (r"d_ff|dff|d_inner|n_inner|mlp_dim", INNER),
    (r"num_(local_)?experts|n_routed_experts|moe_num_experts|num_experts_total", 4),
    (r"n_group|topk_group|.*n_groups|num_expert_group", 1),
    (r"(num_)?(moe_)?(experts_per_tok|topk|top_k|experts_per_token)|moe_k|num_selected_experts|moe_topk", 2),
    (r"first_k_dense_replace|num_dense_layers|first_k.*", 1),
    (r".*layer_(period|interval|freq|frequency|step)|.*_every_n_layers|.*sparse_step|.*_interval", 2),
    (r".*layer_offset", 1),
    (r"(num_)?n?(hidden_)?layers?|depth|n_layers?|.*num_.*layers|.*_layers|.*_depth|num_blocks", LAYERS),
    (r"num_queries|num_query_tokens|.*num_latents|.*_n_latents", 6),
    (r"latent_query_num|num_object_queries|num_detection_tokens", 6),
    (r"ssm_state_size|state_size|mamba_d_state|.*_state_dim|.*d_state", 8),
    (r".*(hidden_size|d_model|n_embd|embed_dim|hidden_dim|projection_dim|embedding_size|embedding_dim).*", WIDTH),
    (r".*(_size|_dim|_dims|_width|_channels|_units|_features|dim|width)", WIDTH),
]
LEAST = 24  # a width below this is small enough, and may be a number of something else
NOUGHT = re.compile(r".*(dropout|drop_prob|drop_rate|layerdrop|drop_path|pdrop|jitter_noise|mask_time_prob).*")
SPECIAL = re.compile(r"(.*?)(_token)?(_id|_index|_idx|_ids)")
KINDS = re.compile(r"(.*_)?(layer_types|layers_block_type|block_types|layer_type|hybrid_override_pattern)")
INDICES = re.compile(r"(.*_)?(out_indices|extract_layers|layer_indices|layers_to_use)")


def number(name: str, value: int) -> int:
    """What a number in a configuration becomes."""
    for pattern, small in NUMBERS:
        if re.fullmatch(pattern, name):
            if small is None or value < 2:
                return value
            return small if value > small and not (small == WIDTH and value < LEAST) else value
    return value


class Shrinker:
    """Shrinks one configuration with all those within it. Special ids of the same name become the same."""

    def __init__(self, fixes: dict[str, Any]) -> None:
        self.fixes = fixes
        self.ids: dict[str, int] = {}

    def special(self, name: str, value: Any) -> Any:
        """A small id in the place of a special token's."""
        if isinstance(value, (list, tuple)):
            return [self.special(f"{name}{i}", one) for i, one in enumerate(value)]
        if not isinstance(value, int) or value < WORDS[0]:
            return value
        return self.ids.setdefault(name, SPECIALS + len(self.ids))

    def value(self, name: str, value: Any) -> Any:
        """What an attribute becomes; containers are gone through."""
        if isinstance(value, bool) or value is None or isinstance(value, str):
            return value
        if NOUGHT.fullmatch(name):
            return type(value)(type(v)(0) for v in value) if isinstance(value, (list, tuple)) else type(value)(0)
        match = SPECIAL.fullmatch(name)
        if match and not name.endswith(("out_indices",)) and isinstance(value, (int, list, tuple)):
            return self.special(match[1], value)
        if isinstance(value, int):
            return number(name, value)
        if isinstance(value, (list, tuple)) and value and all(type(v) is int for v in value):
            if len(value) > 1 and re.fullmatch(r"depths|.*num_blocks.*|.*layers|.*_blocks|.*_depths|n_blocks", name):
                return type(value)(1 for _ in value)
            if re.fullmatch(r".*heads.*", name):
                return type(value)(2 for _ in value)
            return type(value)(number(name.removesuffix("s"), v) for v in value)
        return value

    def shrink(self, config: PreTrainedConfig, path: str = "") -> PreTrainedConfig:
        """A small configuration of the same class."""
        fields = {field.name: field for field in dataclasses.fields(config)}
        changed: dict[str, Any] = {}
        own = {old: new for new, old in config.attribute_map.items() if new in fields}  # the names they are set by
        for key, value in list(vars(config).items()):
            name = own.get(key, key)
            inner = f"{path}.{name}".lstrip(".")
            if isinstance(value, PreTrainedConfig):
                changed[name] = self.shrink(value, inner)
            elif name in fields and isinstance(given(fields[name]), str) and not isinstance(value, str):
                continue  # "auto"
            elif name in fields and given(fields[name]) is not None:
                small = self.value(name, value)
                if small != value or value != given(fields[name]):  # what a parent has set is not the default
                    changed[name] = small
            elif name in fields and isinstance(value, (bool, str)):
                changed[name] = value
            elif name == "rope_parameters" and isinstance(value, dict):
                sections = in_sections(value)
                if sections != value:
                    changed[name] = sections
        heads = vars(config).get("num_attention_heads")
        if vars(config).get("num_key_value_heads") == heads and "num_key_value_heads" in changed:
            changed["num_key_value_heads"] = changed.get("num_attention_heads", heads)
        self.layers(config, fields, changed)
        if "depths" in fields and len(vars(config).get("_out_indices") or ()) > 1:
            changed["out_indices"] = list(config._out_indices)
        if "image_size" in fields and given(fields["image_size"]) is not None:
            changed["image_size"] = image_size(config.image_size, vars(config).get("patch_size"))
        for name, value in self.fixes.items():
            parent, _, last = name.rpartition(".")
            if parent == path:
                changed[last] = value
        return type(config)(**changed)

    def layers(self, config: PreTrainedConfig, fields: dict[str, Any], changed: dict[str, Any]) -> None:
        """Keep one layer of every kind, and as many layers as others are said to read from."""
        count = next((name for name in ("num_hidden_layers", "n_layer", "num_layers", "depth") if name in fields), None)
        if count is None or not isinstance(getattr(config, count), int):
            return
        least = min(LAYERS, getattr(config, count))
        kinds: dict[str, list[Any]] = {}
        for name, value in vars(config).items():
            if KINDS.fullmatch(name) and isinstance(value, (list, tuple)) and len(value) == getattr(config, count):
                kinds[name] = list(dict.fromkeys(value))
            several = isinstance(value, (list, tuple)) and len(value) > 1
            if several and INDICES.fullmatch(name) and "depths" not in fields:
                least = max(least, len(value))
                changed[name.removeprefix("_")] = list(range(1, len(value) + 1))
        least = max([least, *(len(kind) for kind in kinds.values())])
        for name, kind in kinds.items():
            if name in fields:
                changed[name] = kind + [kind[-1]] * (least - len(kind))
        changed[count] = least


def image_size(size: Any, patch: Any) -> Any:
    """A small image in the place of one: four patches wide, where they are known and large enough."""
    if isinstance(size, dict):
        return {name: image_size(value, patch) for name, value in size.items()}
    if isinstance(size, (list, tuple)):
        return type(size)(image_size(value, patch) for value in size)
    if isinstance(patch, (list, tuple)):
        patch = patch[-1]
    return 4 * patch if isinstance(patch, int) and patch >= 8 else min(size, IMAGE)


def in_sections(rope: dict[str, Any]) -> dict[str, Any]:
    """Rotary parameters whose sections, of the several axes, fill a small head."""
    small = dict(rope)
    for name, value in rope.items():
        if isinstance(value, dict):
            small[name] = in_sections(value)
        elif name == "mrope_section":
            third = int(HEAD_DIM * rope.get("partial_rotary_factor", 1)) // 2 // 3
            small[name] = [int(HEAD_DIM * rope.get("partial_rotary_factor", 1)) // 2 - 2 * third, third, third]
    return small


def given(field: dataclasses.Field[Any]) -> Any:
    """The default of a configuration's field; None where it is worked out from others."""
    if field.default is not dataclasses.MISSING:
        return field.default
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else "required"


def shrink(config: PreTrainedConfig, fixes: dict[str, Any] | None = None) -> PreTrainedConfig:
    """A small configuration of the same architecture.

    Args:
        config: any configuration, by default constructor.
        fixes: values that win over the table's, by dotted attribute name.
    """
    return Shrinker(fixes or {}).shrink(config)
