"""Zero-shot: prompts, the class matrix, probabilities and accuracy, against formulas written out in float64."""

import numpy as np
import pytest
import torch

from rayclip.config import ModelConfig, TextConfig, VisionConfig
from rayclip.errors import UserError
from rayclip.evaluation.zero_shot import ZeroShotCounts, top_k_correct
from rayclip.inference.encoder import Encoder
from rayclip.inference.prompts import TEMPLATES, resolve_templates
from rayclip.inference.zero_shot import class_matrix, zero_shot_probabilities
from rayclip.models.clip import CLIP

CONTEXT, VOCABULARY, EMBED_DIM = 32, 200, 16


def tokenize(texts):
    """A character a token, between a start and an end token."""
    tokens, lengths = np.zeros((len(texts), CONTEXT), np.int32), np.zeros(len(texts), np.int32)
    for row, text in enumerate(texts):
        ids = [VOCABULARY - 2, *(ord(c) for c in text[: CONTEXT - 2]), VOCABULARY - 1]
        tokens[row, : len(ids)], lengths[row] = ids, len(ids)
    return tokens, lengths


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    config = ModelConfig(
        embed_dim=EMBED_DIM,
        vision=VisionConfig(image_size=16, patch_size=8, width=32, layers=1, heads=2),
        text=TextConfig(context_length=CONTEXT, vocab_size=VOCABULARY, width=32, layers=1, heads=2),
    )
    return Encoder(CLIP(config), tokenize, "cpu")


class FakeEncoder:
    """Features by a table; counts how often each text is asked for."""

    def __init__(self, seed=0):
        self.generator = np.random.default_rng(seed)
        self.table, self.asked = {}, []

    def encode_texts(self, texts):
        self.asked += texts
        for text in texts:
            self.table.setdefault(text, self.generator.normal(size=EMBED_DIM).astype(np.float32))
        return torch.tensor(np.stack([self.table[text] for text in texts]))


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def random_units(generator, *shape):
    return torch.tensor(unit(generator.normal(size=shape)).astype(np.float32))


# Prompts


def test_every_template_set_resolves_to_itself():
    for name, templates in TEMPLATES.items():
        assert resolve_templates(name) == templates
        assert resolve_templates(list(templates)) == templates


def test_one_template_may_stand_for_a_list_of_one():
    assert resolve_templates("a sketch of {}") == ("a sketch of {}",)


@pytest.mark.parametrize(
    ("value", "line"),
    [
        ("foto", "unknown template set 'foto': did you mean 'photo'?"),
        ("zzz", "allowed: emoji, glyphs, photo, photo_ensemble, plain"),
        (["a {}", "a picture"], "template 1 'a picture' has no {} where the class name goes"),
        ([], "the list of templates is empty"),
    ],
)
def test_bad_templates_are_named(value, line):
    with pytest.raises(UserError) as error:
        resolve_templates(value)
    assert line in str(error.value)
    assert "\n" not in str(error.value)


# Class matrix and probabilities


def test_class_matrix_is_the_normalised_mean_of_normalised_prompts():
    fake, names, templates = FakeEncoder(), ["cat", "dog", "crane", "crane"], ["{}", "a {}", "the {} {}"]
    matrix = class_matrix(fake, names, templates)
    prompts = [[n, f"a {n}", f"the {n} {n}"] for n in names]
    expected = unit(np.array([unit(np.array([fake.table[p] for p in row], np.float64)).mean(0) for row in prompts]))
    np.testing.assert_allclose(matrix, expected, atol=1e-6)


def test_class_matrix_encodes_a_text_once_and_keeps_repeated_names_apart():
    fake = FakeEncoder()
    matrix = class_matrix(fake, ["crane", "cat", "crane"], ["{}", "a {}", "{}"])
    assert sorted(fake.asked) == ["a cat", "a crane", "cat", "crane"]
    assert matrix.shape == (3, EMBED_DIM)
    assert torch.equal(matrix[0], matrix[2])


def test_braces_in_a_class_name_are_text():
    fake = FakeEncoder()
    class_matrix(fake, ["{0}", "a{}b"], ["set {x}: {}"])
    assert sorted(fake.asked) == ["set {x}: a{}b", "set {x}: {0}"]


@pytest.mark.parametrize(("names", "line"), [([], "the list of classes is empty"), (["a", " "], "class 1 of 2")])
def test_bad_class_lists_are_refused(names, line):
    with pytest.raises(UserError, match=line):
        class_matrix(FakeEncoder(), names, "plain")


def test_probabilities_are_the_softmax_of_scaled_cosines():
    generator = np.random.default_rng(1)
    images, classes = random_units(generator, 5, 8), random_units(generator, 3, 8)
    logits = 14.3 * images.double().numpy() @ classes.double().numpy().T
    expected = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose(zero_shot_probabilities(images, classes, 14.3), expected, atol=1e-6)


# Encoder


def test_encoder_gives_the_models_features_whatever_the_batch_size(encoder):
    texts = ["a", "a photo of a cat", "dog", "a rather long caption"]
    images = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)
    with torch.no_grad():
        expected_texts = encoder.model.encode_text(*map(torch.from_numpy, tokenize(texts)))
        expected_images = encoder.model.encode_image(torch.from_numpy(images))
    for batch_size in (1, 3, 100):
        torch.testing.assert_close(encoder.encode_texts(texts, batch_size), expected_texts, atol=1e-5, rtol=0)
        torch.testing.assert_close(encoder.encode_images(images, batch_size), expected_images, atol=1e-5, rtol=0)


