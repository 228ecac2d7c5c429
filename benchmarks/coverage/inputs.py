"""Inputs for any model, from the signature of its forward and its configuration."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from fixes import INPUTS
from shrink import IMAGE, WORDS
from torch import Tensor, nn

BATCH, TOKENS = 3, 8
MELS = "num_mel_bins", "feature_size", "input_feat_per_channel", "n_mels", "input_dim", "feature_projection_input_dim"
# Inputs that become tokens: how their names begin, the names of the token's id, and the method that makes features.
FEATURES = [
    ("pixel_values", ("image_token_id", "image_token_index", "img_token_id", "media_token_id"), "get_image_features"),
    ("input_features", ("audio_token_id", "audio_token_index", "speech_token_id"), "get_audio_features"),
    ("input_values", ("audio_token_id", "audio_token_index", "speech_token_id"), "get_audio_features"),
]


@dataclasses.dataclass
class Inputs:
    """What a model is called with.

    Attributes:
        tensors: by name. The first dimension holds the examples, with as many rows for each.
        constants: further arguments, the same for every call.
    """

    tensors: dict[str, Tensor]
    constants: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __repr__(self) -> str:
        return ", ".join(f"{name} {'x'.join(map(str, value.shape))}" for name, value in self.tensors.items())

    def rows(self, name: str) -> int:
        """How many rows of this input are one example's."""
        return len(self.tensors[name]) // BATCH

    def all(self) -> dict[str, Any]:
        """The arguments of the whole batch."""
        return self.some(list(range(BATCH)))

    def some(self, examples: list[int]) -> dict[str, Any]:
        """The arguments of a batch of some examples."""
        whole = [name for name in self.tensors if self.rows(name) == 1]  # those that have a row for each example first
        found = {name: self.tensors[name] for name in dict.fromkeys([*whole, *self.tensors])}
        if len(examples) < BATCH:
            found = {name: value.unflatten(0, (BATCH, -1))[examples].flatten(0, 1) for name, value in found.items()}
        return found | self.constants

    def one(self, index: int) -> dict[str, Any]:
        """The arguments of a batch of one."""
        pieces = {
            name: value[index * self.rows(name) : (index + 1) * self.rows(name)] for name, value in self.tensors.items()
        }
        return pieces | self.constants


