import json
from typing import Any, Optional, Tuple

import click

from uadtool.cli import options
from uadtool.errors import GateFailed
from uadtool.terminal import log


@click.command()
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@click.option("--format", "style", type=click.Choice(["table", "markdown", "csv", "json", "html"]),
              help="Output format; html is a page with charts and images  [default: table]")
@click.option("--changed", is_flag=True,
              help="Print only the images that changed sides of the threshold, as JSON lines.")
@click.option("--combine", "how", type=click.Choice(["mean", "max"]),
              help="Add a column: the mean, or the highest, of the models' scores of each image.")
@click.option("--gate", "conditions", multiple=True, metavar="EXPR",
              help="Exit with 4 unless METRIC OP NUMBER holds; may be repeated.")
@click.option("--junit", metavar="FILE", type=click.Path(dir_okay=False),
              help="Write the gates as JUnit XML, one test case per gate.")
@options.output("File to write instead of stdout (-).", required=False)
@options.verbosity
def compare(files: Tuple[str, ...], style: Optional[str], changed: bool, how: Optional[str],
            conditions: Tuple[str, ...], junit: Optional[str], output: Optional[str]) -> None:
    """Compare models, each with the first.

    FILES are outputs of score and bench, in any order, joined by model; `-` is stdin. Scores of the same model for
    different images (shards) are merged. Metrics have a difference to the first model, image AUROC with a 95%
    bootstrap interval over the images; speed and size have a ratio.

    A gate is METRIC OP NUMBER. OP is >=, <=, > or <. A plain NUMBER, in the unit of the table, must hold for every
    model. A signed NUMBER is a difference to the first model and NUMBERx a ratio; both must hold for all other models.
    A gate judges the figure itself, not its interval. If a gate fails, the comparison is still printed, each failure
    is a line on stderr, and the exit code is 4. If the figure of a gate is missing, the exit code is 1.

    \b
    Metrics from score: image_auroc (the mean of the classes), image_auroc.pooled, image_auroc.CLASS,
      average_precision, f1_max, pixel_auroc, aupro, false_positive_rate, recall
    Metrics from bench: latency_p50, latency_p99, throughput, energy, cold_start, peak_rss,
      gpu_memory, file_size, parameters, macs

    \b
    Examples:
      uadtool compare fp32.jsonl int8.jsonl bench.json \\
        --gate 'image_auroc>=-0.01' --gate 'file_size<=0.34x' --junit gates.xml
      uadtool compare fp32.jsonl int8.jsonl bench.json --format html -o report.html
      uadtool compare fp32.jsonl int8.jsonl --changed | jq -r .path
      uadtool compare front.jsonl side.jsonl bench.json --combine mean
    """
    options.refuse((changed and style, "--changed prints JSON lines; leave out --format."),
                   (junit and not conditions, "--junit requires --gate."))
    from uadtool.comparing import comparison
    from uadtool.comparing.gates import Gate, decide
    from uadtool.files import atomic_write

    try:
        gates = [Gate.parse(condition) for condition in conditions]
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--gate") from error
    if output == "-":
        output = None
    for path in filter(None, (junit, output)):
        options.claim(path, files)
    models = comparison.join(files)
    if how:
        from uadtool.comparing.combination import combined

        models = [*models, combined(models, how)]
    # Scores without labels have no figures, but their images may have changed sides.
    record = comparison.set_side_by_side(models) if gates or not changed else {}
    verdicts = decide(gates, record)
    if junit:
        from uadtool.comparing.junit import as_junit

        with atomic_write(junit) as temporary:
            temporary.write_bytes(as_junit(verdicts))
    for verdict in verdicts:
        if verdict.error:
            raise verdict.error

    if changed:
        text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in comparison.changed(models))
    else:
        text = _formatted(style, models, record, verdicts)
    content = text.encode("utf-8", "backslashreplace")  # names may hold bytes that are not UTF-8; none becomes another
    if output:
        with atomic_write(output) as temporary:
            temporary.write_bytes(content)
    else:
        click.echo(content, nl=False)
    failures = [failure for verdict in verdicts for failure in verdict.failures]
    for failure in failures:
        log.error("gate failed: %s", failure)
    if failures:
        raise GateFailed("the comparison does not meet its gates")


def _formatted(style: Optional[str], models: Any, record: Any, verdicts: Any) -> str:
    if style == "html":
        from uadtool.comparing.page.page import as_html

        return as_html(models, record, verdicts)
    if style == "json":
        return json.dumps(record, indent=2, allow_nan=False) + "\n"
    from uadtool.comparing.table import as_csv, as_table

    return as_csv(record) if style == "csv" else as_table(record, markdown=style == "markdown")
