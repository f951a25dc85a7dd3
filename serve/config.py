"""The service's settings: the same keys after `rayclip serve`, after `serve run`, and under `args:` in a file."""

from typing import Literal

from pydantic import Field, model_validator

from rayclip.config import Config
from rayclip.config.base import InputModel, InputPath, NotPath, OutputPath, TrackingUri


class UrlConfig(Config):
    """Pictures given as URLs. Off unless hosts are allowed."""

    allowed_hosts: tuple[str, ...] = Field((), description="hosts to fetch from; '.example.org' takes subdomains too")
    schemes: tuple[Literal["http", "https"], ...] = Field(("https",), description="what a URL may begin with")
    allow_private: bool = Field(False, description="also addresses that are not public: loopback, link-local, 10.x ...")
    max_bytes: int = Field(20_000_000, gt=0, description="longest body")
    max_redirects: int = Field(3, ge=0, description="redirects followed, each checked like the first address")
    timeout_s: float = Field(5.0, gt=0, description="for the whole fetch")


class LimitsConfig(Config):
    """What one request may ask for."""

    max_body_bytes: int = Field(20_000_000, gt=0, description="longest request body")
    max_pixels: int = Field(50_000_000, gt=0, description="width times height, read from the header before decoding")
    max_images: int = Field(64, gt=0, description="pictures in a request")
    max_labels: int = Field(2_000, gt=0, description="labels in a request or a label set")
    max_templates: int = Field(100, gt=0, description="templates in a request or a label set")
    max_prompts: int = Field(20_000, gt=0, description="labels times templates")
    max_texts: int = Field(2_048, gt=0, description="texts to embed, or candidates to rank")
    max_text_chars: int = Field(2_000, gt=0, description="characters of a label, a template or a text")
    max_label_sets: int = Field(1_000, gt=0, description="named label sets that are kept")


class AuthConfig(Config):
    """API keys. Only their hashes are kept; `rayclip serve key NAME` makes one."""

    keys_file: InputPath | None = Field(
        None, description="a line 'NAME sha256:HEX' for each key; also RAYCLIP_API_KEYS"
    )
    required: bool | None = Field(
        None, description="none: where there are keys; a service that others can reach must have some"
    )


class ReplicasConfig(Config):
    """One deployment: what a replica takes of the cluster, and how many there are."""

    min_replicas: int = Field(1, gt=0, description="replicas when it is calm")
    max_replicas: int = Field(1, gt=0, description="replicas under load")
    initial_replicas: int | None = Field(None, gt=0, description="replicas at the start; none: min_replicas")
    target_ongoing_requests: float = Field(32, gt=0, description="requests a replica should have at once")
    max_ongoing_requests: int = Field(256, gt=0, description="requests a replica takes at once; more wait outside")
    upscale_delay_s: float = Field(5.0, ge=0, description="load must last this long before replicas are added")
    downscale_delay_s: float = Field(120.0, ge=0, description="calm must last this long before replicas go")
    num_cpus: float = Field(1.0, ge=0, description="cores of a replica")
    num_gpus: float = Field(0.0, ge=0, description="GPUs of a replica; a fraction shares one")

    @model_validator(mode="after")
    def _ordered(self) -> "ReplicasConfig":
        if self.max_replicas < self.min_replicas:
            raise ValueError(f"max_replicas {self.max_replicas} is below min_replicas {self.min_replicas}")
        return self


class EncoderConfig(ReplicasConfig):
    """A tower's deployment."""

    max_batch_size: int = Field(32, gt=0, description="pictures, or texts, that the tower takes at once")
    max_waiting: int = Field(512, gt=0, description="pictures, or texts, that may wait in a replica; more get a 429")
    threads: int = Field(1, gt=0, description="torch threads of a replica on CPUs")
    decode_threads: int = Field(2, gt=0, description="threads that decode pictures before they are batched")


class LabelSet(Config):
    """Labels under a name, with their templates."""

    labels: tuple[str, ...] = Field(min_length=1, description="the class names")
    templates: str | tuple[str, ...] | None = Field(None, description="a template set or templates; none: the default")


class ServeConfig(Config):
    """rayclip serve"""

    model: InputModel = Field(description="models:/NAME@ALIAS, models:/NAME/VERSION, or a checkpoint's folder")
    canary: InputModel | None = Field(None, description="a second model that gets a share of the traffic")
    canary_share: float = Field(0.0, ge=0, le=1, description="that share")
    tracking_uri: TrackingUri | None = Field(None, description="MLflow; none: the database under ./mlflow")
    poll_s: float = Field(1.0, gt=0, description="how often the alias is looked at, and the replicas report")
    health_period_s: float = Field(2.0, gt=0, description="how often each replica is asked whether its model answers")
    retire_s: float = Field(30.0, ge=0, description="how long a version that was replaced stays loaded")
    host: NotPath = Field("127.0.0.1", description="address to listen on; another one needs API keys")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on")
    templates: str | tuple[str, ...] | None = Field(
        None,
        description="what labels are put into by default; none: what the model was measured with, or photo_ensemble",
    )
    label_sets: dict[str, LabelSet] = Field({}, description="named label sets that are there from the start")
    state_folder: OutputPath | None = Field(
        None, description="where label sets put over HTTP are kept; none: in memory"
    )
    cache_bytes: int = Field(256_000_000, gt=0, description="class matrices that an ingress replica keeps")
    request_timeout_s: float = Field(30.0, gt=0, description="longest that a request may take")
    stop_delay_s: float = Field(
        1.0, ge=0, description="how long requests are still taken once readiness is off: balancers look every so often"
    )
    max_waiting: int = Field(1_000, gt=0, description="requests in an ingress replica at once; more get a 429")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: a GPU for replicas that have one")
    cors_origins: tuple[str, ...] = Field((), description="other origins whose pages may call the service")
    limits: LimitsConfig = Field(LimitsConfig(), description="what one request may ask for")
    urls: UrlConfig = Field(UrlConfig(), description="pictures given as URLs")
    auth: AuthConfig = Field(AuthConfig(), description="who may ask")
    ingress: ReplicasConfig = Field(
        ReplicasConfig(num_cpus=0.1, max_ongoing_requests=1_000, target_ongoing_requests=100),
        description="HTTP, the cache of class matrices, the scores",
    )
    image_encoder: EncoderConfig = Field(EncoderConfig(), description="the image tower")
    text_encoder: EncoderConfig = Field(
        EncoderConfig(num_cpus=0.5, max_batch_size=128, max_waiting=50_000), description="the text tower"
    )

    @model_validator(mode="after")
    def _check(self) -> "ServeConfig":
        if (self.canary is None) != (self.canary_share == 0):
            raise ValueError("give both or none of canary and canary_share")
        return self
