"""Weights in and out, against open_clip and transformers: the same embeddings, whoever wrote and whoever reads."""

import json
import pickle
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from rayclip.cli import convert
from rayclip.config import ConvertConfig, ModelConfig, ResNetConfig, TextConfig, VisionConfig
from rayclip.errors import UserError
from rayclip.models.architecture import fit, infer
from rayclip.models.clip import CLIP
from rayclip.models.presets import preset
from rayclip.models.vision import IMAGE_MEAN, IMAGE_STD
from rayclip.models.weights import fit_weights, read_weights, write_weights
from rayclip.training.checkpoint import load_model

VOCAB = 200
TEXT = TextConfig(context_length=16, vocab_size=VOCAB, width=32, layers=2, heads=2)
VIT = VisionConfig(image_size=32, patch_size=8, width=48, layers=3, heads=3, mlp_ratio=2.5)
FAMILIES = {
    "vit-gelu": ModelConfig(embed_dim=24, vision=VIT, text=TEXT),
    "vit-quickgelu": ModelConfig(embed_dim=24, vision=VIT, text=TEXT, quick_gelu=True),
    "resnet": ModelConfig(
        embed_dim=24, vision=ResNetConfig(image_size=64, width=8, layers=(1, 2, 1, 1)), text=TEXT, quick_gelu=True
    ),
}
FULL_SIZE = ("ViT-B/32", "ViT-B/32-quickgelu", "RN50-quickgelu")


def random_model(config, seed=0):
    """A model all of whose weights and statistics matter."""
    torch.manual_seed(seed)
    model = CLIP(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(std=0.1)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 2)
    return model.eval()


def inputs(config, count=3):
    torch.manual_seed(1)
    image = torch.randint(0, 256, (count, *2 * [config.vision.image_size], 3), dtype=torch.uint8)
    context, vocab = config.text.context_length, config.text.vocab_size
    num_tokens = torch.tensor([context, 4, 7])
    tokens = torch.randint(1, vocab - 2, (count, context))
    tokens[:, 0] = vocab - 2
    tokens[torch.arange(context) >= num_tokens[:, None]] = 0
    tokens[torch.arange(count), num_tokens - 1] = vocab - 1
    return image, tokens, num_tokens


@torch.no_grad()
def ours(model, batch):
    return model.eval()(*batch)[:2]


def pixels(image):
    return ((image.float() / 255 - torch.tensor(IMAGE_MEAN)) / torch.tensor(IMAGE_STD)).permute(0, 3, 1, 2)


@torch.no_grad()
def of_open_clip(twin, batch):
    image, tokens, _ = batch
    twin.eval()
    return twin.encode_image(pixels(image), normalize=True), twin.encode_text(tokens, normalize=True)


@torch.no_grad()
def of_transformers(twin, batch):
    image, tokens, _ = batch
    out = twin.eval()(input_ids=tokens, pixel_values=pixels(image))
    return out.image_embeds, out.text_embeds


def assert_close(left, right, atol=1e-5):
    for actual, expected in zip(left, right, strict=True):
        torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


def write(tmp_path, model, kind):
    folder = tmp_path / kind
    write_weights(folder, read_in(model), kind, "tiny")
    return folder


def read_in(model):
    from rayclip.models.weights import Weights

    return Weights(model.config, model.state_dict(), "memory")


def check_open_clip(open_clip, config, tmp_path):
    """There and back: a twin's own state dict gives its embeddings here, and our export gives ours there."""
    model, batch = random_model(config), inputs(config)
    folder = write(tmp_path, model, "open_clip")
    twin = open_clip.create_model(f"local-dir:{folder}")
    assert_close(ours(model, batch), of_open_clip(twin, batch))

    torch.save(twin.half().state_dict(), tmp_path / "twin.pt")
    read = read_weights(tmp_path / "twin.pt", like=config)
    assert read.config == config
    assert_close(ours(read.model(), batch), of_open_clip(twin.float(), batch))


@pytest.mark.peers
@pytest.mark.parametrize("family", FAMILIES)
def test_open_clip_reads_and_writes_the_same(open_clip, family, tmp_path):
    check_open_clip(open_clip, FAMILIES[family], tmp_path)


