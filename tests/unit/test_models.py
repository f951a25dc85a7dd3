import math

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from rayclip.config import ModelConfig, TextConfig, VisionConfig
from rayclip.errors import UserError
from rayclip.models.clip import CLIP
from rayclip.models.presets import PRESETS, preset, with_logit_bias
from rayclip.models.vision import IMAGE_MEAN, IMAGE_STD

START, END, VOCAB = 198, 199, 200


def small_config(quick_gelu=False):
    return ModelConfig(
        embed_dim=24,
        vision=VisionConfig(image_size=32, patch_size=8, width=48, layers=3, heads=3),
        text=TextConfig(context_length=77, vocab_size=VOCAB, width=32, layers=3, heads=4),
        quick_gelu=quick_gelu,
    )


def small_model(quick_gelu=False):
    torch.manual_seed(0)
    return CLIP(small_config(quick_gelu))


def make_captions(lengths, columns=77, vocab=VOCAB):
    num_tokens = torch.tensor(lengths, dtype=torch.int32)
    tokens = torch.zeros(len(lengths), columns, dtype=torch.int32)
    for row, length in enumerate(lengths):
        tokens[row, 0] = vocab - 2
        tokens[row, 1 : length - 1] = torch.randint(1, vocab - 2, (length - 2,))
        tokens[row, length - 1] = vocab - 1
    return tokens, num_tokens


def make_batch(lengths, size=32):
    torch.manual_seed(1)
    image = torch.randint(0, 256, (len(lengths), size, size, 3), dtype=torch.uint8)
    return image, *make_captions(lengths)


def normalised(image):
    return (image.float() / 255 - torch.tensor(IMAGE_MEAN)) / torch.tensor(IMAGE_STD)


LENGTHS = [5, 77, 2, 9, 5, 30, 9, 3, 77, 12]


def test_features_are_unit_float32_and_keep_the_order():
    model, (image, tokens, num_tokens) = small_model(), make_batch(LENGTHS)
    image_features, text_features, scale = model(image, tokens, num_tokens)
    for features in (image_features, text_features):
        assert features.shape == (len(LENGTHS), 24) and features.dtype == torch.float32
        torch.testing.assert_close(features.norm(dim=1), torch.ones(len(LENGTHS)))
    assert scale.item() == pytest.approx(1 / 0.07)
    alone = torch.cat([model.encode_text(tokens[i : i + 1], num_tokens[i : i + 1]) for i in range(len(LENGTHS))])
    torch.testing.assert_close(text_features, alone, atol=1e-6, rtol=0)


def test_what_follows_the_end_token_changes_nothing():
    model, (_, tokens, num_tokens) = small_model(), make_batch([5, 9, 2])
    expected = model.encode_text(tokens, num_tokens)
    noise = torch.randint(0, VOCAB, tokens.shape, dtype=torch.int32)
    padding = torch.arange(77) >= num_tokens[:, None]
    assert torch.equal(model.encode_text(torch.where(padding, noise, tokens), num_tokens), expected)
    assert torch.equal(model.encode_text(tokens[:, :9], num_tokens), expected)


def test_normalised_float_pictures_equal_uint8():
    model, (image, _, _) = small_model(), make_batch([2, 2])
    torch.testing.assert_close(model.encode_image(image), model.encode_image(normalised(image)), atol=1e-6, rtol=0)


def test_patches_equal_the_convolution():
    model, (image, _, _) = small_model(), make_batch([2, 2])
    pixels = normalised(image)
    expected = model.visual.conv1(pixels.permute(0, 3, 1, 2)).flatten(2).transpose(1, 2)
    actual = model.visual._patches(pixels) @ model.visual.conv1.weight.flatten(1).T
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


def test_an_empty_batch_gives_every_parameter_a_zero_gradient():
    model = small_model()
    image_features, text_features, scale = model(*make_batch([]))
    assert image_features.shape == text_features.shape == (0, 24)
    (image_features.sum() + text_features.sum() + 0 * scale).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name


def test_autocast_returns_float32_near_full_precision():
    model, batch = small_model(), make_batch(LENGTHS)
    expected = model(*batch)
    with torch.autocast("cpu", torch.bfloat16):
        actual = model(*batch)
    for full, half in zip(expected, actual, strict=True):
        assert half.dtype == torch.float32
        torch.testing.assert_close(half, full, atol=0.02, rtol=0)


def test_logit_scale_is_clamped_to_one_to_a_hundred():
    model = small_model()
    for start, clamped in ((9.0, math.log(100)), (-1.0, 0.0), (2.0, 2.0)):
        model.logit_scale.data.fill_(start)
        model.clamp_logit_scale_()
        assert model.logit_scale.item() == pytest.approx(clamped)


@pytest.mark.parametrize("lengths", [[0, 5], [5, 78]])
def test_impossible_lengths_are_refused(lengths):
    with pytest.raises(ValueError, match=r"num_tokens must lie in 1\.\.77"):
        small_model().encode_text(torch.ones(2, 80, dtype=torch.int32), torch.tensor(lengths))


