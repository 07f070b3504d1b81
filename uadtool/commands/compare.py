from typing import Tuple

import click

from uadtool import options


@click.command()
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@click.option("--format", "style", type=click.Choice(["table", "markdown", "csv", "json"]), default="table",
              show_default=True, help="What to print.")
@click.option("--gate", "conditions", multiple=True, metavar="EXPR",
              help="Exit with 4 unless METRIC OP NUMBER holds; may be repeated.")
@options.verbosity
def compare(files: Tuple[str, ...], style: str, conditions: Tuple[str, ...]) -> None:
    """Set models side by side, each against the first.

    FILES are outputs of score and bench, mixed, in any order; results of the same model are joined. `-` is stdin.
    Metrics have a difference to the first model, image AUROC with its 95% bootstrap interval over the images; speed and
    size have a ratio.

    A gate takes a metric name as in --format json, one of >= <= > <, and a number in the unit of the table: a plain
    number must hold for every model; a signed one is a difference and one with x a ratio to the first model, and must
    hold for all others.

    \b
    Example:
      uadtool compare fp32.jsonl int8.jsonl bench.json \\
        --gate 'image_auroc>=-0.01' --gate 'file_size<=0.34x' --gate 'latency_p50<=20'
    """
    from uadtool.comparison import compare as compare_files
    from uadtool.gates import Gate

    try:
        gates = [Gate.parse(condition) for condition in conditions]
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--gate") from error
    record = compare_files(files)
    failures = [failure for gate in gates for failure in gate.failures(record)]

    if style == "json":
        from uadtool.artifacts import write_json

        write_json(record)
    else:
        from uadtool.reports import table

        text = table.as_csv(record) if style == "csv" else table.as_table(record, markdown=style == "markdown")
        click.echo(text.encode("utf-8", "replace"), nl=False)  # names of files may hold what UTF-8 cannot
    if failures:
        import logging

        from uadtool.errors import GateFailed

        for failure in failures:
            logging.getLogger("uadtool").error("gate failed: %s", failure)
        raise GateFailed("the comparison does not meet its gates")
