"""The sources: what they list, what they read, and what they say of bad input."""

import io
import json
import os
import tarfile

import pytest
from PIL import Image

from rayclip.config import EmojiConfig, FolderConfig, GlyphsConfig, IngestConfig, TableConfig
from rayclip.data.decode import BadSampleError
from rayclip.data.encode import encode_image, to_sample
from rayclip.data.formats import table
from rayclip.data.formats.base import Layout, Shard
from rayclip.data.sources import SOURCES, Record, emoji
from rayclip.data.sources.base import hold_out
from rayclip.errors import UserError


def png(color="red", size=(8, 8), mode="RGB", fmt="PNG", **save):
    target = io.BytesIO()
    Image.new(mode, size, color).save(target, fmt, **save)
    return target.getvalue()


def entry(name, file, short, group="face-smiling", category="Smileys & Emotion", artists=("a", "b"), tones=()):
    drawn = {f"has_img_{artist}": artist in artists for artist in ("a", "b")}
    return {
        "name": name,
        "unified": file.upper(),
        "image": f"{file}.png",
        "short_name": short,
        "category": category,
        "subcategory": group,
        **drawn,
        "skin_variations": {
            tone: {"unified": f"{file}-{tone}".upper(), "image": f"{file}-{tone}.png".lower(), **drawn}
            for tone in tones
        },
    }


ENTRIES = [
    entry("GRINNING FACE", "1f600", "grinning"),
    entry("France Flag", "1f1eb", "fr", "country-flag", "Flags"),
    entry("MAN IN TUXEDO", "1f935", "person_in_tuxedo", "person-role", "People & Body", tones=("1F3FB", "1F3FF-1F3FB")),
    entry("MAN IN TUXEDO", "1f936", "man_in_tuxedo", "person-role", "People & Body"),
    entry("HASH KEY", "0023", "hash", "keycap", "Symbols", artists=("a",)),
    entry("EMOJI MODIFIER FITZPATRICK TYPE-3", "1f3fc", "skin-tone-3", "skin-tone", "Component"),
]


def write_package(path, artist, entries=ENTRIES):
    files = {"package/emoji.json": json.dumps(entries).encode(), "package/img/other/64/1f600.png": b"no"}
    for item in entries:
        for image in [item["image"], *(v["image"] for v in item["skin_variations"].values())]:
            if item[f"has_img_{artist}"]:
                files[f"package/img/{artist}/64/{image}"] = png()
    with tarfile.open(path, "w:gz") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


@pytest.fixture
def cache(tmp_path):
    for artist in ("a", "b"):
        write_package(tmp_path / f"emoji-datasource-{artist}-16.0.0.tgz", artist)
    return tmp_path


def test_glyphs_through_the_source(tmp_path):
    config = GlyphsConfig(size=24)
    splits = SOURCES["glyphs"].splits(config, tmp_path)
    assert splits["train"].class_names is None
    record = SOURCES["glyphs"].read(splits["held_out_font"].items[7], config)
    assert record.image.size == (24, 24)
    assert splits["held_out_font"].class_names[record.cls] == record.caption


def test_emoji_of_one_artist_are_held_out(cache):
    config = EmojiConfig(artists=("a", "b"), held_out="b", plain_share=1)
    splits = emoji.splits(config, cache)
    train = [emoji.read(item, config) for item in splits["train"].items]
    assert [record.caption for record in train] == [
        "grinning face",
        "flag of france",
        "person in tuxedo",
        "man in tuxedo",
        "hash key",
    ]
    assert all(record.cls is None and Image.open(io.BytesIO(record.image)) for record in train)
    held_out = splits["held_out_artist"]
    assert held_out.class_names == ["flag of france", "grinning face", "man in tuxedo", "person in tuxedo"]
    assert [held_out.class_names[item.cls] for item in held_out.items] == [item.caption for item in held_out.items]


