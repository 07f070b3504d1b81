from typing import List, Optional, Tuple

import click

from uadtool.cli import options


def _sizes(ctx: click.Context, param: click.Parameter, value: str) -> List[int]:
    try:
        sizes = sorted({int(size) for size in value.split(",")})
    except ValueError:
        sizes = [0]
    if sizes[0] < 1:
        raise click.BadParameter("give whole numbers from 1, with commas between them")
    return sizes


@click.command()
@click.argument("models", metavar="MODEL...", nargs=-1, required=True)
@click.option("--repetitions", type=click.IntRange(1), metavar="N", default=5, show_default=True,
              help="Rounds; in each one, every model has its turn.")
@click.option("--duration", type=click.FloatRange(0, min_open=True), metavar="SECONDS", default=3.0, show_default=True,
              help="How long each model is timed at each batch size, all rounds together.")
@click.option("--warmup", type=click.IntRange(0), metavar="N", default=3, show_default=True,
              help="Runs before each turn, not timed.")
@click.option("--batch-sizes", metavar="N,N", default="1,8", show_default=True, callback=_sizes,
              help="Measure throughput at these; latency is always that of one image.")
@click.option("--layers", is_flag=True, help="Time each layer, too.")
@click.option("--sweep-threads", "sweep", is_flag=True, help="Time each model on 1, 2, 4, ... threads, too.")
@click.option("--roofline", is_flag=True,
              help="Set the rate of each model against a matrix product in its runtime and precision (needs onnx).")
@options.runtime
@options.threads
@options.verbosity
def bench(models: Tuple[str, ...], repetitions: int, duration: float, warmup: int, batch_sizes: List[int],
          layers: bool, sweep: bool, roofline: bool, runtime: str, threads: Optional[int]) -> None:
    """Time exported MODELs: latency, throughput, cold start, memory, and energy where it can be read, as JSON.

    Models take turns, round by round, so that a machine that slows down slows all of them. Figures are the median of
    the rounds with the lowest and the highest, latency has its percentiles over all runs, and ratios to the first model
    are taken within each round: two models whose ratios lie on both sides of 1 are equally fast as far as this tells;
    more --repetitions tell more. Cold start is from starting Python to the first score. Images are random: only
    inference is timed, no decoding. Power and energy come from the sensors of a Jetson, or from the
    processor's own counters where they may be read; with them go power mode, clocks, temperatures and throttling.

    \b
    Examples:
      uadtool bench fp32.onnx int8.onnx > bench.json
      uadtool bench model.onnx --threads 1 | jq '.models[0].latency_ms.p50'
      uadtool bench model.onnx --layers | jq -c '.models[0].layers | sort_by(-.milliseconds)[:5][]'
    """
    from uadtool.benchmarking.bench import bench as measure
    from uadtool.files import write_json

    write_json(measure(models, repetitions, duration, warmup, batch_sizes, threads, runtime, layers, sweep, roofline))
