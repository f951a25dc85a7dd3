"""Settings of data sets: reading them for training, writing and indexing them."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from rayclip.config.base import Config, Effect, InputPath, NotPath, OutputPath, RenamedFrom
from rayclip.config.cluster import WorkersConfig


class MixturePartConfig(Config):
    """One data set of a mixture."""

    path: InputPath = Field(description="folder or address of a data set: what rayclip ingest or rayclip index wrote")
    weight: float = Field(
        1.0, gt=0, allow_inf_nan=False, description="times that an epoch has each of its samples, on average"
    )


class DataConfig(Config):
    """What a training run reads, and how it looks at it."""

    path: Annotated[InputPath | None, Effect.BY_CONTENT] = Field(
        None, description="folder or address of a data set; this or mixture"
    )
    mixture: Annotated[tuple[MixturePartConfig, ...], Effect.BY_CONTENT] = Field(
        (), description="several data sets read as one, each by its weight"
    )
    fraction: float = Field(
        1.0, gt=0, le=1, description="share of the chunks that are read; smaller shares lie within larger ones"
    )
    captions: dict[str, Annotated[float, Field(gt=0)]] = Field(
        {}, description="weights of captions: of txt, or of keys of the samples' JSON; empty: txt, or else its caption"
    )
    crop_scale: tuple[float, float] = Field((0.9, 1.0), description="share of the picture's area that a crop keeps")
    crop_ratio: tuple[float, float] = Field((3 / 4, 4 / 3), description="a crop's width over its height")
    flip: float = Field(0.0, ge=0, le=1, description="share of pictures that are mirrored; captions may name a side")
    colour_jitter: tuple[float, float, float, float] = Field(
        (0.0, 0.0, 0.0, 0.0), description="most change of brightness, contrast, saturation; of hue, in turns"
    )
    colour_jitter_share: float = Field(0.8, ge=0, le=1, description="share of pictures whose colours are changed so")
    grey: float = Field(0.0, ge=0, le=1, description="share of pictures that lose their colours")
    shuffle_window: int = Field(8, gt=0, description="chunks fetched together, their samples mixed among each other")
    max_bad_fraction: Annotated[float, Effect.SAME_RESULT] = Field(
        0.01, ge=0, le=1, description="share of unreadable samples that stops the run"
    )

    @model_validator(mode="after")
    def _check(self) -> "DataConfig":
        if (self.path is None) == (not self.mixture):
            raise ValueError("give exactly one of path, a data set, and mixture, a list of several")
        return self


class GlyphsConfig(Config):
    """Characters drawn from the fonts that matplotlib ships, captioned with their Unicode names."""

    kind: Literal["glyphs"] = Field("glyphs", description="where the pairs come from")
    size: int = Field(36, ge=16, le=512, description="side of a picture in pixels; some more than the model's crop")
    letter_renders: int = Field(5, gt=0, description="training pictures of each Latin, Greek or Cyrillic letter a face")
    symbol_renders: int = Field(1, ge=0, description="training pictures of each other character a face")
    eval_renders: int = Field(1, gt=0, description="pictures of each class a face in the two evaluation splits")
    plain_share: float = Field(0.9, ge=0, le=1, description="share of training captions that are the bare name")
    print_share: float = Field(0.9, ge=0, le=1, description="share of pictures in black on white; others in colours")
    seed: int = Field(0, ge=0, description="gives every picture and caption, each by its place in the split")


class EmojiConfig(Config):
    """Emoji of several artists, from the npm packages emoji-datasource-ARTIST."""

    kind: Literal["emoji"] = Field("emoji", description="where the pairs come from")
    artists: tuple[str, ...] = Field(("google", "twitter", "facebook"), min_length=1, description="whose drawings")
    held_out: str | None = Field("facebook", description="artist kept out of training, in a split of their own")
    version: str = Field("16.0.0", description="version of the npm packages")
    skin_tones: bool = Field(False, description="also the variants of skin tone, with the tone in words")
    plain_share: float = Field(0.5, ge=0, le=1, description="share of training captions that are the bare name")
    seed: int = Field(0, ge=0, description="gives every training picture its caption")

    @model_validator(mode="after")
    def _check(self) -> "EmojiConfig":
        if self.held_out is not None and (self.held_out not in self.artists or len(self.artists) < 2):
            raise ValueError(f"held_out '{self.held_out}' must be one of at least two artists: {list(self.artists)}")
        return self


class FolderConfig(Config):
    """A folder of pictures, each with its caption beside it."""

    kind: Literal["folder"] = Field("folder", description="where the pairs come from")
    path: InputPath = Field(description="the folder; folders within it are searched too")
    caption_key: str = Field("caption", description="key of the caption in NAME.json, read where there is no NAME.txt")
    held_out_share: float = Field(0.0, ge=0, lt=1, description="share of the pictures that goes into split held_out")


class TableConfig(Config):
    """A table, its columns parted by tabs or by , ; or |, that names pictures and their captions."""

    kind: Literal["table"] = Field("table", description="where the pairs come from")
    path: InputPath = Field(description="the table; paths in it are relative to its folder")
    image_column: NotPath | None = Field(
        None, description="column of the picture's path; None takes 'filepath' or its kin"
    )
    caption_column: str | None = Field(None, description="column of the caption; None takes 'title' or its kin")
    separator: str | None = Field(
        None, min_length=1, max_length=1, description="between columns; None finds it in the header"
    )
    held_out_share: float = Field(0.0, ge=0, lt=1, description="share of the pictures that goes into split held_out")


class DigitsConfig(Config):
    """scikit-learn's 1,797 handwritten digits of 8 x 8 pixels: every fifth is in split test, the others in train."""

    kind: Literal["digits"] = Field("digits", description="where the pairs come from")
    size: int = Field(32, ge=8, le=512, description="side of a picture in pixels")