def test_emoji_captions_vary_and_repeat(cache):
    config = EmojiConfig(artists=("a", "b"), held_out=None, plain_share=0)
    first, again = ([item.caption for item in emoji.splits(config, cache)["train"].items] for _ in range(2))
    assert first == again
    assert not any(caption in ("grinning face", "flag of france") for caption in first)


def test_emoji_with_skin_tones(cache):
    config = EmojiConfig(artists=("a", "b"), held_out="b", plain_share=1, skin_tones=True)
    captions = [item.caption for item in emoji.splits(config, cache)["train"].items]
    assert len(captions) == 7
    assert "person in tuxedo, light skin tone" in captions
    assert "person in tuxedo, dark and light skin tones" in captions


@pytest.mark.parametrize(
    ("name", "group", "words"),
    [
        ("FAMILY: MAN, WOMAN, GIRL, BOY", "family", "family of man, woman, girl and boy"),
        ("FAMILY: ADULT, CHILD", "family", "family of adult and child"),
        ("MAN: RED HAIR", "person", "man with red hair"),
        ("WOMAN: BALD", "person", "bald woman"),
        ("KEYCAP: *", "keycap", "keycap asterisk"),
        ("RESCUE WORKER’S HELMET", "clothing", "rescue worker's helmet"),
        ("France Flag", "country-flag", "flag of france"),
        ("United Arab Emirates Flag", "country-flag", "flag of the united arab emirates"),
        ("Cocos (Keeling) Islands Flag", "country-flag", "flag of the cocos keeling islands"),
        ("Congo - Kinshasa Flag", "country-flag", "flag of congo kinshasa"),
        ("St. Kitts & Nevis Flag", "country-flag", "flag of saint kitts and nevis"),
        ("U.S. Virgin Islands Flag", "country-flag", "flag of the us virgin islands"),
        ("PIRATE FLAG", "flag", "pirate flag"),
    ],
)
def test_emoji_names(name, group, words):
    assert emoji.plain_name(name, group) == words


def test_a_held_out_artist_must_be_one_of_several():
    with pytest.raises(ValueError, match="held_out 'c'"):
        EmojiConfig(artists=("a", "b"), held_out="c")


def fake_npm(folder, script):
    folder.mkdir()
    (folder / "npm").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "npm").chmod(0o755)
    return folder


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("""echo '{"error": {"code": "E404", "summary": "Not Found"}}'; exit 1""", "emoji-datasource-a@16.0.0: E404"),
        ("echo broken >&2; exit 1", "emoji-datasource-a@16.0.0: broken"),
        ("exit 3", "exit code 3"),
    ],
)
def test_npm_that_fails_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, script, said):
    monkeypatch.setenv("PATH", f"{fake_npm(tmp_path / 'bin', script)}{os.pathsep}/bin")
    with pytest.raises(UserError, match=said) as caught:
        emoji.splits(EmojiConfig(artists=("a",), held_out=None), tmp_path / "cache")
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "cache").iterdir()) == []


def test_no_npm(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="needs npm"):
        emoji.splits(EmojiConfig(), tmp_path / "cache")


def test_npm_pack_fills_the_cache(cache, tmp_path, monkeypatch):
    script = f"""for last; do :; done; cp {cache}/emoji-datasource-a-16.0.0.tgz "$last"/"""
    monkeypatch.setenv("PATH", f"{fake_npm(tmp_path / 'bin', script)}{os.pathsep}/bin")
    config = EmojiConfig(artists=("a",), held_out=None)
    assert len(emoji.splits(config, tmp_path / "fresh")["train"].items) == 5
    assert [path.name for path in (tmp_path / "fresh").iterdir()] == ["emoji-datasource-a-16.0.0.tgz"]


@pytest.mark.parametrize("data", [b"not a tgz", b""])
def test_a_damaged_package(tmp_path, data):
    (tmp_path / "emoji-datasource-a-16.0.0.tgz").write_bytes(data)
    with pytest.raises(UserError, match="delete it to fetch it again"):
        emoji.splits(EmojiConfig(artists=("a",), held_out=None), tmp_path)