@pytest.mark.peers
@pytest.mark.parametrize("name", FULL_SIZE)
def test_open_clip_at_full_size(open_clip, name, tmp_path):
    check_open_clip(open_clip, preset(name), tmp_path)


def check_transformers(transformers, config, tmp_path):
    model, batch = random_model(config), inputs(config)
    twin = transformers.CLIPModel.from_pretrained(write(tmp_path, model, "huggingface"))
    assert_close(ours(model, batch), of_transformers(twin, batch))

    twin.save_pretrained(tmp_path / "twin")
    read = read_weights(tmp_path / "twin")
    assert (read.config, read.format) == (config, "huggingface")
    assert_close(ours(load_model(tmp_path / "twin"), batch), ours(model, batch), atol=0)


@pytest.mark.peers
@pytest.mark.parametrize("family", ["vit-gelu", "vit-quickgelu"])
def test_transformers_reads_and_writes_the_same(transformers, family, tmp_path):
    check_transformers(transformers, FAMILIES[family], tmp_path)


@pytest.mark.peers
def test_transformers_at_full_size(transformers, tmp_path):
    check_transformers(transformers, preset("ViT-B/32-quickgelu"), tmp_path)


@pytest.mark.peers
def test_presets_have_open_clips_shapes(open_clip):
    with torch.device("meta"):
        for name in ("RN50x16", "ViT-S/32", "ViT-S/16-alt", "ViT-M/32-alt", "ViT-M/16", "ViT-H/14", "ViT-g/14"):
            twin = open_clip.create_model(name.replace("/", "-"), load_weights=False, device="meta")
            shapes = {key: tensor.shape for key, tensor in twin.state_dict().items() if key != "attn_mask"}
            assert shapes == {key: tensor.shape for key, tensor in CLIP(preset(name)).state_dict().items()}, name


@pytest.mark.peers
def test_resnet_gradients_equal_open_clip(open_clip, tmp_path):
    """In training: batch norm by the batch's own statistics, and the running ones that come of it."""
    config = FAMILIES["resnet"]
    model, batch = random_model(config), inputs(config)
    twin = open_clip.create_model(f"local-dir:{write(tmp_path, model, 'open_clip')}").train()
    model.train()
    model.visual(batch[0]).square().sum().backward()
    twin.visual(pixels(batch[0])).square().sum().backward()
    for name, parameter in twin.visual.named_parameters():
        expected = parameter.grad
        actual = model.visual.get_parameter(name).grad
        torch.testing.assert_close(actual, expected, atol=1e-4 * expected.abs().max().item() + 1e-6, rtol=0, msg=name)
    theirs = dict(twin.visual.named_buffers())
    for name, buffer in model.visual.named_buffers():
        if name in theirs:
            torch.testing.assert_close(buffer, theirs[name], msg=name)


# Formats of our own, and bare ones


@pytest.mark.parametrize("kind", ["rayclip", "open_clip", "huggingface"])
@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back_is_the_same(tmp_path, family, kind):
    config = FAMILIES[family]
    model = random_model(config)
    if kind == "huggingface" and family == "resnet":
        with pytest.raises(UserError, match="CLIPModel has no ResNet: export to open_clip"):
            write(tmp_path, model, kind)
        assert not list(tmp_path.iterdir())
        return
    read = read_weights(write(tmp_path, model, kind))
    assert (read.config, read.format) == (config, kind)
    assert read.tensors.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(read.tensors[name], tensor), name
    assert [path.name for path in tmp_path.iterdir()] == [kind]


def openai_state_dict(model):
    """As OpenAI's archives hold it: half precision, and three numbers that are no weights."""
    config = model.config
    numbers = {
        "input_resolution": config.vision.image_size,
        "context_length": config.text.context_length,
        "vocab_size": config.text.vocab_size,
    }
    tensors = {name: t.half() if t.is_floating_point() else t for name, t in model.state_dict().items()}
    return tensors | {name: torch.tensor(number) for name, number in numbers.items()}