class SentimentConfig(Config):
    """Short sentences of praise or of blame, as pictures of their text; the adjectives of test are not in train."""

    kind: Literal["sentiment"] = Field("sentiment", description="where the pairs come from")
    size: int = Field(224, ge=64, le=1024, description="side of a picture in pixels")
    train: int = Field(2000, gt=0, description="pictures in split train")
    test: int = Field(500, gt=0, description="pictures in split test")
    seed: int = Field(0, ge=0, description="gives every picture, by its place in the split")


class ShapesConfig(Config):
    """Three to ten coloured shapes on a ground, to be counted."""

    kind: Literal["shapes"] = Field("shapes", description="where the pairs come from")
    size: int = Field(96, ge=64, le=512, description="side of a picture in pixels")
    train: int = Field(2000, gt=0, description="pictures in split train")
    test: int = Field(500, gt=0, description="pictures in split test")
    seed: int = Field(0, ge=0, description="gives every picture, by its place in the split")


SourceConfig = Annotated[
    GlyphsConfig | EmojiConfig | FolderConfig | TableConfig | DigitsConfig | SentimentConfig | ShapesConfig,
    Field(discriminator="kind"),
]


class IngestConfig(Config):
    """rayclip ingest"""

    source: SourceConfig = Field(description="where pictures and captions come from")
    output: OutputPath = Field(description="folder of the data set; each split becomes a folder in it")
    shard_samples: int = Field(1000, gt=0, description="samples a tar shard")
    chunk_samples: int = Field(64, gt=0, description="neighbouring samples that one read fetches")
    shorter_side: int | None = Field(None, gt=0, description="shrink pictures to this; None, and smaller ones, as is")
    image_format: Literal["keep", "jpg", "png", "webp"] = Field(
        "keep", description="keep: the file as it is where training can read it, otherwise png"
    )
    quality: int = Field(95, ge=1, le=100, description="of jpg and webp that are encoded anew")
    seed: int = Field(0, ge=0, description="of the order in which samples are written")
    max_bad_fraction: Annotated[float, Effect.SAME_RESULT] = Field(
        0.1, ge=0, le=1, description="share of unusable pairs that stops the run"
    )


