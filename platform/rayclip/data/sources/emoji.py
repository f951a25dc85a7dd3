"""Source `emoji`: about 1,900 emoji in each of several artists' drawings, 64 pixels, from npm.

What the packages hold, and what is made of it (version 16.0.0):

- Names are upper case ("FAMILY: MAN, BOY", "MAN: RED HAIR"); captions are lower case words ("family of man and boy").
- 262 flags of countries and regions are named "France Flag"; the caption is "flag of france".
- 1,875 skin tone variants a package would be five near-copies of a caption: left out unless `skin_tones`, and then
  their tone is in the caption. The five bare swatches of skin tone show nothing else and are always left out.
- Two emoji are both named "MAN IN TUXEDO"; emoji that share a name take their short names, which are unique.
- Some pictures are the same under different names, such as the flags of Norway and Svalbard, 43 at most in one
  package. They stay: each name is right, and a reader of scores on the held-out artist loses a percent at most.
"""

import io
import json
import re
import shutil
import subprocess
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from rayclip.config import EmojiConfig
from rayclip.data.order import uniform
from rayclip.data.sources.base import Record, Split
from rayclip.errors import UserError

TEMPLATES = ("an emoji of {name}", "{name}, an emoji")
GROUP_TEMPLATES = ("{name}, {group}", "{group}: {name}", "{short}")
_FLAGS = ("country-flag", "subdivision-flag")
_TONES = {"1F3FB": "light", "1F3FC": "medium-light", "1F3FD": "medium", "1F3FE": "medium-dark", "1F3FF": "dark"}
_WITH_ARTICLE = re.compile(
    r"(?:united|central|dominican|european|british|us|isle|cayman|cook|faroe|turks)\b.*"
    r"|.*\b(?:islands|territor(?:y|ies))|bahamas|comoros|gambia|maldives|netherlands|philippines|seychelles|vatican.*"
)
_TIMEOUT_S = 600


class Item(NamedTuple):
    """One drawing: its PNG, 64 by 64 with alpha and about three kilobytes, and its caption."""

    png: bytes
    caption: str
    cls: int | None


class _Emoji(NamedTuple):
    file: str
    code: str
    name: str
    short: str
    group: str


def splits(config: EmojiConfig, cache: Path) -> dict[str, Split]:
    """`train`, and `held_out_artist` where one is held out, with emoji names as classes. Raises UserError."""
    train: list[Item] = []
    held_out: dict[str, Split] = {}
    for number, artist in enumerate(config.artists):
        drawings = list(_read_package(_fetch(artist, config.version, cache), artist, config.skin_tones))
        if artist == config.held_out:
            names = sorted({emoji.name for emoji, _ in drawings})
            index = {name: i for i, name in enumerate(names)}
            held_out["held_out_artist"] = Split(
                [Item(png, emoji.name, index[emoji.name]) for emoji, png in drawings], names
            )
        else:
            train += [Item(png, _caption(emoji, number, config), None) for emoji, png in drawings]
    return {"train": Split(train), **held_out}


def read(item: Item, config: EmojiConfig) -> Record:
    """The drawing as it is: transparent where there is no ink."""
    return Record(item.png, item.caption, item.cls)