def test_pictures_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"\[B, 32, 32, 3\].*\[1, 16, 32, 3\]"):
        small_model().encode_image(torch.zeros(1, 16, 32, 3, dtype=torch.uint8))


def test_configs_that_cannot_be_built_are_refused():
    with pytest.raises(ValidationError, match="patch_size 32 does not divide image_size 100"):
        VisionConfig(image_size=100)
    with pytest.raises(ValidationError, match="heads 7 does not divide width 768"):
        VisionConfig(heads=7)
    with pytest.raises(ValidationError, match="heads 5 does not divide width 512"):
        TextConfig(heads=5)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("ViT-B/32", 151_277_313),
        ("ViT-B/16", 149_620_737),
        ("ViT-L/14", 427_616_513),
        ("ViT-L/14@336", 427_944_193),
        ("ViT-L/14@336-quickgelu", 427_944_193),
    ],
)
def test_presets_have_the_published_number_of_parameters(name, count):
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in CLIP(preset(name)).parameters()) == count


def test_every_preset_builds_and_unknown_ones_name_the_nearest():
    with torch.device("meta"):
        for config in PRESETS.values():
            CLIP(config)
    assert preset("ViT-B/32-quickgelu").quick_gelu and not preset("ViT-B/32").quick_gelu
    with pytest.raises(UserError, match="no model is called 'vit-b/32': did you mean 'ViT-B/32'"):
        preset("vit-b/32")


def test_a_bias_is_there_where_the_loss_needs_one():
    plain, config = CLIP(small_config()), with_logit_bias(small_config())
    torch.manual_seed(0)
    biased = CLIP(config)
    assert set(biased.state_dict()) - set(plain.state_dict()) == {"logit_bias"}
    *_, scale, bias = biased(*make_batch([5, 9]))
    assert (scale.item(), bias.item()) == (pytest.approx(10), -10)
    own = config.model_copy(update={"init_logit_bias": -3.0, "init_logit_scale": 1.5})
    assert with_logit_bias(own) == own


def open_clip_twin(open_clip, config):
    vision, text = config.vision, config.text
    twin = open_clip.model.CLIP(
        config.embed_dim,
        open_clip.model.CLIPVisionCfg(
            layers=vision.layers,
            width=vision.width,
            head_width=vision.width // vision.heads,
            patch_size=vision.patch_size,
            image_size=vision.image_size,
        ),
        open_clip.model.CLIPTextCfg(
            context_length=text.context_length,
            vocab_size=text.vocab_size,
            width=text.width,
            heads=text.heads,
            layers=text.layers,
        ),
        quick_gelu=config.quick_gelu,
        init_logit_bias=config.init_logit_bias,
    )
    return twin.float()


@pytest.mark.peers
@pytest.mark.parametrize("quick_gelu", [False, True], ids=["gelu", "quickgelu"])
def test_features_and_gradients_equal_open_clip(open_clip, quick_gelu):
    """Packed captions against all 77 columns; every parameter's gradient, both ways of loading weights."""
    model = small_model(quick_gelu)
    twin = open_clip_twin(open_clip, small_config(quick_gelu))
    with torch.no_grad():  # so that biases and norms matter too
        for parameter in twin.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.load_state_dict(twin.state_dict(), strict=True)
    twin.load_state_dict(model.state_dict(), strict=True)

    image, tokens, num_tokens = make_batch(LENGTHS)
    ours = model(image, tokens, num_tokens)
    theirs = twin(normalised(image).permute(0, 3, 1, 2), tokens.long())
    for actual, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)

    for image_features, text_features, scale in (ours, theirs):
        logits = scale * image_features @ text_features.T
        nn.functional.cross_entropy(logits, torch.arange(len(LENGTHS))).backward()
    gradients = {name: parameter.grad for name, parameter in twin.named_parameters()}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients.pop(name), atol=1e-5, rtol=1e-3, msg=name)
    assert not gradients


@pytest.mark.peers
def test_initialisation_spreads_as_in_open_clip(open_clip):
    config = PRESETS["ViT-Micro/8@32"]
    torch.manual_seed(0)
    ours, theirs = CLIP(config).state_dict(), open_clip_twin(open_clip, config).state_dict()
    for name, weight in ours.items():
        expected = theirs[name]
        assert weight.shape == expected.shape
        if weight.numel() > 1:
            assert weight.std().item() == pytest.approx(expected.std().item(), rel=0.25, abs=1e-6), name
        torch.testing.assert_close(weight.mean(), expected.mean(), atol=0.02, rtol=0, msg=name)


@pytest.mark.peers
def test_a_bias_goes_to_open_clip_and_back(open_clip):
    config = with_logit_bias(small_config())
    model = CLIP(config)
    twin = open_clip_twin(open_clip, config)
    twin.load_state_dict(model.state_dict(), strict=True)
    with torch.no_grad():
        twin.logit_bias.fill_(-7.5)
    model.load_state_dict(twin.state_dict(), strict=True)
    assert model.logit_bias.item() == -7.5
