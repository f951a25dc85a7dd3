"""Open MLflow's pages over the runs of this folder, on 127.0.0.1:5000."""

import os
import sys
from pathlib import Path

from pydantic import Field

from rayclip.cli.command import print_help
from rayclip.config import Config
from rayclip.config.loader import describe, load
from rayclip.errors import UserError


class UiConfig(Config):
    """rayclip ui"""

    tracking_uri: str | None = Field(None, description="MLflow; none: the database under ./mlflow")
    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(5000, ge=0, le=65535, description="port to listen on")


def command(arguments: list[str]) -> int:
    """Become MLflow's server over the database that runs in this folder use. Raises UserError where there is none."""
    if {"-h", "--help"} & set(arguments):
        print_help(f"usage: rayclip ui [key=value ...]\n\n{describe(UiConfig)}")
        return 0
    config = load(UiConfig, None, arguments)

    from rayclip.tracking.mlflow import resolve_uri

    uri = resolve_uri(config.tracking_uri)
    database = Path(uri.removeprefix("sqlite:///"))
    if uri.startswith("sqlite:///") and not database.is_file():
        raise UserError(f"no runs here: '{database}' is not there; go to the folder of the runs, or give tracking_uri=")
    print(f"MLflow over {uri}, at http://{config.host}:{config.port}  (ctrl-c stops)", file=sys.stderr)
    options = ["--backend-store-uri", uri, "--host", config.host, "--port", str(config.port)]
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", "mlflow", "ui", *options])
