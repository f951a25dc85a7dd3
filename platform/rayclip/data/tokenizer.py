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
from tokenizers import Regex, decoders, models, pre_tokenizers

from rayclip.errors import UserError

VOCAB_SIZE = 49_408
# CLIP takes these, spelled out in a caption, for the special tokens themselves.
START, END = "<start_of_text>", "<end_of_text>"

# Stands between captions while they are split together. No caption holds it: ftfy removes control characters.
_BREAK, _BREAK_ID = "\x00", -1

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
        captions = _clean([texts] if isinstance(texts, str) else list(texts))
        tokens = np.zeros((len(captions), self.context_length), dtype=np.int32)
        if not captions:
            return tokens, np.zeros(0, dtype=np.int32)
        # All captions go through one chain of C loops; what is done per caption in Python would cost more than all.
        words = f" {_BREAK} ".join(captions).split()
        ids = np.fromiter(chain.from_iterable(map(self._ids.__getitem__, words)), dtype=np.int32)
        breaks = np.flatnonzero(ids == _BREAK_ID)
        starts, ends = np.append(0, breaks + 1), np.append(breaks, len(ids))
        lengths = np.minimum(ends - starts, self.context_length - 2)
        columns = np.arange(self.context_length - 2)
        real = columns < lengths[:, None]
        tokens[:, 1:-1][real] = ids[(starts[:, None] + columns)[real]]
        tokens[:, 0] = self._ids.start
        tokens[np.arange(len(tokens)), lengths + 1] = self._ids.end
        return tokens, (lengths + 2).astype(np.int32)

    def decode(self, tokens: np.ndarray) -> str:
        """Return the caption of one row of tokens, as `__call__` gives them: lowered, a space between its pieces."""
        numbers = tokens.tolist()
        pieces = [self._ids.token(number) for number in numbers[1 : numbers.index(self._ids.end)]]
        letters = "".join(piece.replace("</w>", " ") for piece in pieces)
        return decoders.ByteLevel().decode(list(letters)).strip()

    def __reduce__(self) -> tuple[Any, ...]:
        return get_tokenizer, (self.context_length,)


def check_vocabulary(vocab_size: int) -> None:
    """Raise UserError where a model's token embedding has no row for some of the tokenizer's ids."""
    if vocab_size < VOCAB_SIZE:
        raise UserError(
            f"model.text.vocab_size {vocab_size:,} is below the tokenizer's {VOCAB_SIZE:,}: captions would have tokens "
            "that the model has no row for"
        )


@cache
def get_tokenizer(context_length: int = 77) -> Tokenizer:
    """The process's one tokenizer of that context length."""
    return Tokenizer(context_length)


def _clean(texts: list[str]) -> list[str]:
    """Repair mojibake, resolve HTML entities twice, lower: what CLIP does before it splits."""
    together = "".join(texts)
    if together.isascii() and together.isprintable() and "&" not in together:  # where it is, only lower() changes it
        return [text.lower() for text in texts]
    return [html.unescape(html.unescape(ftfy.fix_text(text))).replace(_BREAK, "").lower() for text in texts]


class _WordIds(dict[str, tuple[int, ...]]):
    """Ids of words, worked out when first asked for."""

    def __init__(self, splitter: pre_tokenizers.PreTokenizer, pairs: models.BPE, special: dict[str, int]) -> None:
        super().__init__({word: (number,) for word, number in special.items()} | {_BREAK: (_BREAK_ID,)})
        self.start, self.end = special[START], special[END]
        self._splitter, self._pairs, self._special = splitter, pairs, special

    def __missing__(self, word: str) -> tuple[int, ...]:
        pieces = (piece for piece, _ in self._splitter.pre_tokenize_str(word))
        ids = tuple(chain.from_iterable(map(self._piece_ids, pieces)))
        if len(self) < _MOST_WORDS and len(word) <= _LONGEST_WORD:
            self[word] = ids
        return ids

    def token(self, number: int) -> str:
        """Return a token as the vocabulary spells it; nothing for a special one."""
        return self._pairs.id_to_token(number) or ""

    def _piece_ids(self, piece: str) -> list[int]:
        if piece in self._special:
            return [self._special[piece]]
        return [token.id for token in self._pairs.tokenize(piece)]


@cache
def _word_ids() -> _WordIds:
    """Built once a process: the merges take a moment to read."""
    table = gzip.decompress(Path(__file__).with_name("bpe_merges.txt.gz").read_bytes()).decode()
    merges: list[tuple[str, str]] = [(first, second) for first, second in map(str.split, table.splitlines())]
    # GPT-2's letters for bytes, in the order of CLIP's ids: Latin-1's own, then those borrowed from U+0100 on.
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = letters + [letter + "</w>" for letter in letters] + [first + second for first, second in merges]
    ids = {token: number for number, token in enumerate(vocabulary)}
    pieces = pre_tokenizers.Split(Regex(_PIECES), behavior="removed", invert=True)
    splitter = pre_tokenizers.Sequence([pieces, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    pairs = models.BPE(vocab=ids, merges=merges, end_of_word_suffix="</w>")
    return _WordIds(splitter, pairs, {START: len(ids), END: len(ids) + 1})
