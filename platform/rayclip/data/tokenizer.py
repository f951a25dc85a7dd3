"""CLIP's byte-pair tokenizer: Hugging Face `tokenizers` applies the merges in bpe_merges.txt.gz.

Token for token the same as open_clip's default tokenizer. One exception: characters that entered Unicode after
the tables of the `tokenizers` build are not known as letters or digits, and may be split in other places.

No token spans white space and captions repeat their words, so each word's ids are kept. On one core that is
several times faster than the library's batch encoding of whole captions.
"""

import gzip
import html
from collections.abc import Sequence
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import ftfy
import numpy as np
from tokenizers import Regex, models, pre_tokenizers

from rayclip.errors import UserError

VOCAB_SIZE = 49_408
# CLIP takes these, spelled out in a caption, for the special tokens themselves.
START, END = "<start_of_text>", "<end_of_text>"

# Contractions, runs of letters, single digits, runs of anything else. CLIP matches without regard to case and
# under that rule the long s equals s; text is lowered beforehand, so it is the one letter to be spelled out.
_PIECES = r"<[sſ]tart_of_text>|<end_of_text>|'[sſ]|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"

# Bounds on what is kept: some 30 MB a process. Longer "words" are links and text without spaces.
_MOST_WORDS, _LONGEST_WORD = 1 << 17, 24


class Tokenizer:
    """Captions to token ids. Pickles as its context length alone."""

    def __init__(self, context_length: int = 77) -> None:
        """
        Args:
            context_length: columns of the result: most tokens a caption may have, start and end included.

        Raises:
            UserError: no room for the start and the end token.
        """
        if context_length < 2:
            raise UserError(f"context_length is {context_length}; it must be at least 2, for the start and end tokens")
        self.context_length = context_length
        self._ids = _word_ids()

    def __call__(self, texts: str | Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Tokenize captions.

        Args:
            texts: one caption, or N of them. One too long is cut, and still ends with the end token.

        Returns:
            tokens, int32 [N, context_length], zero padded; and num_tokens, int32 [N], start and end included.
        """
        rows = [self._encode(text) for text in ([texts] if isinstance(texts, str) else texts)]
        num_tokens = np.fromiter(map(len, rows), dtype=np.int32, count=len(rows))
        tokens = np.zeros((len(rows), self.context_length), dtype=np.int32)
        real = np.arange(self.context_length) < num_tokens[:, None]
        tokens[real] = np.fromiter(chain.from_iterable(rows), dtype=np.int32, count=int(num_tokens.sum()))
        return tokens, num_tokens

    def __reduce__(self) -> tuple[Any, ...]:
        return get_tokenizer, (self.context_length,)

    def _encode(self, text: str) -> list[int]:
        ids = [*self._ids[START]]
        for word in clean(text).split()[: self.context_length]:
            ids += self._ids[word]
        del ids[self.context_length - 1 :]
        ids += self._ids[END]
        return ids


@cache
def get_tokenizer(context_length: int = 77) -> Tokenizer:
    """The process's one tokenizer of that context length."""
    return Tokenizer(context_length)


def clean(text: str) -> str:
    """Repair mojibake, resolve HTML entities twice, lower: what CLIP does before it splits."""
    if not (text.isascii() and text.isprintable() and "&" not in text):  # where it is, neither changes anything
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return text.lower()


class _WordIds(dict[str, tuple[int, ...]]):
    """Ids of words, worked out when first asked for."""

    def __init__(self, splitter: pre_tokenizers.PreTokenizer, pairs: models.BPE, special: dict[str, int]) -> None:
        super().__init__({word: (number,) for word, number in special.items()})
        self._splitter, self._pairs, self._special = splitter, pairs, special

    def __missing__(self, word: str) -> tuple[int, ...]:
        pieces = (piece for piece, _ in self._splitter.pre_tokenize_str(word))
        ids = tuple(chain.from_iterable(map(self._piece_ids, pieces)))
        if len(self) < _MOST_WORDS and len(word) <= _LONGEST_WORD:
            self[word] = ids
        return ids

    def _piece_ids(self, piece: str) -> list[int]:
        if piece in self._special:
            return [self._special[piece]]
        return [token.id for token in self._pairs.tokenize(piece)]


@cache
def _word_ids() -> _WordIds:
    """Built once a process: the merges take a moment to read."""
    table = gzip.decompress(Path(__file__).with_name("bpe_merges.txt.gz").read_bytes()).decode()
    merges: list[tuple[str, str]] = [(first, second) for first, second in map(str.split, table.splitlines())]
    letters = _byte_letters()
    vocabulary = letters + [letter + "</w>" for letter in letters] + [first + second for first, second in merges]
    ids = {token: number for number, token in enumerate(vocabulary)}
    pieces = pre_tokenizers.Split(Regex(_PIECES), behavior="removed", invert=True)
    splitter = pre_tokenizers.Sequence([pieces, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    pairs = models.BPE(vocab=ids, merges=merges, end_of_word_suffix="</w>")
    return _WordIds(splitter, pairs, {START: len(ids), END: len(ids) + 1})


def _byte_letters() -> list[str]:
    """A printable letter for each of the 256 bytes, in the order of CLIP's ids (GPT-2's scheme).

    Bytes that Latin-1 prints stand for themselves and come first; the rest borrow the letters from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [chr(byte) for byte in printable] + [chr(0x100 + number) for number in range(256 - len(printable))]
