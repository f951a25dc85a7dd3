"""Images as people hold them (paths, bytes, PIL images, arrays, tensors) to the pixels that a model takes."""

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeAlias
from weakref import WeakValueDictionary

import numpy as np
from PIL import Image
from torch import Tensor

from rayclip.data.decode import MAX_ASPECT, MAX_PIXELS, BadSampleError, eval_array, open_image
from rayclip.errors import UserError
from rayclip.io.paths import storage_path

ImageInput: TypeAlias = Image.Image | str | os.PathLike[str] | bytes | np.ndarray | Tensor
"""One image: a PIL image, the path of a file (also s3://...), a file's bytes, a uint8 array [H, W] or [H, W, C], or
a uint8 tensor of torchvision's layout, [C, H, W], with 1, 3 or 4 channels."""

_CHANNELS = (1, 3, 4)  # grey, RGB, RGBA
_THREADS = min(8, os.cpu_count() or 1)


def each_image(images: ImageInput | Iterable[ImageInput]) -> Iterable[ImageInput]:
    """Return the images one by one: a single image, or each along the first of an array's or a tensor's four axes."""
    if isinstance(images, Image.Image | str | os.PathLike | bytes | bytearray):
        return [images]
    if isinstance(images, np.ndarray | Tensor):
        return list(images) if images.ndim == 4 else [images]
    if not isinstance(images, Iterable):
        raise UserError(f"images are of type {type(images).__name__}; {_ALLOWED}")
    return images


def preprocess(images: Iterable[ImageInput], size: int, batch_size: int) -> Iterator[np.ndarray]:
    """Decode and preprocess images, a batch at a time and one batch ahead, in threads.

    The preprocessing is that of evaluation and of the service (`rayclip.data.decode.eval_array`).

    Args:
        images: any number of them, also from a generator.
        size: pixels of a side that the model takes.
        batch_size: images a batch; the last may have fewer.

    Yields:
        uint8 [B, size, size, 3].

    Raises:
        UserError: an image cannot be read; it is named by its index.
    """
    with ThreadPoolExecutor(_THREADS) as threads:
        pixels = _submit(images, size, threads)
        batch = list(islice(pixels, batch_size))
        while batch:
            ahead = list(islice(pixels, batch_size))
            try:
                yield np.stack([done.result() for done in batch])
            except BaseException:
                threads.shutdown(cancel_futures=True)
                raise
            batch = ahead


def _submit(images: Iterable[ImageInput], size: int, threads: ThreadPoolExecutor) -> Iterator["Future[np.ndarray]"]:
    """Yield each image's pixels to come."""
    # A generator may draw the next image into the memory of this one: such are read before it goes on.
    all_there = isinstance(images, list | tuple)
    # Weak: pixels that have been used are let go.
    running: WeakValueDictionary[int, Future[np.ndarray]] = WeakValueDictionary()
    for index, image in enumerate(images):
        if isinstance(image, str | os.PathLike | bytes):
            yield threads.submit(_read, index, image, size)
        elif not all_there:
            yield _now(index, image, size)
        else:
            # PIL reads a file when its pixels are first asked for, which two threads must not do at once for one image.
            there = running.get(id(image))
            if there is None:
                there = running[id(image)] = threads.submit(_read, index, image, size)
            yield there


def _now(index: int, image: ImageInput, size: int) -> "Future[np.ndarray]":
    done: Future[np.ndarray] = Future()
    try:
        done.set_result(_read(index, image, size))
    except UserError as error:
        done.set_exception(error)
    return done


def _read(index: int, image: ImageInput, size: int) -> np.ndarray:
    try:
        return eval_array(_open(image), size)
    except BadSampleError as error:
        named = f" ('{image}')" if isinstance(image, str | os.PathLike) else ""
        why = {
            "image_too_large": f"it has more than {MAX_PIXELS:,} pixels",
            "image_too_thin": f"a side may be at most {MAX_ASPECT} times the other",
        }.get(error.cause, "it is no image, or it is damaged")
        raise UserError(f"images[{index}]{named} cannot be decoded: {why}") from None
    except (UserError, OSError) as error:
        raise UserError(f"images[{index}]: {' '.join(str(error).split())}") from None


def _open(image: ImageInput) -> Image.Image:
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, str) and image.startswith(("http://", "https://", "data:")):
        raise UserError("it is a URL, which is not fetched: give a path, or the file's bytes")
    if isinstance(image, str | os.PathLike):
        path = storage_path(os.fspath(image))
        if not path.is_file():
            raise UserError(f"there is no file '{image}'")
        return open_image(path.read_bytes())
    if isinstance(image, bytes | bytearray):
        return open_image(bytes(image))
    if isinstance(image, Tensor):
        image = _channels_last(image)
    if isinstance(image, np.ndarray):
        return _from_array(image)
    raise UserError(f"it is of type {type(image).__name__}; {_ALLOWED}")


def _channels_last(image: Tensor) -> np.ndarray:
    if image.ndim == 3 and image.shape[0] not in _CHANNELS:
        layout = "tensors are [C, H, W] with 1, 3 or 4 channels, arrays [H, W, C]"
        raise UserError(f"it is a tensor of shape {list(image.shape)}; {layout}")
    image = image.detach().cpu()
    return (image.permute(1, 2, 0) if image.ndim == 3 else image).numpy()


def _from_array(image: np.ndarray) -> Image.Image:
    if image.dtype != np.uint8:
        raise UserError(f"it is an array of {image.dtype}; pixels must be uint8, from 0 to 255")
    if image.ndim == 3 and image.shape[2] == 1:
        image = image[:, :, 0]
    if image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] not in _CHANNELS) or not image.size:
        raise UserError(f"it is an array of shape {list(image.shape)}; [H, W] or [H, W, 1, 3 or 4] is allowed")
    return Image.fromarray(np.ascontiguousarray(image))


_ALLOWED = (
    "an image is a PIL image, a path, a file's bytes, a uint8 array [H, W, C] or a uint8 tensor [C, H, W]; "
    "give one, or several"
)