@pytest.mark.parametrize("family", ["vit-quickgelu", "resnet"])
def test_openai_state_dicts_are_quickgelu(tmp_path, family):
    model = random_model(FAMILIES[family])
    torch.save(openai_state_dict(model), tmp_path / "x.pt")
    read = read_weights(tmp_path / "x.pt", like=FAMILIES["vit-gelu"])
    assert read.config.quick_gelu and read.format == "state dict"
    expected = model.visual.conv1.weight
    torch.testing.assert_close(read.tensors["visual.conv1.weight"], expected, atol=1e-3, rtol=0)
    assert read.tensors["visual.conv1.weight"].dtype == torch.float32


def script(model, path):
    """A TorchScript archive with the model's names in it."""

    class Module(torch.nn.Module):
        def forward(self, x):
            return x

    root = Module()
    for name, tensor in openai_state_dict(model).items():
        *owners, last = name.split(".")
        module = root
        for owner in owners:
            if not hasattr(module, owner):
                module.add_module(owner, Module())
            module = getattr(module, owner)
        if tensor.is_floating_point() and "running" not in name:
            module.register_parameter(last, torch.nn.Parameter(tensor))
        else:
            module.register_buffer(last, tensor)
    torch.jit.trace(root, torch.zeros(1)).save(path)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("family", ["vit-quickgelu", "resnet"])
def test_a_torchscript_archive_is_read_without_running_it(tmp_path, family):
    model = random_model(FAMILIES[family])
    script(model, tmp_path / "x.pt")
    like = model.config.model_copy(update={"quick_gelu": False})
    read = read_weights(tmp_path / "x.pt", like=like)
    assert read.config == model.config
    for name, tensor in openai_state_dict(model).items():
        if name in read.tensors:
            assert torch.equal(read.tensors[name], tensor.float() if tensor.is_floating_point() else tensor), name


def test_an_archive_that_names_code_is_refused(tmp_path):
    class Bad:
        def __reduce__(self):
            return exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",)

    with zipfile.ZipFile(tmp_path / "script.pt", "w") as archive:
        archive.writestr("x/constants.pkl", b"")
        archive.writestr("x/data.pkl", pickle.dumps(Bad(), protocol=2))
    torch.save({"state_dict": Bad()}, tmp_path / "plain.pt")
    for name in ("script.pt", "plain.pt"):
        with pytest.raises(UserError, match=rf"^'.*{name}' does not hold the model's weights: .+$"):
            read_weights(tmp_path / name)
    assert not (tmp_path / "ran").exists()


def test_bare_files_are_told_by_their_content(tmp_path):
    config = FAMILIES["vit-gelu"]
    model = random_model(config)
    state = model.state_dict()
    wrapped = {f"module.{name}": tensor for name, tensor in state.items()}
    save_file(state, tmp_path / "a.whatever")
    torch.save(state, tmp_path / "b.safetensors")
    torch.save({"epoch": 3, "state_dict": wrapped, "optimizer": {"lr": 0.1}}, tmp_path / "c.pt")
    torch.save(state, tmp_path / "d.pt", _use_new_zipfile_serialization=False)
    save_file(load_file(write(tmp_path, model, "huggingface") / "model.safetensors"), tmp_path / "e.safetensors")
    for name in ("a.whatever", "b.safetensors", "c.pt", "d.pt", "e.safetensors"):
        read = read_weights(tmp_path / name, like=config)
        assert read.config == config
        assert all(torch.equal(read.tensors[key], tensor) for key, tensor in state.items()), name


@pytest.mark.parametrize("name", ["RN50x4", "ViT-B/16", "ViT-L/14@336", "ViT-S/32-alt", "ViT-g/14", "ViT-Micro/8@32"])
def test_shapes_tell_the_model(name):
    with torch.device("meta"):
        tensors = CLIP(preset(name)).state_dict()
    assert infer(tensors) == preset(name)
    assert infer(tensors, quick_gelu=True).quick_gelu
    if name in ("RN50x4", "ViT-B/16"):
        quick = preset(f"{name}-quickgelu")
        assert infer(tensors, like=quick) == quick


