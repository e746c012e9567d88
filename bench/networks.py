"""Networks as other people write them, for pyfused.fuse, besides the ResNets of pyfused.models."""

from __future__ import annotations

from torch import nn


def vgg11(classes: int = 1000) -> nn.Module:
    """Simonyan and Zisserman 2014, configuration A, with global pooling instead of the three large linear layers."""
    layers, channels = [], 3
    for width in (64, "pool", 128, "pool", 256, 256, "pool", 512, 512, "pool", 512, 512, "pool"):
        if width == "pool":
            layers.append(nn.MaxPool2d(2))
        else:
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)]
            channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, classes))


def detector(classes: int = 80) -> nn.Module:
    """A backbone as detectors have it: convolutions with SiLU, no norm (folded away at deployment)."""
    layers, channels = [], 3
    for width, stride in ((32, 2), (64, 2), (64, 1), (128, 2), (128, 1), (256, 2), (256, 1)):
        layers += [nn.Conv2d(channels, width, 3, stride, padding=1), nn.SiLU(inplace=True)]
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, classes))


def gpt(vocabulary: int, width: int, layers: int) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = dict(n_embd=width, n_layer=layers, n_head=width // 64, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary, **sizes))


def marian(vocabulary: int, width: int, layers: int) -> nn.Module:
    """A translation model."""
    from transformers import MarianConfig, MarianMTModel

    sizes = dict(d_model=width, encoder_layers=layers, decoder_layers=layers, dropout=0, max_position_embeddings=512)
    for side in ("encoder", "decoder"):
        sizes |= {f"{side}_ffn_dim": 4 * width, f"{side}_attention_heads": width // 64}
    tokens = dict(pad_token_id=0, eos_token_id=0, forced_eos_token_id=0, decoder_start_token_id=0)
    return MarianMTModel(MarianConfig(vocab_size=vocabulary, **sizes, **tokens))


def wav2vec2(width: int, layers: int) -> nn.Module:
    """A speech model: seven convolutions of rows with GELU, a transformer, a head."""
    from transformers import Wav2Vec2Config, Wav2Vec2ForCTC

    dropouts = ("hidden_dropout", "attention_dropout", "activation_dropout", "feat_proj_dropout", "final_dropout")
    sizes = dict(hidden_size=width, num_hidden_layers=layers, intermediate_size=4 * width, layerdrop=0)
    sizes |= dict(num_attention_heads=width // 64, mask_time_prob=0.0, **dict.fromkeys(dropouts, 0.0))
    return Wav2Vec2ForCTC(Wav2Vec2Config(vocab_size=32, **sizes))
