"""What goes over the wire: requests and answers as pydantic models, from which /openapi.json is made."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

MAX_KEYS = 50
"""Of any object in a request. No request has a fifth of that."""
MAX_CANDIDATES = 10_000
"""Whatever the settings allow: each costs some microseconds before they are looked at, and millions fit into a body."""

Image64 = Annotated[str, Field(min_length=1, description="base64, a data: URI, or, where that is switched on, a URL")]
Text = Annotated[str, Field(min_length=1)]
# The first wrong item is enough. An error for each of the five million that fit into a body took minutes and gigabytes.
Texts = Annotated[list[Text], Field(fail_fast=True)]
Scores = Literal["softmax", "sigmoid", "cosine"]


class Request(BaseModel):
    """Base of all requests: strict types, and a key that does not exist is an error."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _has_few_keys(cls, content: Any) -> Any:
        # As with Texts: each unknown key would be an error of its own.
        if isinstance(content, dict) and len(content) > MAX_KEYS:
            raise ValueError(f"an object has {len(content)} keys; at most {MAX_KEYS} are read")
        return content


class ZeroShotOptions(Request):
    """What a zero-shot request says beside its pictures."""

    labels: Texts | None = Field(None, description="class names; these or label_set")
    label_set: str | None = Field(None, description="a registered label set")
    templates: str | Texts | None = Field(None, description="a template set, a template with {}, or several")
    top_k: int | None = Field(None, ge=1, description="the best k labels; none: all")
    scores: Scores | None = Field(
        None, description="softmax over the labels; sigmoid: each label on its own; cosine: the bare similarity"
    )
    multi_label: bool = Field(False, description="several labels may be true: the same as scores=sigmoid")
    model: str | None = Field(None, description="a version that is loaded; none: as the traffic is split")
    truncate: bool = Field(True, description="false: a prompt that is longer than the model reads is an error")

    @model_validator(mode="after")
    def _check(self) -> "ZeroShotOptions":
        if (self.labels is None) == (self.label_set is None):
            raise ValueError("give exactly one of labels and label_set")
        if self.multi_label and self.scores not in (None, "sigmoid"):
            raise ValueError(f"multi_label contradicts scores={self.scores}")
        return self

    @property
    def kind(self) -> Scores:
        """The scores that are asked for."""
        return self.scores or ("sigmoid" if self.multi_label else "softmax")


class ZeroShotRequest(ZeroShotOptions):
    """POST /v1/zero-shot"""

    image: Image64 | None = Field(None, description="one picture")
    images: Annotated[list[Image64], Field(fail_fast=True)] | None = Field(
        None, min_length=1, description="several pictures"
    )

    @model_validator(mode="after")
    def _one_of_both(self) -> "ZeroShotRequest":
        if (self.image is None) == (self.images is None):
            raise ValueError("give exactly one of image and images")
        return self


class HuggingFaceInputs(Request):
    """The object form of `inputs`, which the JavaScript client sends."""

    image: Image64


class HuggingFaceParameters(Request):
    """Of the Hugging Face zero-shot-image-classification task."""

    candidate_labels: Texts = Field(min_length=1)
    hypothesis_template: Text | None = Field(None, description="holds {} where the label goes")


class HuggingFaceRequest(Request):
    """POST /v1/zero-shot-image-classification, and POST /, which is where Hugging Face's clients send it"""

    inputs: Image64 | HuggingFaceInputs
    parameters: HuggingFaceParameters


class EmbeddingsRequest(Request):
    """POST /v1/embeddings, as OpenAI's clients send it; `modality` is infinity's extension."""

    input: Text | Annotated[Texts, Field(min_length=1)] = Field(description="texts, or pictures as data: URIs")
    model: str | None = Field(None, description="a version that is loaded; none or 'clip': as the traffic is split")
    encoding_format: Literal["float", "base64"] | None = Field(
        "float", description="base64: little-endian float32; null: float"
    )
    dimensions: int | None = Field(None, ge=1, description="must be the model's own: a CLIP's features do not nest")
    modality: Literal["text", "image"] | None = Field(
        None, description="none: an item that is a data: URI is an image, another one a text"
    )
    truncate: bool = Field(True, description="false: a text that is longer than the model reads is an error")
    user: str | None = Field(None, description="ignored")

    @field_validator("input", mode="before")
    @classmethod
    def _is_no_tokens(cls, given: Any) -> Any:
        first = given[0] if isinstance(given, list) and given else None
        if isinstance(first, int) or (isinstance(first, list) and first and isinstance(first[0], int)):
            raise ValueError("arrays of tokens are not read, since their tokenizer is another one: send texts")
        return given