class IndexConfig(Config):
    """rayclip index"""

    path: InputPath = Field(
        description="folder or address of tar shards, Parquet, tables or pictures; one such file; several: {0..9}.tar"
    )
    output: OutputPath | None = Field(None, description="folder for the manifest; None: beside the shards")
    replace: bool = Field(False, description="write over a manifest there that is of other shards")
    format: Literal["auto", "tar", "parquet", "table", "jsonl", "folder"] = Field(
        "auto", description="auto: the first of these that is there"
    )
    image_column: NotPath | None = Field(
        None, description="of Parquet and tables: pictures' bytes or paths; None takes 'image', 'filepath' or their kin"
    )
    caption_columns: tuple[str, ...] | None = Field(
        None, min_length=1, description="of Parquet and tables; None takes 'caption', 'title' or their kin"
    )
    chunk_samples: int = Field(64, gt=0, description="neighbouring samples that one read fetches")
    check: Literal["decode", "header", "none"] = Field(
        "decode", description="what is tried of each picture: decoding it small, its header, or nothing is read"
    )
    damaged_shards: Annotated[Literal["stop", "salvage"], RenamedFrom("broken")] = Field(
        "stop", description="a shard that is not whole: stop, or take what is whole of it and say so"
    )


class CurateConfig(Config):
    """rayclip curate"""

    data: InputPath = Field(description="folder of a data set: tar shards and their manifest.parquet")
    output: OutputPath = Field(description="folder of the new data set; a run that was interrupted goes on in it")
    queries: Annotated[InputPath | None, Effect.BY_CONTENT] = Field(
        None, description="file of queries, one a line; None mines them from the captions"
    )
    min_count: int = Field(100, gt=0, description="times that a mined query occurs in the captions at least")
    min_pmi: float = Field(10.0, description="least pointwise mutual information of a mined pair of words, in bits")
    max_queries: int = Field(500_000, gt=0, description="most mined queries, the commonest first")
    pairs_per_query: int = Field(20_000, gt=0, description="pairs that a query keeps, beside those of rarer ones")
    keep_unmatched: bool = Field(False, description="keep pairs that no query finds")
    max_distance: int | None = Field(
        2, ge=0, le=8, description="bits of the 64 in which near duplicates differ at most; None leaves those in"
    )
    min_words: int = Field(2, ge=0, description="words that a caption has at least")
    max_characters: int = Field(1000, gt=0, description="characters that a caption has at most")
    min_letters: float = Field(0.5, ge=0, le=1, description="share of letters, of any script, beside white space")
    min_side: int = Field(64, gt=0, description="least shorter side of a picture in pixels")
    max_aspect: float = Field(3.0, ge=1, description="most longer side over shorter")
    embeddings: Annotated[InputPath | None, Effect.BY_CONTENT, RenamedFrom("scores")] = Field(
        None, description="output of rayclip embed on this data set: pairs are judged by the model that made it"
    )
    min_score: float = Field(0.2, ge=-1, le=1, description="least cosine of picture and caption by that model")
    seed: int = Field(0, ge=0, description="of what is drawn, each pair by its name")
    part_samples: int = Field(10_000, gt=0, description="samples of the old data set that a new shard is chosen from")
    chunk_samples: int = Field(64, gt=0, description="neighbouring samples that one read fetches from the new one")
    cluster: Annotated[WorkersConfig, Effect.SAME_RESULT] = Field(WorkersConfig(), description="what it runs on")
    max_bad_fraction: Annotated[float, Effect.SAME_RESULT] = Field(
        0.05, ge=0, le=1, description="share of unreadable samples that stops the run"
    )