def test_the_settings_of_open_clip_and_hugging_face_are_heeded(tmp_path):
    model = random_model(FAMILIES["vit-gelu"])
    folder, path = write(tmp_path, model, "open_clip"), tmp_path / "open_clip" / "open_clip_config.json"
    settings = json.loads(path.read_text())
    for section, key, value, message in (
        ("vision_cfg", "pool_type", "avg", "vision_cfg has 'pool_type', which our towers do not have"),
        ("text_cfg", "hf_model_name", "x", "text_cfg has 'hf_model_name', which our towers do not have"),
        ("preprocess_cfg", "mean", [0.5, 0.5, 0.5], "pictures are normalised with mean"),
    ):
        changed = json.loads(json.dumps(settings))
        (changed if section == "preprocess_cfg" else changed["model_cfg"])[section][key] = value
        path.write_text(json.dumps(changed))
        with pytest.raises(UserError, match=rf"^'.*open_clip_config.json': {message}"):
            read_weights(folder)
    folder, path = write(tmp_path, model, "huggingface"), tmp_path / "huggingface" / "config.json"
    settings = json.loads(path.read_text())
    settings["text_config"]["hidden_act"] = "quick_gelu"
    path.write_text(json.dumps(settings))
    with pytest.raises(UserError, match="hidden_act is gelu for pictures and quick_gelu for text"):
        read_weights(folder)


