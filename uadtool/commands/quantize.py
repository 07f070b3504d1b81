from typing import Optional

import click

from uadtool import options
from uadtool.errors import UadtoolError, require_lab


@click.command()
@click.argument("model", metavar="MODEL", type=click.Path(exists=True, dir_okay=False))
@click.option("--ranges", "ranges_file", required=True, metavar="FILE",
              help="Activation ranges that `uadtool calibrate` recorded with this model (- is stdin).")
@options.output("The quantized model to write (.safetensors).")
@click.option("--target", type=click.Choice(["onnxruntime"]), default="onnxruntime", show_default=True,
              help="Runtime whose integer kernels the model is made for.")
@click.option("--data", metavar="DATA", help="Take score statistics and threshold anew, with the quantized model, from "
                                            "the good images of DATA that training held out.")
@options.verbosity
def quantize(model: str, ranges_file: str, output: str, target: str, data: Optional[str]) -> None:
    """Quantize a float MODEL to int8 after training: weights per channel, activations per tensor, the score in float.

    Rounding shifts the raw scores of each class a little, and the classes apart. With --data they are put level again.

    \b
    Examples:
      uadtool quantize fp32.safetensors --ranges ranges.json -o int8.safetensors
      uadtool quantize fp32.safetensors --ranges r.json --data mvtec/ -o int8.safetensors
    """
    require_lab()
    from uadtool import __version__
    from uadtool.artifacts import check_writable, file_digest, write_json
    from uadtool.models import load_float_model, save_model
    from uadtool.quantization import RangesFile
    from uadtool.quantization import quantize as run
    from uadtool.training import refit_statistics

    check_writable(output)
    ranges = RangesFile.read(ranges_file)
    digest = file_digest(model)
    if ranges.model_digest != digest:
        raise UadtoolError(f"{ranges_file} was recorded with model {ranges.model_digest}, but {model} is {digest}; "
                           "run calibrate with this model")
    detector, metadata = load_float_model(model)
    quantized = run(detector, ranges.ranges)
    step = {"command": "quantize", "tool_version": __version__, "model_digest": digest,
            "calibration": {"method": ranges.method, "source": ranges.source}}
    metadata = metadata.replace(precision="int8", target=target, provenance=[*metadata.provenance, step])
    if data:
        metadata = refit_statistics(quantized, metadata, data)
    save_model(quantized, metadata, output)
    write_json({"schema": "uadtool.quantize/1", "output": output, "digest": file_digest(output),
                "model_digest": digest, "target": target, "precision": "int8", "method": "ptq",
                "points": len(ranges.ranges)})
