from typing import Any, Callable, List, Optional, Tuple

import click

from uadtool.cli import options
from uadtool.errors import require_lab


@click.command()
@click.argument("models", metavar="MODEL...", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False))
@options.output("The ONNX detector (.onnx), TensorRT engine (.engine) or model (.safetensors) to write.")
@options.names("--classes", "Write only these classes of the models.")
@options.names("--drop", "Write all classes but these.")
@click.option("--size", type=click.IntRange(1), metavar="N",
              help="Take banks of N entries, one of the sizes that train --sizes made  [default: the largest]")
@click.option("--images", metavar="PATH",
              help="Compare torch and the runtime on images of this folder or data set  [default: synthetic images]")
@click.option("--input-size", metavar="HxW", callback=options.height_and_width(4096),
              help="Take images of this height and width, such as a camera's, and resize them inside the graph  "
                   "[default: the model's size]")
@options.threshold_from
@click.option("--false-positive-rate", metavar="SHARE", type=options.Share(0, 0.5),
              help="Share of the good images of --threshold-from above their thresholds  [default: the model's]")
@click.option("--workspace", type=click.IntRange(1), metavar="MIB",
              help="Memory for building an engine  [default: all]")
@click.option("--max-batch", type=click.IntRange(1), metavar="N", help="Largest batch of an engine  [default: 8]")
@click.option("--optimal-batch", type=click.IntRange(1), metavar="N",
              help="Batch size at which an engine is to be fastest  [default: 1]")
@click.option("--timing-cache", type=click.Path(dir_okay=False), metavar="FILE",
              help="Read and write the kernel timings of a build, which speed up the next build.")
@click.option("--dla", type=click.IntRange(0), metavar="CORE",
              help="Run the engine on this core of the deep-learning accelerator (DLA).")
@click.option("--gpu-fallback", is_flag=True, default=None,
              help="Run layers that the DLA does not support on the GPU (with --dla).")
@click.option("--compute-capability", metavar="X.Y", help="Build for a GPU that is not here (TensorRT-RTX only).")
@options.max_pixels
@options.verbosity
def export(models: Tuple[str, ...], output: str, classes: Optional[List[str]], drop: Optional[List[str]],
           size: Optional[int], images: Optional[str], input_size: Optional[Tuple[int, int]],
           threshold_from: Tuple[str, ...], false_positive_rate: Optional[float], **build: Any) -> None:
    """Write MODEL as a complete ONNX detector and check that its scores match those of torch.

    Several models that grew from one base (train --add-to) become one, with the classes of all. An OUTPUT in
    .safetensors is such a model, or one with fewer classes.

    If MODEL is an ONNX detector, build a TensorRT engine from it, on the device that will run it. The metadata of the
    engine go into OUTPUT.json.

    \b
    Examples:
      uadtool export unified-int8.safetensors -o unified-int8.onnx --images mvtec/
      uadtool export line-1.safetensors line-2.safetensors -o both.safetensors
      uadtool export unified.safetensors --classes screw,pcb -o two.onnx
      uadtool export unified.safetensors --size 250 -o small.onnx
      uadtool export unified-int8.onnx -o unified-int8.engine --workspace 1024
      uadtool export unified.safetensors -o camera.onnx --input-size 1080x1920
      uadtool export unified.safetensors -o unified.onnx --threshold-from good.jsonl
    """
    to_engine, to_model = output.endswith(".engine"), output.endswith(".safetensors")
    from_onnx = [model.endswith(".onnx") for model in models]
    build = {name: value for name, value in build.items() if value is not None}
    options.refuse(
        (from_onnx != [to_engine] * len(models) or not output.endswith((".onnx", ".engine", ".safetensors")),
         "export turns .safetensors models into an .onnx file or another model, and an .onnx file into an .engine "
         "file."),
        (to_engine and (len(models) > 1 or classes or drop or size),
         "an engine has the classes and the size of one .onnx file; join and choose when that is exported."),
        (classes and drop, "--classes and --drop are mutually exclusive."),
        (input_size and not output.endswith(".onnx"), "--input-size requires an .onnx output."),
        (to_model and images, "--images requires an .onnx output."),
        (to_model and not (len(models) > 1 or classes or drop or size or threshold_from),
         "the output would be the same model; give several, --classes, --drop, --size or --threshold-from."),
        (build and not to_engine, f"--{next(iter(build), '').replace('_', '-')} requires an .engine output."),
        (images and to_engine, "--images requires an .onnx output; check an engine with score."),
        ("gpu_fallback" in build and "dla" not in build, "--gpu-fallback requires --dla."),
        ("optimal_batch" in build and "dla" in build, "a DLA runs batches of --max-batch; leave out --optimal-batch."),
        (build.get("optimal_batch", 1) > build.get("max_batch", 8), "--optimal-batch exceeds --max-batch."),
        (false_positive_rate is not None and not threshold_from, "--false-positive-rate requires --threshold-from."),
    )
    for path in filter(None, (output, to_engine and f"{output}.json", build.get("timing_cache"))):
        options.claim(path, [*models, *threshold_from])

    def retuned(metadata: Any) -> Any:
        if not threshold_from:
            return metadata
        from uadtool.comparing.good_images import with_thresholds_from

        return with_thresholds_from(metadata, threshold_from, false_positive_rate, input_size)

    if to_engine:
        _write_engine(models[0], output, retuned, build)
    else:
        _write_model(models, output, classes, drop, size, retuned, images, input_size)


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


def _write_model(models: Tuple[str, ...], output: str, classes: Optional[List[str]], drop: Optional[List[str]],
                 size: Optional[int], retuned: Callable[[Any], Any], images: Optional[str],
                 input_size: Optional[Tuple[int, int]]) -> None:
    require_lab()
    from contextlib import ExitStack

    from uadtool import __version__
    from uadtool.files import file_digest, unchanged
    from uadtool.lab.export import export as run
    from uadtool.lab.models import load_model, save_model
    from uadtool.lab.onnx_export.writer import save_onnx
    from uadtool.lab.rows import Model, choose, join, without
    from uadtool.lab.sizes import at_size
    from uadtool.lab.training.precision import use_available_cores
    from uadtool.schemas.json_files import write_json

    use_available_cores()
    with ExitStack() as stack:
        digests = [stack.enter_context(unchanged(path)) for path in models]
        model = join([Model(*load_model(path), path) for path in models])
    if classes or drop:
        model = choose(model, classes or without(model, drop or []))
    if size:
        model = at_size(model, size)
    detector, metadata = model.module, retuned(model.metadata)
    record = {"schema": "uadtool.export/1", "output": output, "model_digest": digests[0], "classes": metadata.classes,
              "precision": metadata.precision, "target": metadata.target}
    if len(models) > 1:
        record["joined"] = digests
    if output.endswith(".safetensors"):
        step = {"command": "export", "tool_version": __version__, "models": sorted(digests)}
        save_model(detector, metadata.replace(provenance=[*metadata.provenance, step]), output)
    else:
        proto, record["parity"] = run(detector, metadata, digests[0], images, input_size)
        save_onnx(proto, output)
        record["opset"] = next(opset.version for opset in proto.opset_import if not opset.domain)
    write_json({**record, "digest": file_digest(output)})
