from typing import Any, Optional

import click

from uadtool.cli import options
from uadtool.errors import require_lab


@click.command()
@click.argument("model", metavar="MODEL", type=click.Path(exists=True, dir_okay=False))
@options.output("The detector to write (.onnx), or the engine (.engine).")
@click.option("--images", metavar="PATH", help="Compare torch and the runtime on images of this folder or data set  "
                                               "[default: on synthetic ones]")
@click.option("--precision", type=click.Choice(["fp32", "fp16", "int8"]),
              help="Of an engine: refuse a graph that has another.")
@click.option("--workspace", type=click.IntRange(1), metavar="MIB",
              help="Memory that building an engine may use  [default: all there is]")
@click.option("--max-batch", type=click.IntRange(1), metavar="N", help="Largest batch of an engine  [default: 8]")
@click.option("--timing-cache", type=click.Path(dir_okay=False), metavar="FILE",
              help="Read and write what building an engine measures, so that the next one is built faster.")
@click.option("--dla", type=click.IntRange(0), metavar="CORE",
              help="Let this core of the deep-learning accelerator run the engine.")
@click.option("--gpu-fallback", is_flag=True, help="With --dla: the GPU runs what the accelerator cannot.")
@click.option("--compute-capability", metavar="X.Y", help="Build for another GPU than the one that is here "
                                                          "(TensorRT-RTX).")
@options.verbosity
def export(model: str, output: str, images: Optional[str], **build: Any) -> None:
    """Write MODEL as a complete ONNX detector and check that it gives the scores that torch gives.

    An ONNX detector becomes a TensorRT engine, on the device that will run it; metadata go beside it, as OUTPUT.json.

    \b
    Examples:
      uadtool export unified-int8.safetensors -o unified-int8.onnx --images mvtec/
      uadtool export unified-int8.onnx -o unified-int8.engine --workspace 1024
    """
    from uadtool.files import check_writable

    to_engine = output.endswith(".engine")
    given = [f"--{name.replace('_', '-')}" for name, value in build.items() if value]
    if to_engine != model.endswith(".onnx") or not output.endswith((".onnx", ".engine")):
        raise click.UsageError("a .safetensors model becomes an .onnx file, and an .onnx file an .engine")
    if not to_engine and (given or build["dla"] is not None):
        raise click.UsageError(f"{(given or ['--dla'])[0]} is for engines")
    if to_engine and images:
        raise click.UsageError("--images is for ONNX detectors; score checks an engine")
    if build["gpu_fallback"] and build["dla"] is None:
        raise click.UsageError("--gpu-fallback goes with --dla")
    for path in filter(None, (output, to_engine and f"{output}.json", build["timing_cache"])):
        check_writable(path, [model])
    if to_engine:
        _write_engine(model, output, {name: value for name, value in build.items() if value is not None})
    else:
        _write_onnx(model, output, images)


def _write_engine(model: str, output: str, build: Any) -> None:
    from uadtool.files import unchanged, write_json
    from uadtool.runtimes.onnx_file import read_metadata
    from uadtool.tensorrt.builder import BuildOptions, build_engine
    from uadtool.tensorrt.engine_file import save_engine

    with unchanged(model) as digest:
        metadata = read_metadata(model)
        engine = build_engine(model, metadata, BuildOptions(**build))
    write_json(save_engine(engine, metadata, digest, output))


def _write_onnx(model: str, output: str, images: Optional[str]) -> None:
    require_lab()
    from uadtool.files import file_digest, unchanged, write_json
    from uadtool.lab.export import export as run
    from uadtool.lab.models import load_model
    from uadtool.lab.onnx_export.writer import save_onnx

    with unchanged(model) as digest:
        detector, metadata = load_model(model)
    proto, parity = run(detector, metadata, digest, images)
    save_onnx(proto, output)
    write_json({"schema": "uadtool.export/1", "output": output, "digest": file_digest(output), "model_digest": digest,
                "precision": metadata.precision, "target": metadata.target,
                "opset": next(o.version for o in proto.opset_import if o.domain == ""), "parity": parity})