def read_all(config, tmp_path):
    source = SOURCES[config.kind]
    out = []
    for item in source.splits(config, tmp_path)["train"].items:
        try:
            out.append(source.read(item, config).caption)
        except BadSampleError as error:
            out.append(error)
    return [str(value) if isinstance(value, BadSampleError) else value for value in out]


def test_a_folder_of_pictures(tmp_path):
    (tmp_path / "more").mkdir()
    for name in ("a.jpg", "b.PNG", "c.png", "d.webp", "more/e.png"):
        (tmp_path / name).write_bytes(png())
    (tmp_path / "a.txt").write_text("a cat")
    (tmp_path / "b.json").write_text('{"caption": "a dog"}')
    (tmp_path / "c.json").write_text('{"text": "another key"}')
    (tmp_path / "more/e.txt").write_bytes(b"\xff\xfe")
    config = FolderConfig(path=str(tmp_path))
    assert read_all(config, tmp_path) == ["a cat", "a dog", "no_caption", "no_caption", "caption_not_utf8"]
    assert "another key" in read_all(config.model_copy(update={"caption_key": "text"}), tmp_path)


def test_folders_that_cannot_be(tmp_path):
    with pytest.raises(UserError, match="is not a folder"):
        SOURCES["folder"].splits(FolderConfig(path=str(tmp_path / "none")), tmp_path)
    with pytest.raises(UserError, match="no pictures"):
        SOURCES["folder"].splits(FolderConfig(path=str(tmp_path)), tmp_path)


@pytest.mark.parametrize("separator", [",", "\t", ";", "|"])
def test_a_table(tmp_path, separator):
    (tmp_path / "x.png").write_bytes(png())
    rows = [("id", "FilePath", " Title"), ("1", "x.png", '"one, and\ntwo"'), ("2", "gone.png", "two"), ("3", "x.png")]
    (tmp_path / "t.csv").write_text("\ufeff" + "\n".join(separator.join(row) for row in rows), encoding="utf-8")
    assert read_all(TableConfig(path=str(tmp_path / "t.csv")), tmp_path) == ["one, and\ntwo", "no_image", "no_caption"]


def test_a_table_is_read_as_index_reads_it(tmp_path):
    for name in ("a.png", "b.png", "c.png", "d.png"):
        (tmp_path / name).write_bytes(png())
    rows = [b'a.png,"a quote that never ends', b"b.png,one, two and more", b"c.png,caf\xe9", b"d.png,end"]
    (tmp_path / "t.csv").write_bytes(b"\n".join([b"filepath,title", *rows]))
    config = TableConfig(path=str(tmp_path / "t.csv"))
    assert read_all(config, tmp_path) == ['"a quote that never ends', "row_malformed", "caption_not_utf8", "end"]
    assert SOURCES["table"].splits(config, tmp_path)["train"].items[1][1] == "line 3"
    shard = Shard(config.path, (tmp_path / "t.csv").stat().st_size)
    layout = Layout("table", "filepath", ("title",), ",", careful=True)
    spans = table.list_chunks(shard, 3, layout)
    samples = [sample for span in spans for sample in table.read_chunk(shard, span, layout)]
    assert [sample.get("txt", sample.get("__no_caption__")) for sample in samples] == [
        b'"a quote that never ends', b"row_malformed", b"caf\xe9", b"end",
    ]  # fmt: skip


