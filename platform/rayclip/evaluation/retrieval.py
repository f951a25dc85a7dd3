"""Retrieval between pictures and captions: recall at k, both ways, in tiles.

Shapes: N pictures, M captions, D embedding, P most different captions of one picture; n and m: those of a tile.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import torch
from torch import Tensor

from rayclip.distributed import all_gather_rows, row_offset
from rayclip.errors import UserError


def caption_ids(captions: Sequence[str]) -> Tensor:
    """A 64-bit hash of each caption's text, int64 [M]: equal texts have equal ids, on any worker."""
    digests = (blake2b(caption.encode(), digest_size=8).digest() for caption in captions)
    return torch.tensor([int.from_bytes(digest, "little", signed=True) for digest in digests], dtype=torch.int64)


def recall_at_k(
    image_features_ND: Tensor,
    text_features_MD: Tensor,
    image_of_text_M: Tensor,
    text_ids_M: Tensor | None = None,
    ks: Sequence[int] = (1, 5, 10),
    chunk_size: int = 1024,
) -> dict[str, float]:
    """`image_to_text.recall_at_{k}` and `text_to_image.recall_at_{k}`, fractions of 1, and the numbers of both.

    `image_of_text_M` holds the index of each caption's picture; a picture may have several captions. A caption whose
    id (`caption_ids`) equals that of a picture's own caption is as right an answer as that one; without ids every
    caption is its own. A query is answered at k if fewer than k wrong candidates score at least what its best right
    one scores: ties count against the model, so one that gives everything the same score gets 0.
    The scores are computed in tiles of chunk_size x chunk_size, twice; memory grows with N + M.

    Raises UserError where there is nothing to rank, a caption's picture does not exist, or a picture has no caption.
    """
    _check_ks(ks)
    rank_N, rank_M = retrieval_ranks(image_features_ND, text_features_MD, image_of_text_M, text_ids_M, chunk_size)
    recall = {f"image_to_text.recall_at_{k}": float((rank_N < k).double().mean()) for k in ks}
    recall |= {f"text_to_image.recall_at_{k}": float((rank_M < k).double().mean()) for k in ks}
    return {**recall, "num_images": len(rank_N), "num_texts": len(rank_M)}


def retrieval_ranks(
    image_features_ND: Tensor,
    text_features_MD: Tensor,
    image_of_text_M: Tensor,
    text_ids_M: Tensor | None = None,
    chunk_size: int = 1024,
) -> tuple[Tensor, Tensor]:
    """Return how many wrong candidates come before the best right one, for each image [N] and each caption [M].

    Arguments and errors are those of `recall_at_k`.
    """
    ids_M = torch.arange(len(text_features_MD)) if text_ids_M is None else text_ids_M
    _check(len(image_features_ND), len(text_features_MD), image_of_text_M, ids_M)
    device = image_features_ND.device
    ids_M = torch.unique(ids_M.to(device), return_inverse=True)[1]
    captions_NP = _captions_of_images(image_of_text_M.to(device), ids_M, len(image_features_ND))
    return _num_wrong_before(_Tiles(image_features_ND, text_features_MD.to(device), captions_NP, ids_M, chunk_size))


def recall_on_all_workers(
    image_features_ND: Tensor,
    text_features_MD: Tensor,
    image_of_text_M: Tensor,
    text_ids_M: Tensor,
) -> dict[str, float]:
    """`recall_at_k` over the pictures and captions of all workers, the same on each.

    A worker passes its own rows, `image_of_text_M` counting from its own first picture; a picture and its captions
    are on one worker. The ids are those of `caption_ids`, so that equal captions meet across workers.
    """
    return recall_at_k(
        all_gather_rows(image_features_ND),
        all_gather_rows(text_features_MD),
        all_gather_rows(image_of_text_M + row_offset(image_features_ND)),
        all_gather_rows(text_ids_M),
    )


