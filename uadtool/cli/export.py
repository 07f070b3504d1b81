from typing import Any, Callable, Optional

import click

from uadtool.cli import options
from uadtool.errors import require_lab


@click.command()
@click.argument("model", metavar="MODEL", type=click.Path(exists=True, dir_okay=False))
@options.output("The ONNX detector (.onnx) or TensorRT engine (.engine) to write.")
@click.option("--images", metavar="PATH",
              help="Compare torch and the runtime on images of this folder or data set  [default: synthetic images]")
@options.threshold_from
@click.option("--false-positive-rate", metavar="SHARE", type=options.Share(0, 0.5),
              help="Share of the good images of --threshold-from above their thresholds  [default: the model's]")
@click.option("--workspace", type=click.IntRange(1), metavar="MIB",
              help="Memory for building an engine  [default: all]")
@click.option("--max-batch", type=click.IntRange(1), metavar="N", help="Largest batch of an engine  [default: 8]")
@click.option("--timing-cache", type=click.Path(dir_okay=False), metavar="FILE",
              help="Read and write the kernel timings of a build, which speed up the next build.")
@click.option("--dla", type=click.IntRange(0), metavar="CORE",
              help="Run the engine on this core of the deep-learning accelerator (DLA).")
@click.option("--gpu-fallback", is_flag=True, default=None,
              help="Run layers that the DLA does not support on the GPU (with --dla).")
@click.option("--compute-capability", metavar="X.Y", help="Build for a GPU that is not here (TensorRT-RTX only).")
@options.max_pixels
@options.verbosity
def export(model: str, output: str, images: Optional[str], threshold_from: Optional[str],
           false_positive_rate: Optional[float], **build: Any) -> None:
    """Write MODEL as a complete ONNX detector and check that its scores match those of torch.

    If MODEL is an ONNX detector, build a TensorRT engine from it, on the device that will run it. The metadata of the
    engine go into OUTPUT.json.

    \b
    Examples:
      uadtool export unified-int8.safetensors -o unified-int8.onnx --images mvtec/
      uadtool export unified-int8.onnx -o unified-int8.engine --workspace 1024
      uadtool export unified.safetensors -o unified.onnx --threshold-from good.jsonl
    """
    to_engine = output.endswith(".engine")
    build = {name: value for name, value in build.items() if value is not None}
    options.refuse(
        (to_engine != model.endswith(".onnx") or not output.endswith((".onnx", ".engine")),
         "export turns a .safetensors model into an .onnx file, and an .onnx file into an .engine file."),
        (build and not to_engine, f"--{next(iter(build), '').replace('_', '-')} requires an .engine output."),
        (images and to_engine, "--images requires an .onnx output; check an engine with score."),
        ("gpu_fallback" in build and "dla" not in build, "--gpu-fallback requires --dla."),
        (false_positive_rate is not None and not threshold_from, "--false-positive-rate requires --threshold-from."),
    )
    for path in filter(None, (output, to_engine and f"{output}.json", build.get("timing_cache"))):
        options.claim(path, [model, threshold_from])

    def retuned(metadata: Any) -> Any:
        if not threshold_from:
            return metadata
        from uadtool.comparing.good_images import with_thresholds_from

        return with_thresholds_from(metadata, threshold_from, false_positive_rate)

    if to_engine:
        _write_engine(model, output, retuned, build)
    else:
        _write_onnx(model, output, retuned, images)


def _write_engine(model: str, output: str, retuned: Callable[[Any], Any], build: Any) -> None:
    from uadtool.files import unchanged
    from uadtool.runtimes.onnx_file import read_metadata
    from uadtool.schemas.json_files import write_json
    from uadtool.tensorrt.builder import BuildOptions, build_engine
    from uadtool.tensorrt.engine_file import save_engine

    with unchanged(model) as digest:
        metadata = retuned(read_metadata(model))
        engine = build_engine(model, metadata, BuildOptions(**build))
    write_json(save_engine(engine, metadata, digest, output))


def _write_onnx(model: str, output: str, retuned: Callable[[Any], Any], images: Optional[str]) -> None:
    require_lab()
    from uadtool.files import file_digest, unchanged
    from uadtool.lab.export import export as run
    from uadtool.lab.models import load_model
    from uadtool.lab.onnx_export.writer import save_onnx
    from uadtool.lab.training.precision import use_available_cores
    from uadtool.schemas.json_files import write_json

    use_available_cores()
    with unchanged(model) as digest:
        detector, metadata = load_model(model)
    metadata = retuned(metadata)
    proto, parity = run(detector, metadata, digest, images)
    save_onnx(proto, output)
    write_json({"schema": "uadtool.export/1", "output": output, "digest": file_digest(output), "model_digest": digest,
                "precision": metadata.precision, "target": metadata.target,
                "opset": next(opset.version for opset in proto.opset_import if not opset.domain), "parity": parity})