def test_columns_by_name_and_columns_that_are_not_there(tmp_path):
    (tmp_path / "x.png").write_bytes(png())
    (tmp_path / "t.tsv").write_text("picture\tEN\nx.png\thello\n")
    config = TableConfig(path=str(tmp_path / "t.tsv"), image_column="picture", caption_column="EN")
    assert read_all(config, tmp_path) == ["hello"]
    with pytest.raises(UserError, match=r"no column 'filepath' \(source.image_column\); it has: picture, EN"):
        SOURCES["table"].splits(TableConfig(path=config.path), tmp_path)
    with pytest.raises(UserError, match="no column 'DE'"):
        SOURCES["table"].splits(config.model_copy(update={"caption_column": "DE"}), tmp_path)


@pytest.mark.parametrize(
    ("data", "said"),
    [(b"", "empty header"), (b"filepath,title\n", "no rows"), (b"\xff\xfef\0", "not a table in UTF-8")],
)
def test_tables_that_cannot_be(tmp_path, data, said):
    (tmp_path / "t.csv").write_bytes(data)
    with pytest.raises(UserError, match=said):
        SOURCES["table"].splits(TableConfig(path=str(tmp_path / "t.csv")), tmp_path)
    with pytest.raises(UserError, match="is not a file"):
        SOURCES["table"].splits(TableConfig(path=str(tmp_path)), tmp_path)


def config_with(**keys):
    return IngestConfig(source=GlyphsConfig(), output="unused", **keys)


@pytest.mark.parametrize(("fmt", "extension"), [("PNG", "png"), ("JPEG", "jpg"), ("WEBP", "webp")])
def test_files_that_training_reads_keep_their_bytes(fmt, extension):
    data = png(fmt=fmt, size=(40, 30))
    assert encode_image(data, config_with()) == (extension, data)
    assert encode_image(data, config_with(shorter_side=64)) == (extension, data)


def test_pictures_are_shrunk_and_never_enlarged():
    for side, size in ((15, (20, 15)), (30, (40, 30)), (64, (40, 30))):
        extension, data = encode_image(png(size=(40, 30)), config_with(shorter_side=side, image_format="jpg"))
        image = Image.open(io.BytesIO(data))
        assert (extension, image.format, image.size) == ("jpg", "JPEG", size)


def test_foreign_formats_transparency_and_orientation():
    assert encode_image(png(fmt="GIF"), config_with())[0] == "png"
    _, clear = encode_image(png((255, 0, 0, 0), mode="RGBA"), config_with(image_format="png", shorter_side=4))
    assert Image.open(io.BytesIO(clear)).getpixel((0, 0)) == (255, 255, 255)
    exif = Image.Exif()
    exif[0x0112] = 6
    _, turned = encode_image(png(fmt="JPEG", size=(40, 30), exif=exif), config_with())
    assert Image.open(io.BytesIO(turned)).size == (30, 40)


@pytest.mark.parametrize("data", [b"", b"no picture", png()[:40], png(fmt="JPEG", size=(64, 64))[:300]])
def test_pictures_that_cannot_be_decoded(data):
    with pytest.raises(BadSampleError, match="image_undecodable"):
        encode_image(data, config_with())


def test_a_record_as_files():
    sample = to_sample(Record(png(), "  two\n lines ", 3), "000000007", config_with())
    assert (sample["__key__"], sample["txt"], sample["cls"]) == (b"000000007", b"two lines", b"3")
    with pytest.raises(BadSampleError, match="caption_empty"):
        to_sample(Record(png(), " \n"), "1", config_with())


def test_a_share_of_the_pictures_is_held_out_by_name():
    names = [f"{i // 2}.jpg" for i in range(4000)]  # two captions a picture
    parts = hold_out(range(4000), names, 0.1)
    train, held_out = (list(parts[split].items) for split in ("train", "held_out"))
    assert sorted(train + held_out) == list(range(4000))
    assert not {names[i] for i in train} & {names[i] for i in held_out}
    assert 300 < len(held_out) < 500
    first_half = hold_out(range(2000), names[:2000], 0.1)["held_out"].items
    assert list(first_half) == [i for i in held_out if i < 2000]
    assert hold_out([1], ["a"], 0.0).keys() == {"train"}
