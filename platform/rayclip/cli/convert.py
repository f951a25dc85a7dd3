"""Convert weights between the formats of rayclip, open_clip and Hugging Face."""

from typing import Any

from rayclip.cli.command import Command, print_table
from rayclip.config import ConvertConfig
from rayclip.io.paths import storage_path
from rayclip.io.storage import format_path


def main(config: ConvertConfig) -> dict[str, Any]:
    """Write the model of the input in another format; returns what it is. Raises UserError."""
    from rayclip.models.presets import preset
    from rayclip.models.weights import read_weights, write_weights
    from rayclip.tracking.registry import resolve_model

    source = resolve_model(config.input, config.tracking_uri)
    weights = read_weights(source.folder, like=preset(config.model) if config.model else None)
    output = storage_path(config.output)
    write_weights(output, weights, config.format, source.name)
    model = weights.config
    num_parameters = sum(p.numel() for p in weights.model().parameters())
    print_table(
        [
            ("model", source.version),
            ("read from", weights.format),
            ("parameters", f"{num_parameters:,}"),
            ("pictures", f"{model.vision.kind}, {model.vision.image_size} pixels"),
            ("activation", "QuickGELU" if model.quick_gelu else "GELU"),
            ("written", f"{config.format}, to {format_path(str(output))}"),
        ]
    )
    return {
        "input": config.input,
        "input_format": weights.format,
        "model_version": source.version,
        "output": str(output),
        "format": config.format,
        "parameters": num_parameters,
        "model": model.model_dump(mode="json"),
    }


command = Command("rayclip convert", ConvertConfig, main, positional=("input", "output"))
