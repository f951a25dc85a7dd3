"""From settings to a Serve application, for `serve run rayclip.serve.app:build_app` or a file with `import_path`."""

from collections.abc import Callable
from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig

from rayclip.config.loader import load, validate
from rayclip.serve.config import ReplicasConfig, ServeConfig
from rayclip.serve.ingress import Ingress
from rayclip.serve.towers.encoders import ImageEncoder, TextEncoder
from rayclip.serve.versions.coordinator import Coordinator

# A line a request would cost more than some requests do; /metrics counts them.
_QUIET = {"enable_access_log": False, "log_level": "INFO"}


def build_app(args: dict[str, Any]) -> Application:
    """The application from the keys of ServeConfig, nested ones dotted or as mappings. Raises UserError."""
    texts = [f"{key}={value}" for key, value in args.items() if isinstance(value, str)]
    rest = {key: value for key, value in args.items() if not isinstance(value, str)}
    # What `serve run` gives are texts, with dots in their keys; a config file gives values.
    return bind(load(ServeConfig, None, texts) if not rest else validate(ServeConfig, args, "args"))


def bind(config: ServeConfig) -> Application:
    """The four deployments: an ingress before two towers, and a coordinator that all of them ask."""
    alone = serve.deployment(
        num_replicas=1, ray_actor_options={"num_cpus": 0}, max_ongoing_requests=1_000, logging_config=_QUIET
    )
    coordinator = alone(Coordinator).bind(config)
    image = _scaled(config.image_encoder, config)(ImageEncoder).bind(config, coordinator)
    text = _scaled(config.text_encoder, config)(TextEncoder).bind(config, coordinator)
    return _scaled(config.ingress, config)(Ingress).bind(config, image, text, coordinator)


def _scaled(replicas: ReplicasConfig, config: ServeConfig) -> Callable[[type], serve.Deployment]:
    return serve.deployment(
        autoscaling_config=AutoscalingConfig(
            min_replicas=replicas.min_replicas,
            max_replicas=replicas.max_replicas,
            initial_replicas=replicas.initial_replicas,
            target_ongoing_requests=replicas.target_ongoing_requests,
            upscale_delay_s=replicas.upscale_delay_s,
            downscale_delay_s=replicas.downscale_delay_s,
            look_back_period_s=max(1.0, replicas.upscale_delay_s),
        ),
        max_ongoing_requests=replicas.max_ongoing_requests,
        ray_actor_options={"num_cpus": replicas.num_cpus, "num_gpus": replicas.num_gpus},
        health_check_period_s=config.health_period_s,
        health_check_timeout_s=max(10.0, 5 * config.health_period_s),
        graceful_shutdown_timeout_s=config.request_timeout_s,
        logging_config=_QUIET,
    )