class RankItem(Request):
    """A text or a picture."""

    text: Text | None = None
    image: Image64 | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> "RankItem":
        if (self.text is None) == (self.image is None):
            raise ValueError("give exactly one of text and image")
        return self


class RankRequest(Request):
    """POST /v1/rank: candidates by their similarity to the query."""

    query: Text | RankItem = Field(description="a text, a data: URI of an image, or {text} or {image}")
    candidates: Annotated[list[Text | RankItem], Field(fail_fast=True)] = Field(
        min_length=1, max_length=MAX_CANDIDATES, description="each as the query"
    )
    top_k: int | None = Field(None, ge=1, description="the best k candidates; none: all")
    model: str | None = Field(None, description="a version that is loaded; none: as the traffic is split")
    truncate: bool = Field(True, description="false: a text that is longer than the model reads is an error")


class LabelSetRequest(Request):
    """PUT /v1/label-sets/NAME"""

    labels: Texts = Field(min_length=1)
    templates: str | Texts | None = Field(None, description="none: the service's default")


class Error(BaseModel):
    """What went wrong, in OpenAI's form."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(BaseModel):
    """Every answer that is not a 2xx."""

    error: Error


class Notice(BaseModel):
    """What was done to a request that its sender may not expect; `params` are the parts that are meant."""

    code: str
    message: str
    params: list[str]


class Prediction(BaseModel):
    """A label with its score; `index` is its place in the request."""

    label: str
    score: float
    index: int


class ImageResult(BaseModel):
    """The best labels of one picture, or why it has none."""

    index: int
    predictions: list[Prediction] = []
    error: Error | None = None


class ZeroShotResponse(BaseModel):
    """A result a picture, in the order of the request."""

    object: Literal["zero_shot"] = "zero_shot"
    model: str = Field(description="the version that gave the answer")
    templates: list[str]
    scores: Scores
    results: list[ImageResult]
    warnings: list[Notice] | None = None


class LabelScore(BaseModel):
    """An entry of the Hugging Face answer."""

    label: str
    score: float


class Embedding(BaseModel):
    """One input's features, of length 1."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class Usage(BaseModel):
    """Tokens of the texts that were read, and how many texts were longer than the model reads."""

    prompt_tokens: int
    total_tokens: int
    truncated_texts: int = 0


class EmbeddingsResponse(BaseModel):
    """As OpenAI's."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: Usage
    warnings: list[Notice] | None = None


class Ranked(BaseModel):
    """A candidate: `score` is the cosine, `probability` its share in the softmax over all candidates."""

    index: int
    score: float
    probability: float


class RankResponse(BaseModel):
    """Candidates, best first."""

    object: Literal["rank"] = "rank"
    model: str
    results: list[Ranked]
    warnings: list[Notice] | None = None


class ServedModel(BaseModel):
    """A loaded version."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "rayclip"
    share: float = Field(description="of the traffic that names no version")
    state: Literal["serving", "loading", "retiring", "failed"]
    embed_dim: int | None = None
    image_size: int | None = None
    logit_scale: float | None = None
    error: str | None = None


class ModelsResponse(BaseModel):
    """GET /v1/models; a warning says why a version stays although the registry cannot be followed."""

    object: Literal["list"] = "list"
    data: list[ServedModel]
    warnings: list[Notice] | None = None


class LabelSetInfo(BaseModel):
    """GET /v1/label-sets/NAME"""

    name: str
    labels: list[str]
    templates: str | list[str] | None = None


class LabelSetsResponse(BaseModel):
    """GET /v1/label-sets"""

    data: list[LabelSetInfo]


class TemplatesResponse(BaseModel):
    """GET /v1/templates"""

    default: list[str]
    data: dict[str, list[str]]