def test_what_is_no_model_is_said_in_one_line(tmp_path):
    state = random_model(FAMILIES["vit-gelu"]).state_dict()
    short = {name: tensor for name, tensor in state.items() if name != "ln_final.bias"}
    for name, tensors, message in (
        ("other", {"weight": torch.ones(3)}, "not the weights of a CLIP: 'visual.conv1.weight' is missing"),
        ("short", short, "ln_final.bias is missing"),
        ("extra", state | {"head": torch.ones(1)}, "the model has no head"),
        ("shape", state | {"ln_final.bias": torch.ones(3)}, r"ln_final.bias is \[3\] where the model has \[32\]"),
    ):
        save_file(tensors, tmp_path / name)
        with pytest.raises(UserError, match=message) as caught:
            read_weights(tmp_path / name)
        assert str(caught.value).startswith(f"'{tmp_path / name}'") and "\n" not in str(caught.value)
    data = (tmp_path / "short").read_bytes()
    (tmp_path / "cut").write_bytes(data[: len(data) // 2])
    (tmp_path / "text").write_text("not weights at all")
    (tmp_path / "empty").write_bytes(b"")
    torch.save([1, 2], tmp_path / "list")
    for name in ("cut", "text", "empty", "list"):
        with pytest.raises(UserError, match="does not hold the model's weights") as caught:
            read_weights(tmp_path / name)
        assert "\n" not in str(caught.value) and "weights_only" not in str(caught.value)


# Starting from weights


@pytest.mark.peers
@pytest.mark.parametrize("image_size", [48, 24, 32])
def test_positions_are_interpolated_as_in_open_clip(open_clip, image_size):
    config = FAMILIES["vit-gelu"]
    state = random_model(config).state_dict()
    wanted = config.model_copy(update={"vision": VIT.model_copy(update={"image_size": image_size})})
    fitted = fit(state, config, wanted)
    CLIP(wanted).load_state_dict(fitted)

    class Twin:
        class visual:  # noqa: N801
            grid_size = image_size // 8

    expected = dict(state)
    open_clip.model.resize_pos_embed(expected, Twin)
    for name, tensor in fitted.items():
        torch.testing.assert_close(tensor, expected[name], msg=name)


def test_a_resnets_grid_is_interpolated_too():
    config = FAMILIES["resnet"]
    wanted = config.model_copy(update={"vision": config.vision.model_copy(update={"image_size": 96})})
    CLIP(wanted).load_state_dict(fit(random_model(config).state_dict(), config, wanted))


def test_a_shorter_context_cuts_and_all_else_is_refused(tmp_path):
    config = FAMILIES["vit-gelu"]
    model = random_model(config)
    folder = write(tmp_path, model, "open_clip")

    def wanted(**text):
        return config.model_copy(update={"text": TEXT.model_copy(update=text)})

    shorter = CLIP(wanted(context_length=8))
    shorter.load_state_dict(fit_weights(folder, shorter.config))
    _, tokens, num_tokens = inputs(config)
    few = [1, 2]
    assert torch.equal(
        shorter.encode_text(tokens[few, :8], num_tokens[few]), model.encode_text(tokens[few], num_tokens[few])
    )
    dropping = VIT.model_copy(update={"patch_dropout": 0.5})
    fit_weights(folder, config.model_copy(update={"vision": dropping}))
    for other, message in (
        (wanted(context_length=20), "at most 16 tokens: text.context_length 20 is longer"),
        (wanted(layers=3), "of another model: their text.layers is 2, not 3"),
        (FAMILIES["vit-quickgelu"], "their quick_gelu is False, not True"),
        (FAMILIES["resnet"], "their quick_gelu is False, not True"),
    ):
        with pytest.raises(UserError, match=rf"^'{folder}': .*{message}$"):
            fit_weights(folder, other)


@pytest.mark.peers
def test_a_logit_bias_goes_with_the_weights(open_clip, tmp_path):
    plain = FAMILIES["vit-gelu"]
    biased = plain.model_copy(update={"init_logit_bias": -10.0, "init_logit_scale": 2.3})
    model = random_model(biased)
    folder = write(tmp_path, model, "open_clip")
    twin = open_clip.create_model(f"local-dir:{folder}")
    assert torch.equal(twin.logit_bias, model.logit_bias)
    assert torch.equal(load_model(folder).logit_bias, model.logit_bias)
    assert torch.equal(load_model(write(tmp_path, model, "rayclip")).logit_bias, model.logit_bias)
    assert torch.equal(fit_weights(folder, biased)["logit_bias"], model.logit_bias)
    assert "logit_bias" not in fit_weights(folder, plain)
    begins = fit(random_model(plain).state_dict(), plain, biased)
    assert begins["logit_bias"].item() == -10
    with pytest.raises(UserError, match=r"^Hugging Face's CLIPModel has no logit bias: export to open_clip$"):
        write(tmp_path, model, "huggingface")


# The job


def test_convert_writes_what_others_and_we_read(tmp_path, capsys):
    model = random_model(FAMILIES["vit-quickgelu"])
    source, came_as = write(tmp_path, model, "rayclip"), "rayclip"
    for kind in ("open_clip", "huggingface", "rayclip"):
        output = tmp_path / "out" / kind
        summary = convert.main(ConvertConfig(input=str(source), output=str(output), format=kind))
        assert (summary["input_format"], summary["format"]) == (came_as, kind)
        assert summary["parameters"] == sum(p.numel() for p in model.parameters())
        batch = inputs(model.config)
        assert_close(ours(load_model(output), batch), ours(model, batch), atol=0)
        source, came_as = output, kind
    assert "QuickGELU" in capsys.readouterr().out
    with pytest.raises(UserError, match="exists: give another output"):
        convert.main(ConvertConfig(input=str(source), output=str(output)))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"open_clip", "huggingface", "rayclip"}


def test_convert_tells_a_preset_what_a_state_dict_leaves_open(tmp_path):
    config = preset("ViT-Nano/8@32")
    np.testing.assert_equal(config.vision.heads, 2)
    torch.save(random_model(config).state_dict(), tmp_path / "x.pt")
    summary = convert.main(
        ConvertConfig(input=str(tmp_path / "x.pt"), output=str(tmp_path / "out"), model="ViT-Nano/8@32")
    )
    assert summary["model"] == config.model_dump(mode="json")
    assert summary["model_version"].startswith("x.pt@")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "git lfs pull"),
        (b"<!doctype html>\n<html><body>Not found</body></html>", "an HTML page"),
    ],
)
def test_what_stands_in_the_place_of_weights_is_said(tmp_path, content, said):
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(UserError, match=rf"x\.pt' does not hold the model's weights: it is .*{said}"):
        read_weights(tmp_path / "x.pt")


def test_weights_that_are_not_finite_are_named(tmp_path):
    tensors = dict(random_model(FAMILIES["vit-gelu"]).state_dict())
    tensors["text_projection"][3, 4] = float("nan")
    torch.save(tensors, tmp_path / "x.pt")
    with pytest.raises(UserError, match=r"1 of .* tensors hold what is no finite number, as 'text_projection'"):
        read_weights(tmp_path / "x.pt")