def test_encoder_without_inputs_gives_no_rows(encoder):
    assert encoder.encode_texts([]).shape == (0, EMBED_DIM)
    assert encoder.encode_images(np.zeros((0, 16, 16, 3), np.uint8)).shape == (0, EMBED_DIM)


def test_encoder_gives_every_module_its_mode_back(encoder):
    encoder.model.train()
    encoder.model.visual.eval()
    before = [module.training for module in encoder.model.modules()]
    modes = []
    handle = encoder.model.ln_final.register_forward_hook(lambda module, *_: modes.append(module.training))
    encoder.encode_texts(["a"])
    handle.remove()
    assert modes == [False]
    assert [module.training for module in encoder.model.modules()] == before


def test_encoder_gives_the_mode_back_after_an_error(encoder):
    encoder.model.train()
    with pytest.raises(ValueError):
        encoder.encode_images(np.zeros((1, 17, 16, 3), np.uint8))
    assert encoder.model.training


def test_features_can_be_differentiated_through(encoder):
    weight = torch.ones(EMBED_DIM, requires_grad=True)
    (encoder.encode_texts(["a", "b"]) @ weight).sum().backward()
    assert weight.grad is not None


def test_encoder_refuses_pictures_of_another_kind(encoder):
    with pytest.raises(ValueError, match="uint8"):
        encoder.encode_images(np.zeros((1, 16, 16, 3), np.float32))
    with pytest.raises(ValueError, match=r"\[N, H, W, 3\]"):
        encoder.encode_images(np.zeros((1, 3, 16, 16), np.uint8))


def test_logit_scale_is_out_of_log_space(encoder):
    assert encoder.logit_scale == pytest.approx(1 / 0.07, rel=1e-5)


# Accuracy


def measured(features, labels, classes, ks=(1, 5)):
    counts = ZeroShotCounts(classes, ks)
    counts.update(features, labels)
    return counts.metrics()


def naive_top_k(scores, labels, k):
    order = np.argsort(-scores, axis=1, kind="stable")
    return (order[:, :k] == labels[:, None]).any(1).sum()


@pytest.mark.parametrize("tied", [False, True])
def test_top_k_is_that_of_a_sort(tied):
    generator = np.random.default_rng(2)
    scores, labels = generator.normal(size=(200, 7)), generator.integers(0, 7, 200)
    if tied:
        scores = scores.round()
    ks = (1, 2, 5, 7, 9)
    counts = top_k_correct(torch.tensor(scores), torch.tensor(labels), ks)
    assert counts.tolist() == [naive_top_k(scores, labels, k) for k in ks]


def test_a_model_that_answers_always_the_same_gets_chance():
    labels = torch.arange(10).repeat(3)
    result = measured(torch.ones(30, 4) / 2, labels, torch.ones(10, 4) / 2)
    assert result["top1"] == result["chance_top1"] == pytest.approx(0.1)
    assert result["top5"] == result["chance_top5"] == pytest.approx(0.5)


def test_features_that_are_not_numbers_are_wrong():
    result = measured(torch.full((6, 4), torch.nan), torch.arange(6), torch.eye(6, 4))
    assert result["top1"] == result["top5"] == 0


def test_k_beyond_the_number_of_classes_counts_everything():
    result = measured(torch.eye(2), torch.tensor([1, 1]), torch.eye(2))
    assert result == {
        "top1": 0.5,
        "top5": 1.0,
        "chance_top1": 0.5,
        "chance_top5": 1.0,
        "percentile_rank": 0.5,
        "num_classes": 2,
        "num_samples": 2,
    }


def test_shards_add_up_to_the_whole():
    generator = np.random.default_rng(3)
    images, classes = random_units(generator, 5000, 8), random_units(generator, 9, 8)
    labels = torch.tensor(generator.integers(0, 9, 5000))
    counts = ZeroShotCounts(classes)
    for start, stop in ((0, 1), (1, 4900), (4900, 4900), (4900, 5000)):
        counts.update(images[start:stop], labels[start:stop].int())
    whole = measured(images, labels, classes)
    scores = images.double().numpy() @ classes.double().numpy().T
    assert counts.metrics() == whole == counts.reduce().metrics()
    assert whole["top1"] == naive_top_k(scores, labels.numpy(), 1) / 5000
    assert whole["top5"] == naive_top_k(scores, labels.numpy(), 5) / 5000
    behind = [np.mean(np.delete(row, label) < row[label]) for row, label in zip(scores, labels, strict=True)]
    assert whole["percentile_rank"] == pytest.approx(np.mean(behind))


@pytest.mark.parametrize("label", [3, -1])
def test_a_label_that_is_no_class_is_named(label):
    line = f"label {label} of picture 1 is out of range: the class list has 3 classes, 0 to 2"
    with pytest.raises(UserError, match=line):
        measured(torch.ones(2, 4), torch.tensor([0, label]), torch.ones(3, 4))


def test_nothing_to_measure_is_said():
    with pytest.raises(UserError, match="the list of classes is empty"):
        measured(torch.ones(2, 4), torch.tensor([0, 0]), torch.ones(0, 4))
    with pytest.raises(UserError, match="no pictures"):
        measured(torch.ones(0, 4), torch.zeros(0, dtype=torch.int64), torch.ones(3, 4))
    with pytest.raises(UserError, match="k of at least 1"):
        measured(torch.ones(1, 4), torch.tensor([0]), torch.ones(3, 4), ks=(0,))
    with pytest.raises(ValueError, match="2 pictures with 1 labels"):
        measured(torch.ones(2, 4), torch.tensor([0]), torch.ones(3, 4))
