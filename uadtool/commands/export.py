from typing import Optional

import click

from uadtool import options
from uadtool.errors import UadtoolError, require_lab


@click.command()
@click.argument("model", metavar="MODEL", type=click.Path(exists=True, dir_okay=False))
@options.output("The detector to write (.onnx).")
@click.option("--images", metavar="PATH", help="Compare torch and the runtime on images of this folder or data set  "
                                               "[default: on synthetic ones]")
@options.verbosity
def export(model: str, output: str, images: Optional[str]) -> None:
    """Write MODEL as a complete ONNX detector and check that it gives the scores that torch gives.

    \b
    Example:
      uadtool export unified-int8.safetensors -o unified-int8.onnx --images mvtec/
    """
    require_lab()
    from uadtool import __version__
    from uadtool.artifacts import check_writable, file_digest, write_json
    from uadtool.models import load_model
    from uadtool.onnx_export import check_parity, lint, parity_images, save_onnx, to_onnx

    check_writable(output)
    digest = file_digest(model)
    detector, metadata = load_model(model)
    pixels = parity_images(images, metadata.image_size)
    step = {"command": "export", "tool_version": __version__, "model_digest": digest}
    metadata = metadata.replace(provenance=[*metadata.provenance, step])
    proto = to_onnx(detector, metadata)
    if metadata.target == "tensorrt" and (findings := lint(proto)):
        raise UadtoolError(f"TensorRT would not take the exported graph: {findings[0]}; nothing was written")
    parity = check_parity(detector, proto, pixels)
    save_onnx(proto, output)
    write_json({"schema": "uadtool.export/1", "output": output, "digest": file_digest(output), "model_digest": digest,
                "precision": metadata.precision, "target": metadata.target,
                "opset": next(o.version for o in proto.opset_import if o.domain == ""),
                "parity": {"source": images or "synthetic", **parity}})
