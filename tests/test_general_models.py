"""Public architectures with tiny random weights: embeddings tied to heads, position ids, class tokens, rotary
positions, relative biases."""

from __future__ import annotations

import pytest
import torch
import transformers
from oracle import Shared, check, exact_or_refused, projection, scramble
from torch import nn

pytestmark = pytest.mark.filterwarnings("ignore:::transformers")

TEXT = {"vocab_size": 11, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 12, "max_position_embeddings": 16}  # fmt: skip
QUIET = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
DECODERS = {
    "gpt2": lambda **k: transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=11, n_positions=16, n_embd=8, n_layer=2, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
        bos_token_id=0, eos_token_id=0, **k)),
    "llama": lambda **k: transformers.LlamaForCausalLM(transformers.LlamaConfig(
        **TEXT, num_key_value_heads=1, tie_word_embeddings=True, pad_token_id=0, bos_token_id=1, eos_token_id=2, **k)),
    "opt": lambda **k: transformers.OPTForCausalLM(transformers.OPTConfig(
        vocab_size=11, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, ffn_dim=12, word_embed_proj_dim=8,
        max_position_embeddings=16, dropout=0.0, pad_token_id=0, bos_token_id=1, eos_token_id=2, **k)),
}  # fmt: skip
ENCODERS = {
    "bert": lambda **k: transformers.BertForSequenceClassification(transformers.BertConfig(**TEXT, **QUIET, **k)),
    "distilbert": lambda **k: transformers.DistilBertForSequenceClassification(transformers.DistilBertConfig(
        vocab_size=11, dim=8, n_layers=2, n_heads=2, hidden_dim=12, max_position_embeddings=16, dropout=0.0,
        attention_dropout=0.0, seq_classif_dropout=0.0, **k)),
    "roberta": lambda **k: transformers.RobertaForMaskedLM(transformers.RobertaConfig(
        **TEXT, **QUIET, pad_token_id=1, **k)),
}  # fmt: skip


def small(net: nn.Module) -> nn.Module:
    """Random weights small enough for attention not to be one-hot."""
    scramble(net)
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(0.3)
    return net


def logits(out, index):
    return projection()(out.logits, index)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("shape", [(2, 3), (4, 4)], ids=str)
@pytest.mark.parametrize("name", DECODERS)
def test_decoder(name, shape, attention):
    net = small(DECODERS[name](attn_implementation=attention))
    check(net, (), logits, kwargs={"input_ids": torch.randint(11, shape), "use_cache": Shared(False)})


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ENCODERS)
def test_encoder_with_a_padded_batch(name, attention):
    net = small(ENCODERS[name](attn_implementation=attention))
    ids = torch.randint(2, 11, (4, 4))
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]])
    check(net, (), logits, kwargs={"input_ids": ids, "attention_mask": mask})


def test_position_ids_of_one_row():
    net = small(DECODERS["gpt2"]())
    ids, places = torch.randint(11, (3, 4)), Shared(torch.arange(4)[None])
    check(net, (), logits, kwargs={"input_ids": ids, "position_ids": places, "use_cache": Shared(False)})


def test_vision_transformer():
    net = transformers.ViTForImageClassification(transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12, image_size=8, patch_size=4,
        num_channels=1, **QUIET))  # fmt: skip
    check(small(net), (torch.randn(3, 1, 8, 8),), logits)


def test_encoder_decoder_is_exact_or_refused():
    net = transformers.T5ForConditionalGeneration(transformers.T5Config(
        vocab_size=11, d_model=8, d_kv=4, d_ff=12, num_layers=2, num_heads=2, dropout_rate=0.0,
        decoder_start_token_id=0))  # fmt: skip
    ids, heard = torch.randint(11, (3, 4)), torch.randint(11, (3, 3))
    kwargs = {"input_ids": ids, "decoder_input_ids": heard, "use_cache": Shared(False)}
    exact_or_refused(small(net), (), logits, kwargs=kwargs, rtol=1e-5, atol=1e-6)  # its norms compute in float32


def test_mixture_of_experts_is_exact_or_refused():
    net = transformers.MixtralForCausalLM(transformers.MixtralConfig(
        **TEXT, num_key_value_heads=1, num_local_experts=2, num_experts_per_tok=1,
        experts_implementation="eager"))  # fmt: skip
    kwargs = {"input_ids": torch.randint(11, (3, 4)), "use_cache": Shared(False)}
    exact_or_refused(small(net), (), logits, kwargs=kwargs, rtol=1e-5, atol=1e-6)  # it routes in float32


def test_convolutional_network():
    net = transformers.ResNetForImageClassification(transformers.ResNetConfig(
        num_channels=1, embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic"))  # fmt: skip
    check(small(net).eval(), (torch.randn(3, 1, 16, 16),), logits)
