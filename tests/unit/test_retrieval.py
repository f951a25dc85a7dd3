"""Recall at k against the whole matrix in float64, and what two workers gather against one process."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from rayclip.distributed import all_gather_rows, reduce_counts, row_offset
from rayclip.errors import UserError
from rayclip.evaluation.retrieval import caption_ids, recall_at_k, recall_on_all_workers
from rayclip.evaluation.zero_shot import ZeroShotCounts

KS = (1, 5, 10)


def naive_recall(images, texts, image_of_text, captions, ks=KS):
    """By sorting whole rows: wrong candidates go before right ones of the same score."""
    scores = images.double().numpy() @ texts.double().numpy().T
    owner = image_of_text.tolist()
    own = [{captions[t] for t in range(len(owner)) if owner[t] == i} for i in range(len(images))]
    right = np.array([[captions[t] in own[i] for t in range(len(owner))] for i in range(len(images))])

    def recall(scores, right, k):
        hits = []
        for row, good in zip(scores, right, strict=True):
            order = sorted(range(len(row)), key=lambda j: (-row[j], good[j]))
            hits.append(any(good[j] for j in order[:k]))
        return float(np.mean(hits))

    result = {f"image_to_text.recall_at_{k}": recall(scores, right, k) for k in ks}
    result |= {f"text_to_image.recall_at_{k}": recall(scores.T, right.T, k) for k in ks}
    return {**result, "num_images": len(images), "num_texts": len(texts)}


def sample(seed, num_images=23, num_texts=61, num_captions=40, dim=6, tied=False):
    """Random features, one to several captions a picture, some captions alike."""
    generator = np.random.default_rng(seed)
    owner = np.concatenate([np.arange(num_images), generator.integers(0, num_images, num_texts - num_images)])
    captions = [f"caption {n}" for n in generator.integers(0, num_captions, num_texts)]
    images, texts = generator.normal(size=(num_images, dim)), generator.normal(size=(num_texts, dim))
    texts += images[owner]
    if tied:  # small whole numbers: their products are exact, so ties are the same in every precision
        images, texts = images.round(), texts.round()
    return (
        torch.tensor(images, dtype=torch.float32),
        torch.tensor(texts, dtype=torch.float32),
        torch.tensor(generator.permutation(owner)),
        captions,
    )


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("chunk_size", [1, 7, 1000])
def test_recall_is_that_of_the_whole_matrix(chunk_size, tied):
    for seed in range(3):
        images, texts, owner, captions = sample(seed, tied=tied)
        result = recall_at_k(images, texts, owner, caption_ids(captions), KS, chunk_size)
        assert result == pytest.approx(naive_recall(images, texts, owner, captions))


def test_without_ids_every_caption_is_its_own():
    images, texts, owner, _ = sample(5)
    expected = naive_recall(images, texts, owner, list(range(len(texts))))
    assert recall_at_k(images, texts, owner) == pytest.approx(expected)


def test_a_caption_equal_to_the_true_one_is_right():
    images, texts = torch.eye(2), torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    owner = torch.tensor([0, 1])
    assert recall_at_k(images, texts, owner, ks=(1,))["image_to_text.recall_at_1"] == 0
    alike = recall_at_k(images, texts, owner, caption_ids(["a", "a"]), ks=(1,))
    assert alike["image_to_text.recall_at_1"] == alike["text_to_image.recall_at_1"] == 1


@pytest.mark.parametrize("value", [0.5, torch.nan])
def test_a_model_that_answers_always_the_same_gets_nothing(value):
    features = torch.full((20, 4), value)
    result = recall_at_k(features, features, torch.arange(20))
    assert all(result[f"{way}.recall_at_{k}"] == 0 for way in ("image_to_text", "text_to_image") for k in KS)


def test_k_beyond_the_number_of_candidates_finds_everything():
    features = torch.ones(3, 4)
    assert recall_at_k(features, features, torch.arange(3), ks=(3,))["image_to_text.recall_at_3"] == 1


def test_caption_ids_are_equal_for_equal_texts_only():
    ids = caption_ids(["cat", "dog", "cat", "Cat"])
    assert ids.dtype == torch.int64
    assert ids[0] == ids[2]
    assert len(set(ids.tolist())) == 3


@pytest.mark.parametrize(
    ("num_images", "owner", "line"),
    [
        (0, [0, 0], "got 0 pictures and 2 captions"),
        (2, [], "got 2 pictures and 0 captions"),
        (2, [0, 2], "caption 1 belongs to picture 2, but there are 2 pictures, 0 to 1"),
        (2, [0, -1], "caption 1 belongs to picture -1"),
        (3, [1, 1], "2 of 3 pictures have no caption, the first is picture 0"),
    ],
)
def test_what_cannot_be_ranked_is_named(num_images, owner, line):
    with pytest.raises(UserError, match=line):
        recall_at_k(torch.ones(num_images, 4), torch.ones(len(owner), 4), torch.tensor(owner, dtype=torch.int64))


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="2 captions, 1 picture indices"):
        recall_at_k(torch.ones(1, 4), torch.ones(2, 4), torch.tensor([0]))
    with pytest.raises(UserError, match="k of at least 1"):
        recall_at_k(torch.ones(1, 4), torch.ones(1, 4), torch.tensor([0]), ks=())


# Workers

WORLD_SIZE = 2
SPLIT_IMAGES = 5


def accuracy_sample():
    generator = np.random.default_rng(9)
    images, classes = torch.tensor(generator.normal(size=(23, 6))), torch.tensor(generator.normal(size=(8, 6)))
    return images, torch.tensor(generator.integers(0, 8, 23)), classes


def share_of(rank):
    """Uneven shares of `sample(4)`, a picture's captions with it; indices count from the share's first picture."""
    images, texts, owner, captions = sample(4)
    start, stop = ((0, SPLIT_IMAGES), (SPLIT_IMAGES, len(images)))[rank]
    mine = ((owner >= start) & (owner < stop)).nonzero().flatten()
    return images[start:stop], texts[mine], owner[mine] - start, [captions[t] for t in mine]


def run_worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD_SIZE)
    try:
        images, texts, owner, captions = share_of(rank)
        features, labels, classes = accuracy_sample()
        counts = ZeroShotCounts(classes)
        counts.update(*((features[:4], labels[:4]) if rank == 0 else (features[4:], labels[4:])))
        mine = torch.full((2,), rank + 1)
        try:
            all_gather_rows(torch.ones(3, rank + 1))
            mismatch = ""
        except ValueError as error:
            mismatch = str(error)
        results = {
            "uneven": all_gather_rows(torch.arange(6.0).reshape(3, 2)[: rank + 2] + 10 * rank),
            "zero": all_gather_rows(torch.full((3 * rank, 2, 2), 7)),
            "none": all_gather_rows(torch.zeros(0, 4)),
            "offset": row_offset(torch.zeros(3 + rank, 4)),
            "sum": reduce_counts(mine),
            "mine": mine,
            "accuracy": counts.reduce().metrics(),
            "recall": recall_on_all_workers(images, texts, owner, caption_ids(captions)),
            "mismatch": mismatch,
        }
        torch.save(results, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def workers(tmp_path_factory):
    """What each of two gloo processes got."""
    folder = tmp_path_factory.mktemp("workers")
    mp.spawn(run_worker, (str(folder),), nprocs=WORLD_SIZE)
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD_SIZE)]


def test_all_workers_get_all_rows_in_rank_order(workers):
    for got in workers:
        assert got["uneven"].tolist() == [[0, 1], [2, 3], [10, 11], [12, 13], [14, 15]]
        assert torch.equal(got["zero"], torch.full((3, 2, 2), 7))
        assert got["none"].shape == (0, 4)
    assert [got["offset"] for got in workers] == [0, 3]


def test_rows_of_different_sizes_are_refused_by_all_workers(workers):
    assert all("[1, 2] elements" in got["mismatch"] for got in workers)


def test_counts_are_summed_and_the_argument_kept(workers):
    assert [got["sum"].tolist() for got in workers] == [[3, 3], [3, 3]]
    assert [got["mine"].tolist() for got in workers] == [[1, 1], [2, 2]]


def test_workers_measure_what_one_process_measures(workers):
    images, texts, owner, captions = sample(4)
    recall = naive_recall(images, texts, owner, captions)
    features, labels, classes = accuracy_sample()
    counts = ZeroShotCounts(classes)
    counts.update(features, labels)
    for got in workers:
        assert got["accuracy"] == counts.metrics()
        assert got["recall"] == pytest.approx(recall)


def test_without_a_process_group_nothing_changes():
    rows = torch.ones(3, 2)
    assert all_gather_rows(rows) is rows
    assert torch.equal(reduce_counts(rows), rows)
    assert row_offset(rows) == 0


@pytest.mark.peers
def test_recall_of_five_captions_a_picture_is_clip_benchmarks():
    peer = pytest.importorskip("clip_benchmark.metrics.zeroshot_retrieval")
    generator = torch.Generator().manual_seed(0)
    images = torch.nn.functional.normalize(torch.randn(60, 16, generator=generator), dim=1)
    owner = torch.arange(60).repeat_interleave(5)[torch.randperm(300, generator=generator)]
    texts = torch.nn.functional.normalize(images[owner] + torch.randn(300, 16, generator=generator), dim=1)
    scores, positive = texts @ images.T, torch.zeros(300, 60, dtype=torch.bool)
    positive[torch.arange(300), owner] = True
    ours = recall_at_k(images, texts, owner, chunk_size=64)
    for k in KS:
        text_to_image = (peer.recall_at_k(scores, positive, k) > 0).double().mean()
        image_to_text = (peer.recall_at_k(scores.T, positive.T, k) > 0).double().mean()
        assert ours[f"text_to_image.recall_at_{k}"] == pytest.approx(float(text_to_image), abs=1e-9)
        assert ours[f"image_to_text.recall_at_{k}"] == pytest.approx(float(image_to_text), abs=1e-9)