@dataclass(frozen=True)
class _Tiles:
    """The score matrix, a tile at a time: (rows, columns, scores [n, m], which of them are right answers [n, m])."""

    image_features_ND: Tensor
    text_features_MD: Tensor
    captions_NP: Tensor
    ids_M: Tensor
    size: int

    def __iter__(self) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
        for rows in _slices(len(self.image_features_ND), self.size):
            for columns in _slices(len(self.text_features_MD), self.size):
                scores_nm = self.image_features_ND[rows] @ self.text_features_MD[columns].T
                right_nm = torch.zeros_like(scores_nm, dtype=torch.bool)
                for captions_n in self.captions_NP[rows].T:
                    right_nm |= captions_n[:, None] == self.ids_M[columns]
                yield rows, columns, scores_nm, right_nm


def _slices(total: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, total, size)]


def _num_wrong_before(tiles: _Tiles) -> tuple[Tensor, Tensor]:
    """For each picture [N] and each caption [M], how many wrong candidates score at least what its best right one does.

    Both passes compute a tile by the same product, so a right answer never differs from itself by a rounding.
    """
    best_N = tiles.image_features_ND.new_full((len(tiles.image_features_ND),), -torch.inf)
    best_M = tiles.text_features_MD.new_full((len(tiles.text_features_MD),), -torch.inf)
    for rows, columns, scores_nm, right_nm in tiles:
        right_scores_nm = scores_nm.masked_fill(~right_nm, -torch.inf)
        best_N[rows] = torch.maximum(best_N[rows], right_scores_nm.amax(dim=1))
        best_M[columns] = torch.maximum(best_M[columns], right_scores_nm.amax(dim=0))
    before_N = torch.zeros_like(best_N, dtype=torch.int64)
    before_M = torch.zeros_like(best_M, dtype=torch.int64)
    for rows, columns, scores_nm, right_nm in tiles:
        # "not <" and not ">=": a comparison with NaN is false, and would make a broken model perfect.
        before_N[rows] += (~(scores_nm < best_N[rows, None]) & ~right_nm).sum(dim=1)
        before_M[columns] += (~(scores_nm < best_M[columns]) & ~right_nm).sum(dim=0)
    return before_N, before_M


def _captions_of_images(image_of_text_M: Tensor, ids_M: Tensor, num_images: int) -> Tensor:
    """The different captions of each picture, int64 [N, P], filled up with -1, which is no caption's id."""
    pairs = torch.unique(torch.stack([image_of_text_M.long(), ids_M], dim=1), dim=0)
    counts_N = torch.bincount(pairs[:, 0], minlength=num_images)
    # The pairs are sorted by picture: a pair's column is its distance from its picture's first.
    column = torch.arange(len(pairs), device=pairs.device) - (counts_N.cumsum(0) - counts_N)[pairs[:, 0]]
    captions_NP = pairs.new_full((num_images, int(counts_N.max())), -1)
    captions_NP[pairs[:, 0], column] = pairs[:, 1]
    return captions_NP


def _check_ks(ks: Sequence[int]) -> None:
    if not ks or min(ks) < 1:
        raise UserError(f"recall needs k of at least 1, got {list(ks)}")


def _check(num_images: int, num_texts: int, image_of_text_M: Tensor, ids_M: Tensor) -> None:
    if not num_images or not num_texts:
        raise UserError(f"retrieval needs pictures and captions, got {num_images} pictures and {num_texts} captions")
    if not len(image_of_text_M) == len(ids_M) == num_texts:
        raise ValueError(f"{num_texts} captions, {len(image_of_text_M)} picture indices, {len(ids_M)} caption ids")
    if int(image_of_text_M.min()) < 0 or int(image_of_text_M.max()) >= num_images:
        wrong = int(((image_of_text_M < 0) | (image_of_text_M >= num_images)).nonzero()[0])
        raise UserError(
            f"caption {wrong} belongs to picture {int(image_of_text_M[wrong])}, "
            f"but there are {num_images} pictures, 0 to {num_images - 1}"
        )
    without = (torch.bincount(image_of_text_M.long(), minlength=num_images) == 0).nonzero()
    if len(without):
        raise UserError(
            f"{len(without)} of {num_images} pictures have no caption, the first is picture {int(without[0])}"
        )
