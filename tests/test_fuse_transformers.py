"""pyfused.fuse on models of Hugging Face transformers, built small from their configurations: nothing is downloaded."""

import copy

import pytest
import torch

import pyfused

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("fused_wins")
V = 100
TEXT = dict(vocab_size=V, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
SEQ2SEQ = dict(
    **{"vocab_size": V, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "pad_token_id": 0, "bos_token_id": 1},
    **{"eos_token_id": 2, "decoder_start_token_id": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2},
)


def model(name: str, config: str, **options):
    def make():
        torch.manual_seed(0)
        return getattr(transformers, name)(getattr(transformers, config)(**options)).train()

    return make


def text(seed=0, ignored=0):
    g = torch.Generator().manual_seed(seed)
    ids, labels = (torch.randint(3, V, (2, 9), generator=g) for _ in range(2))
    labels[:, :ignored] = -100
    return {"input_ids": ids, "labels": labels}


def speech():
    return {"input_features": torch.randn(2, 16, 40), "labels": text()["labels"]}


def image(size=32):
    return {"pixel_values": torch.randn(2, 3, size, size), "labels": torch.tensor([1, 2])}


HEADS = {
    "llama": (model("LlamaForCausalLM", "LlamaConfig", **TEXT, head_dim=8), text, "lm_head"),
    "gemma2": (
        model("Gemma2ForCausalLM", "Gemma2Config", **TEXT, head_dim=8, final_logit_softcapping=5.0), text, "lm_head",
    ),
    "gpt2": (model("GPT2LMHeadModel", "GPT2Config", vocab_size=V, n_embd=32, n_layer=1, n_head=2), text, "lm_head"),
    "marian": (model("MarianMTModel", "MarianConfig", **SEQ2SEQ, forced_eos_token_id=0), text, "lm_head"),
    "t5": (
        model("T5ForConditionalGeneration", "T5Config", vocab_size=V, d_model=32, d_kv=8, d_ff=64, num_layers=1,
              num_heads=4, decoder_start_token_id=0),
        text, "lm_head",
    ),
    "whisper": (
        model("WhisperForConditionalGeneration", "WhisperConfig", **SEQ2SEQ, num_mel_bins=16, max_source_positions=20),
        speech, "proj_out",
    ),
}  # fmt: skip
CONV = dict(hidden_sizes=[8, 16], depths=[1, 1], num_labels=5)
IMAGES = {
    "resnet": model("ResNetForImageClassification", "ResNetConfig", embedding_size=8, layer_type="basic", **CONV),
    "convnext": model("ConvNextForImageClassification", "ConvNextConfig", num_stages=2, **CONV),
    "mobilenet": model("MobileNetV1ForImageClassification", "MobileNetV1Config", depth_multiplier=0.25, num_labels=5),
}  # fmt: skip


def same_training(plain, swapped, example, steps=3):
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05) for m in (plain, swapped)]
    for step in range(steps):
        for m, optimizer in zip((plain, swapped), optimizers):
            torch.manual_seed(step)
            optimizer.zero_grad()
            m(**example).loss.backward()
        usual = max(p.grad.abs().max().item() for p in plain.parameters() if p.grad is not None)
        for (name, p), q in zip(plain.named_parameters(), swapped.parameters()):
            assert (p.grad is None) == (q.grad is None), name
            if p.grad is not None:
                torch.testing.assert_close(q.grad, p.grad, rtol=1e-3, atol=1e-4 * usual, msg=name)
        for optimizer in optimizers:
            optimizer.step()


@pytest.mark.parametrize("make, example, head", HEADS.values(), ids=HEADS)
def test_head_and_loss(make, example, head):
    torch.manual_seed(0)
    plain, swapped, given = make(), make(), example()
    pyfused.fuse(swapped, given, verbose=False)
    (row,) = (r for r in pyfused.fuse_report(swapped).rows if "cross_entropy" in r.pattern)
    assert (row.place, row.fused) == (head, True)
    same_training(plain, swapped, given)
    torch.manual_seed(0)
    out = swapped(**given)
    torch.manual_seed(0)
    expected = plain(**given)
    assert type(out.logits).__name__ == "Deferred"
    torch.testing.assert_close(out.logits + 0, expected.logits, rtol=1e-3, atol=1e-3)


