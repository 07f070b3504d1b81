from typing import List, Optional, Tuple

import click

from uadtool.cli import options


def _sizes(ctx: click.Context, param: click.Parameter, value: str) -> List[int]:
    try:
        sizes = sorted({int(size) for size in value.split(",")})
    except ValueError:
        sizes = [0]
    if sizes[0] < 1:
        raise click.BadParameter("give positive integers, separated by commas")
    return sizes


@click.command()
@click.argument("models", metavar="MODEL...", nargs=-1, required=True)
@click.option("--repetitions", type=click.IntRange(1), metavar="N", default=5, show_default=True,
              help="Rounds; each round times every model once.")
@click.option("--duration", type=click.FloatRange(0, min_open=True), metavar="SECONDS", default=3.0, show_default=True,
              help="Time for each model and batch size, over all rounds.")
@click.option("--warmup", type=click.IntRange(0), metavar="N", default=3, show_default=True,
              help="Untimed runs before each measurement.")
@click.option("--batch-sizes", metavar="N,N", default="1,8", show_default=True, callback=_sizes,
              help="Batch sizes for throughput; latency is always measured with one image.")
@click.option("--layers", is_flag=True, help="Also time each layer.")
@click.option("--sweep-threads", "sweep", is_flag=True, help="Also time each model on 1, 2, 4, ... threads.")
@click.option("--roofline", is_flag=True,
              help="Compare each model with a matrix product in its runtime and precision (requires onnx).")
@options.runtime
@options.threads
@options.verbosity
def bench(models: Tuple[str, ...], repetitions: int, duration: float, warmup: int, batch_sizes: List[int],
          layers: bool, sweep: bool, roofline: bool, runtime: str, threads: Optional[int]) -> None:
    """Time exported MODELs: latency, throughput, cold start, memory, and energy where it can be read, as JSON.

    The models take turns in each round, so that a slowdown of the machine affects all of them. Each figure is the
    median of the rounds, with the lowest and the highest round; latency has percentiles over all runs. Ratios to the
    first model are taken within each round. If the ratios of two models lie on both sides of 1, the measurement cannot
    tell the models apart; more --repetitions measure more precisely. Cold start is the time from starting Python to the
    first score. Images are random; only inference is timed, not decoding. Power, energy, power mode, clocks,
    temperatures and throttling come from the sensors of a Jetson or the counters of the processor, if readable.

    \b
    Examples:
      uadtool bench fp32.onnx int8.onnx > bench.json
      uadtool bench model.onnx --threads 1 | jq '.models[0].latency_ms.p50'
      uadtool bench model.onnx --layers | jq -c '.models[0].layers | sort_by(-.milliseconds)[:5][]'
    """
    from uadtool.benchmarking.bench import Settings
    from uadtool.benchmarking.bench import bench as measure
    from uadtool.schemas.json_files import write_json

    write_json(measure(models, Settings(repetitions, duration, warmup, batch_sizes, threads, runtime, layers, sweep,
                                        roofline)))