def padded(inputs: Inputs) -> Inputs | None:
    """The same inputs with two tokens fewer in the middle example; None where there is no text."""
    ids, mask = inputs.tensors.get("input_ids"), inputs.tensors.get("attention_mask")
    if ids is None or mask is None or mask.shape != ids.shape or ids.dim() != 2:
        return None
    shorter = mask.clone()
    shorter[BATCH // 2, -2:] = 0
    return Inputs(inputs.tensors | {"attention_mask": shorter}, inputs.constants)


def find(config: Any, *names: str) -> Any:
    """The first attribute of these names that is set, in a configuration or those within it."""
    for name in names:
        value = vars(config).get(name)
        if value is not None:
            return value
    for value in vars(config).values():
        if hasattr(value, "to_dict") and (found := find(value, *names)) is not None:
            return found
    return None


def part(config: Any, *words: str) -> Any:
    """The configuration within this one whose name holds a word; or this one."""
    for name, value in vars(config).items():
        if hasattr(value, "to_dict") and any(word in name for word in words):
            return value
    return config


class Maker:
    """Makes inputs for one model.

    Args:
        model: the model.
        modalities: which kinds of input to hand over, besides those the model cannot do without.
        layout: whether features are "BFT" or "BTF".
        length: how many tokens of text.
    """

    def __init__(self, model: nn.Module, modalities: tuple[str, ...], layout: str, length: int) -> None:
        self.model, self.config = model, model.config
        self.modalities, self.layout, self.length = modalities, layout, length
        self.random = torch.Generator().manual_seed(1)
        self.names = inspect.signature(model.forward).parameters
        self.required = [
            name
            for name, p in self.names.items()
            if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        ]
        main = getattr(model, "main_input_name", "input_ids")
        self.main = [main] if isinstance(main, str) else list(main)

    def floats(self, *shape: int) -> Tensor:
        return torch.randn(BATCH, *shape, generator=self.random, dtype=torch.float64)

    def words(self, *shape: int) -> Tensor:
        known = find(part(self.config, "text", "decoder"), "vocab_size")
        highest = min(WORDS[1], max(known, 2 * WORDS[0])) if isinstance(known, int) else WORDS[1]
        return torch.randint(WORDS[0], highest, (BATCH, *shape), generator=self.random)

    def wants(self, name: str, kind: str) -> bool:
        """Whether an input of a kind goes in: it is asked for, or the model can take it and we try that kind."""
        return name in self.required or (name in self.names and (name in self.main or kind in self.modalities))

    def make(self) -> Inputs:
        """All inputs."""
        made: dict[str, Tensor] = {}
        for name, builder, kind in BUILDERS:
            if self.wants(name, kind) and name not in made:
                made.update({name: value for name, value in builder(self).items() if name in self.names})
        constants: dict[str, Any] = {}
        if "use_cache" in self.names or ("input_ids" in self.names and hasattr(self.config, "use_cache")):
            constants["use_cache"] = False
        for name, fix in (INPUTS.get(self.config.model_type) or {}).items():
            value = fix(self) if callable(fix) else fix
            if value is None:
                made.pop(name, None)
            elif name.startswith(("pixel", "image")) and not any(n.startswith("pixel") for n in made):
                continue  # an attempt without images
            elif isinstance(value, Tensor):
                made[name] = value
            else:
                constants[name] = value
        self.place(made)
        return Inputs({name: made[name] for name in made if not name.startswith("_")}, constants)

    def every(self, value: Any) -> Tensor:
        """The same for every example."""
        return torch.tensor(value)[None].repeat(BATCH, *[1] * torch.tensor(value).dim())

    # One kind of input each

    def text(self) -> dict[str, Tensor]:
        made = {"input_ids": self.words(self.length)}
        if "attention_mask" in self.names:
            made["attention_mask"] = torch.ones(BATCH, self.length, dtype=torch.long)
        return made

    def decoder(self) -> dict[str, Tensor]:
        if not getattr(self.config, "is_encoder_decoder", False):
            return {}
        return {"decoder_input_ids": self.words(5)}

    def image(self) -> dict[str, Tensor]:
        vision = part(self.config, "vision", "image")
        channels = find(vision, "num_channels", "in_channels", "in_chans")
        channels = channels if isinstance(channels, int) else 3
        grid = next((name for name in ("image_grid_thw", "grid_thw", "image_grid_hw") if name in self.names), None)
        if grid is not None:
            patch = find(vision, "patch_size") or 14
            depth = find(vision, "temporal_patch_size", "patch_temporal") or 1
            pixels = self.floats(16, channels * depth * patch * patch).flatten(0, 1)
            name = "hidden_states" if "hidden_states" in self.required else "pixel_values"
            return {name: pixels, grid: torch.tensor([[1, 4, 4]]).repeat(BATCH, 1)}
        size = find(vision, "image_size", "img_size", "input_size") or IMAGE
        if isinstance(size, dict):
            size = (size["height"], size["width"])
        size = tuple(size)[-2:] if isinstance(size, (list, tuple)) else (size, size)
        frames = vars(self.config).get("num_frames") or vars(vision).get("num_frames")
        shape = (channels, *size) if not frames else (frames, channels, *size)
        made = {"pixel_values": self.floats(*shape)}
        if self.layout == "BFT":  # the second attempt goes without
            made["image_sizes"] = self.every(list(size))
        if "pixel_mask" in self.required:
            made["pixel_mask"] = torch.ones(BATCH, *size, dtype=torch.long)
        return made

    def clip(self) -> dict[str, Tensor]:
        """A few frames, for the models of videos."""
        size = find(self.config, "image_size", "crop_size") or IMAGE
        size = tuple(size)[-2:] if isinstance(size, (list, tuple)) else (size, size)
        frames = find(self.config, "num_frames", "frames_per_clip") or 2
        name = "pixel_values" if "pixel_values" in self.main else "pixel_values_videos"
        return {name: self.floats(frames, 3, *size)}

    def features(self) -> dict[str, Tensor]:
        audio = part(self.config, "audio", "speech", "encoder")
        mel = find(audio, *MELS) or find(self.config, *MELS) or 80
        positions = find(audio, "max_source_positions")
        frames = 2 * positions if positions else 64
        shape = (mel, frames) if self.layout == "BFT" else (frames, mel)
        made = {"input_features": self.floats(*shape)}
        if "input_features_mask" in self.names:
            made["input_features_mask"] = torch.ones(BATCH, frames, dtype=torch.long)
        return made

    def samples(self) -> dict[str, Tensor]:
        bins = find(self.config, "num_mel_bins")
        if bins is not None and find(self.config, "max_length") is not None:
            return {"input_values": self.floats(find(self.config, "max_length"), bins)}
        return {"input_values": self.floats(1, 2400) if self.layout == "BFT" else self.floats(2400)}

    def series(self) -> dict[str, Tensor]:
        length = find(self.config, "context_length", "prediction_length") or 32
        channels = find(self.config, "num_input_channels") or 1
        return {"past_values": self.floats(length, channels) if self.layout == "BFT" else self.floats(length)}

    def place(self, made: dict[str, Tensor]) -> None:
        """Put as many image or audio tokens into the text as there are features of images or audio."""
        if "input_ids" not in made:
            return
        kinds = [
            (names, method)
            for start, names, method in FEATURES
            if any(name.startswith(start) for name in made) and isinstance(find(self.config, *names), int)
        ]
        ids, begin = made["input_ids"], find(self.config, "vision_start_token_id")
        for names, method in kinds:
            before = [begin] if begin and method == "get_image_features" else []
            piece = torch.tensor([*before, *[find(self.config, *names)] * self.count(method, made)])
            ids = torch.cat([ids[:, :2], piece.expand(BATCH, -1), ids[:, 2:]], 1)
        made["input_ids"] = ids
        if "attention_mask" in made:
            made["attention_mask"] = torch.ones(ids.shape[:2], dtype=torch.long)
        if "mm_token_type_ids" in self.names and kinds:
            made["mm_token_type_ids"] = torch.zeros_like(ids)
            for number, (names, _) in enumerate(kinds):
                made["mm_token_type_ids"][ids == find(self.config, *names)] = 2 * number + 1
        if "token_type_ids" in self.required:
            made["token_type_ids"] = torch.zeros_like(ids)

    def count(self, method: str, made: dict[str, Tensor]) -> int:
        """How many tokens the features of one example take, by asking the model for them."""
        found = [getattr(module, method) for module in self.model.modules() if hasattr(module, method)]
        told = [inspect.signature(function).parameters for function in found]
        function, names = next(
            ((f, names) for f, names in zip(found, told, strict=True) if any(n in names for n in made)), (None, {})
        )
        if function is None:
            return 4
        needed = [name for name, p in names.items() if p.default is p.empty]
        taken = {
            name: value for name, value in made.items() if name in names and (name != "input_ids" or name in needed)
        }
        one = {name: value[: len(value) // BATCH] for name, value in taken.items()}
        with torch.no_grad():
            features = function(**one)
        features = getattr(features, "pooler_output", features)
        if isinstance(features, (list, tuple)):
            features = (
                torch.cat([f.flatten(0, -2) for f in features]) if isinstance(features[0], Tensor) else features[0]
            )
        return features.numel() // features.shape[-1]


BUILDERS: list[tuple[str, Callable[[Maker], dict[str, Tensor]], str]] = [
    ("input_ids", Maker.text, "text"),
    ("decoder_input_ids", Maker.decoder, "text"),
    ("pixel_values", Maker.image, "image"),
    ("grid_thw", Maker.image, "image"),
    ("pixel_values_videos", Maker.clip, "video"),
    ("input_features", Maker.features, "audio"),
    ("input_values", Maker.samples, "audio"),
    ("past_values", Maker.series, "series"),
]

MODALITIES = ("text", "image", "audio"), ("text", "image"), ("text", "audio"), ("text",)
CHOICES = [(kinds, layout, TOKENS) for kinds in MODALITIES for layout in ("BFT", "BTF")]


def attempts(model: nn.Module) -> Iterator[Inputs | Exception]:
    """Inputs to try, the richest first; or what kept some from being made."""
    seen: set[str] = set()
    for choice in CHOICES:
        try:
            inputs = Maker(model, *choice).make()
        except Exception as error:
            yield error
            continue
        if repr(inputs) not in seen:
            seen.add(repr(inputs))
            yield inputs