def test_ignored_labels_and_items_in_batch():
    """num_items_in_batch: the Trainer's normalisation over accumulated batches, where the sum is divided instead."""
    make = HEADS["llama"][0]
    plain, swapped = make(), make()
    pyfused.fuse(swapped, text(), verbose=False)
    for options in (text(1, ignored=4), text(2, ignored=9), text(3) | {"num_items_in_batch": torch.tensor(40)}):
        torch.testing.assert_close(swapped(**options).loss, plain(**options).loss, equal_nan=True)


def test_generation_and_copies():
    make = HEADS["llama"][0]
    plain, swapped = make().eval(), make()
    pyfused.fuse(swapped, text(), verbose=False)
    ids = text()["input_ids"]
    options = dict(max_new_tokens=4, do_sample=False, attention_mask=torch.ones_like(ids))
    for m in (swapped.eval(), copy.deepcopy(swapped)):
        assert torch.equal(m.generate(ids, **options), plain.generate(ids, **options))


def test_a_saved_model_loads_into_an_unfused_one(tmp_path):
    swapped = HEADS["llama"][0]()
    pyfused.fuse(swapped, text(), verbose=False)
    swapped.save_pretrained(tmp_path)
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    assert swapped.state_dict().keys() == loaded.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(swapped.state_dict().values(), loaded.state_dict().values()))


def wav2vec2(norm="group"):
    torch.manual_seed(0)
    conv = dict(conv_dim=(16, 16, 16), conv_stride=(5, 2, 2), conv_kernel=(10, 3, 2), num_conv_pos_embeddings=4)
    small = TEXT | conv | dict(num_conv_pos_embedding_groups=2, mask_time_prob=0.0, feat_extract_norm=norm)
    return transformers.Wav2Vec2ForCTC(transformers.Wav2Vec2Config(**small)).train()


def sound():
    return {"input_values": torch.randn(2, 800), "labels": text()["labels"][:, :5]}


def front_end(m):
    return {r.place.rpartition("conv_layers.")[2]: r for r in pyfused.fuse_report(m).rows if "conv1d" in r.pattern}


@pytest.mark.parametrize("mode", ["train", "inference"])
def test_speech_front_ends(mode):
    """wav2vec2: Conv1d + GELU where no norm stands between; CTC heads need their log-softmax."""
    torch.manual_seed(0)
    plain, swapped, given = wav2vec2(), wav2vec2(), sound()
    pyfused.fuse(swapped, given, mode=mode, verbose=False)
    found = front_end(swapped)
    assert [found[f"{i}.conv"].fused for i in range(3)] == [False, True, True]
    assert found["1.conv"].pattern == "conv1d + gelu" and "GroupNorm follows" in found["0.conv"].reason
    if mode == "train":
        assert "log_softmax" in next(r.reason for r in pyfused.fuse_report(swapped).rows if r.place == "lm_head")
        same_training(plain, swapped, given)
    else:
        got, expected = (m.eval()(**given).logits for m in (swapped, plain))
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


def test_a_norm_between_convolution_and_gelu_is_named():
    m = wav2vec2("layer")
    pyfused.fuse(m, sound(), verbose=False)
    assert not any(r.fused for r in front_end(m).values())
    assert "transpose follows, which is not fused" in front_end(m)["0.conv"].reason


@pytest.mark.parametrize("mode", ["train", "inference"])
def test_whisper_front_end(mode):
    """Its forward looks at sizes, so it is no graph."""
    torch.manual_seed(0)
    plain, swapped, given = HEADS["whisper"][0](), HEADS["whisper"][0](), speech()
    pyfused.fuse(swapped, given, mode=mode, verbose=False)
    found = {r.place: r for r in pyfused.fuse_report(swapped).rows}
    assert all(found[f"model.encoder.conv{i}"].pattern == "conv1d + gelu" for i in (1, 2))
    assert all(row.fused for row in found.values())
    with torch.no_grad():
        got, expected = swapped.eval()(**given).logits, plain.eval()(**given).logits
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("mode", ["train", "inference"])
@pytest.mark.parametrize("make", IMAGES.values(), ids=IMAGES)
def test_images(make, mode):
    torch.manual_seed(0)
    plain, swapped, given = make(), make(), image()
    pyfused.fuse(swapped, given, mode=mode, verbose=False)
    report = pyfused.fuse_report(swapped)
    assert report.rows and not report.notes
    if mode == "train":
        same_training(plain, swapped, given)
    else:
        with torch.no_grad():
            got, expected = swapped.eval()(**given).logits, plain.eval()(**given).logits
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)