def _fetch(artist: str, version: str, cache: Path) -> Path:
    """The package's file, from the cache or by `npm pack`. Raises UserError for whatever keeps npm from it."""
    package = f"emoji-datasource-{artist}"
    target = cache / f"{package}-{version}.tgz"
    if target.is_file():
        return target
    if shutil.which("npm") is None:
        raise UserError("source emoji needs npm to fetch its packages, and there is none on the path")
    partial = cache / f"{package}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    command = ["npm", "pack", f"{package}@{version}", "--silent", "--json", "--pack-destination", str(partial)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
        (partial / target.name).replace(target)
    except subprocess.TimeoutExpired:
        raise UserError(f"npm pack {package}@{version} did not finish in {_TIMEOUT_S} s") from None
    except FileNotFoundError:
        raise UserError(f"npm cannot fetch {package}@{version}: {_npm_reason(done)}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _npm_reason(done: subprocess.CompletedProcess[str]) -> str:
    try:
        error = json.loads(done.stdout)["error"]
        return f"{error['code']}, {error['summary'].splitlines()[0]}"
    except (ValueError, KeyError, TypeError, IndexError):
        lines = done.stderr.strip().splitlines()
        return lines[-1] if lines else f"exit code {done.returncode}"


def _read_package(package: Path, artist: str, skin_tones: bool) -> Iterator[tuple[_Emoji, bytes]]:
    """Every emoji that the artist drew, with its PNG, in the order of the package's list."""
    folder = f"package/img/{artist}/64/"
    try:
        with tarfile.open(package, "r:gz") as tar:
            files = {
                member.name: tar.extractfile(member).read()  # type: ignore[union-attr]  # a file always opens
                for member in tar
                if member.isfile() and (member.name == "package/emoji.json" or member.name.startswith(folder))
            }
        entries = json.load(io.BytesIO(files["package/emoji.json"]))
    except (tarfile.TarError, OSError, EOFError, KeyError, ValueError) as error:
        raise UserError(f"'{package}' is not an emoji package ({error}): delete it to fetch it again") from None
    for emoji in _emoji(entries, artist, skin_tones):
        if (png := files.get(folder + emoji.file)) is not None:
            yield emoji, png


def _emoji(entries: list[dict[str, Any]], artist: str, skin_tones: bool) -> Iterator[_Emoji]:
    shared = Counter(entry["name"] for entry in entries)
    for entry in entries:
        if entry["category"] == "Component":
            continue
        short = _words(entry["short_name"])
        name = short if shared[entry["name"]] > 1 else plain_name(entry["name"], entry["subcategory"])
        group = "" if entry["subcategory"] in _FLAGS else _words(entry["subcategory"].replace("-", " "))
        if entry[f"has_img_{artist}"]:
            yield _Emoji(entry["image"], entry["unified"], name, short, group)
        for tones, variant in entry.get("skin_variations", {}).items() if skin_tones else ():
            if variant[f"has_img_{artist}"]:
                tone = f", {tone_words(tones)}"
                yield _Emoji(variant["image"], variant["unified"], name + tone, short + tone, group)


def plain_name(name: str, subcategory: str) -> str:
    """An emoji's name as a caption: "France Flag" -> "flag of france", "MAN: RED HAIR" -> "man with red hair"."""
    name = name.lower().replace("’", "'")
    if subcategory in _FLAGS:
        place = re.sub(r"\bst\.", "saint", name.removesuffix(" flag")).replace(".", "")
        place = _words(re.sub(r"[()]| - ", " ", place.replace("&", "and")))
        return f"flag of the {place}" if _WITH_ARTICLE.fullmatch(place) else f"flag of {place}"
    head, colon, tail = name.replace("*", "asterisk").partition(": ")
    if not colon or head == "keycap":
        return _words(f"{head} {tail}")
    if tail == "bald":
        return f"bald {head}"
    *first, last = tail.split(", ")
    return f"{head} {'of' if first or subcategory == 'family' else 'with'} " + (
        f"{', '.join(first)} and {last}" if first else last
    )


def tone_words(tones: str) -> str:
    """As in "1F3FB" -> "light skin tone"; two people of different tones have both."""
    words = list(dict.fromkeys(_TONES[tone] for tone in tones.split("-")))
    return f"{' and '.join(words)} skin tone{'s' if len(words) > 1 else ''}"


def _words(text: str) -> str:
    return " ".join(text.lower().replace("_", " ").split())


def _caption(emoji: _Emoji, artist: int, config: EmojiConfig) -> str:
    """The bare name in a share of the captions, else one of the templates: a function of (seed, artist, emoji)."""
    codes = [int(code, 16) for code in emoji.code.split("-")]
    kind, pick = (float(uniform(config.seed, artist, *codes, draw)) for draw in (0, 1))
    if kind < config.plain_share:
        return emoji.name
    # A group that the name says already ("family", the flags) would say it twice.
    says_more = emoji.group and emoji.group not in emoji.name
    templates = TEMPLATES + GROUP_TEMPLATES if says_more else TEMPLATES
    return templates[int(pick * len(templates))].format(**emoji._asdict())
