"""How large the frames inside an AVIF file are, whatever its header says: the decoder obeys the frames.

A file may declare 8 x 8 pixels and hold a frame of 268 million, of which the decoder asks nobody. So the sequence
headers of the AV1 data (AV1 specification, 5.5.1) are read where the container (ISO 14496-12, ISO 23008-12) puts them.
"""

from collections.abc import Iterator

_SEQUENCE_HEADER = 1
_MOST_ITEMS = 100


def frame_sizes(data: bytes) -> Iterator[tuple[int, int]]:
    """The (width, height) that each image of a still AVIF file may have at most, tiles of a grid one by one.

    Raises ValueError for a file of a form that is not known, IndexError for one that is cut off.
    """
    meta = _box(data, b"meta")[4:]
    kinds = _item_kinds(_box(meta, b"iinf"))
    for item, ranges, in_meta in _items(_box(meta, b"iloc")):
        if (item, b"av01") in kinds:
            source = _box(meta, b"idat") if in_meta else data
            yield from _sequence_sizes(b"".join(_part(source, start, length) for start, length in ranges))


def _boxes(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The kind and the content of each box."""
    at = 0
    while at < len(data):
        size, head = int.from_bytes(data[at : at + 4]), 8
        if size == 1:
            size, head = int.from_bytes(data[at + 8 : at + 16]), 16
        if size == 0:
            size = len(data) - at
        if size < head or at + size > len(data):
            raise ValueError("a box is cut off")
        yield data[at + 4 : at + 8], data[at + head : at + size]
        at += size


def _box(data: bytes, kind: bytes) -> bytes:
    found = [content for name, content in _boxes(data) if name == kind]
    if len(found) != 1:  # which of several counts is the decoder's secret
        raise ValueError(f"{len(found)} boxes {kind!r}")
    return found[0]


def _part(data: bytes, start: int, length: int) -> bytes:
    if start + length > len(data):
        raise ValueError("an item is cut off")
    return data[start : start + length] if length else data[start:]


class _Reader:
    """Big-endian numbers, one after the other."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def number(self, num_bytes: int) -> int:
        if self._at + num_bytes > len(self._data):
            raise ValueError("a table is cut off")
        self._at += num_bytes
        return int.from_bytes(self._data[self._at - num_bytes : self._at])


def _item_kinds(iinf: bytes) -> set[tuple[int, bytes]]:
    """The number and the type of each item; one that is listed twice has both."""
    kinds = set()
    for _, entry in _boxes(iinf[6 if iinf[0] == 0 else 8 :]):
        wide = entry[0] == 3
        kinds.add((int.from_bytes(entry[4 : 8 if wide else 6]), entry[10:14] if wide else entry[8:12]))
    return kinds


def _items(iloc: bytes) -> Iterator[tuple[int, list[tuple[int, int]], bool]]:
    """Each item's number, the (start, length) of its parts, and whether they are in the meta box."""
    version = iloc[0]
    read = _Reader(iloc[4:])
    sizes = read.number(2)
    offset_size, length_size, base_size, index_size = (sizes >> shift & 15 for shift in (12, 8, 4, 0))
    num_items = read.number(4 if version == 2 else 2)
    if num_items > _MOST_ITEMS:
        raise ValueError(f"{num_items} items")
    for _ in range(num_items):
        item = read.number(4 if version == 2 else 2)
        method = read.number(2) & 15 if version else 0
        read.number(2)
        base = read.number(base_size)
        num_parts = read.number(2)
        if num_parts > _MOST_ITEMS or method > 1:
            raise ValueError("an item of a form that is not known")
        ranges = []
        for _ in range(num_parts):
            if version:
                read.number(index_size)
            start = base + read.number(offset_size)
            ranges.append((start, read.number(length_size)))
        yield item, ranges, method == 1


def _sequence_sizes(data: bytes) -> Iterator[tuple[int, int]]:
    at = 0
    while at < len(data):
        header = data[at]
        at += 2 if header & 4 else 1
        length = len(data) - at
        if header & 2:
            length, at = _leb128(data, at)
        if header >> 3 & 15 == _SEQUENCE_HEADER:
            yield _frame_size(data[at : at + length])
        at += length


def _leb128(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for i in range(8):
        value |= (data[at + i] & 127) << 7 * i
        if not data[at + i] & 128:
            return value, at + i + 1
    raise ValueError("a length without end")


def _frame_size(header: bytes) -> tuple[int, int]:
    bits = "".join(f"{byte:08b}" for byte in header[:64])
    at = 0

    def take(number: int) -> int:
        nonlocal at
        at += number
        if at > len(bits):
            raise ValueError("a sequence header is cut off")
        return int(bits[at - number : at] or "0", 2)

    take(4)
    is_reduced = take(1)
    if is_reduced:
        take(5)
    else:
        if take(1):
            raise ValueError("a still image with a clock")
        has_delay = take(1)
        for _ in range(take(5) + 1):
            take(12)
            if take(5) > 7:
                take(1)
            if has_delay and take(1):
                take(4)
    wide, high = take(4) + 1, take(4) + 1
    size = take(wide) + 1, take(high) + 1
    # Unless the header is the short one of stills, a frame may have a size of its own, of so many bits: at most four
    # times as large.
    if not is_reduced and any(
        num > max(1, (side - 1).bit_length()) for num, side in zip((wide, high), size, strict=True)
    ):
        raise ValueError("more bits than the size needs")
    return size
