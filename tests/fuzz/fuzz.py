"""Feeds broken input to every parser of the package, with a coverage-guided fuzzer (atheris).

    python tests/fuzz/fuzz.py RUNS [NAME...]

prints a table of the targets. An input that breaks a target is kept in ``build/fuzz``, and the exit code is 1. An input
breaks a target that raises anything but ``UadtoolError`` or exceeds the bounds below. ``tests/test_fuzz.py`` runs the
same targets briefly, without atheris.
"""

import base64
import contextlib
import importlib
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
import zlib
from operator import attrgetter
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, List, NamedTuple

TESTS = Path(__file__).parents[1]
SECONDS, HANGING, MEMORY = 10, 120, 3072
"""Bounds for an input: CPU seconds, wall-clock seconds, and MiB of the whole process, of which torch takes 500."""

Parse = Callable[[bytes], object]


class Target(NamedTuple):
    """``prepare`` imports and returns the parser, ``seeds`` returns good input. ``share`` scales the number of runs."""

    prepare: Callable[[Path], Parse]
    seeds: Callable[[Path], Iterable[bytes]]
    share: float = 1.0


def file_parser(parse: Callable[[str], object], name: str) -> Callable[[Path], Parse]:
    """``prepare`` for a parser that takes the name of a file."""
    def prepare(folder: Path) -> Parse:
        path = folder / name

        def on_bytes(data: bytes) -> object:
            path.write_bytes(data)
            return parse(str(path))

        return on_bytes

    return prepare


def imported(module: str, function: str, name: str) -> Callable[[Path], Parse]:
    """The parser of files at this place."""
    return lambda folder: file_parser(attrgetter(function)(importlib.import_module(module)), name)(folder)


# Manifests


def _manifest(name: str) -> Callable[[Path], Parse]:
    def prepare(folder: Path) -> Parse:
        from uadtool.data.dataset import scoring_samples, training_samples
        from uadtool.errors import UadtoolError

        def parse(path: str) -> None:
            try:
                training_samples(path)
            except UadtoolError:
                list(scoring_samples([path]))

        return file_parser(parse, name)(folder)

    return prepare


def _csv_seeds(folder: Path) -> Iterable[bytes]:
    return [b"path,class,label,mask,split\na.png,bottle,good,,train\nb.png,bottle,scratch,m/b.png,test\n",
            b'path, label\n"a,b.png", 0\n\xff.png,1\n', b"\xef\xbb\xbfpath\r\na.png\r\n",
            b"sep=;\r\nPath;Class;Split\r\na\\b.png;bottle;Train\r\n;;\r\n",
            "path\tlabel\na.png\tgood\n".encode("utf-16")]


def _jsonl_seeds(folder: Path) -> Iterable[bytes]:
    return [b'{"path": "a.png", "class": "bottle", "label": "good", "split": "train"}\n'
            b'{"path": "b.png", "class": "bottle", "label": 1, "mask": "b_mask.png", "split": "test"}\n']


# Models


def example_metadata() -> Any:
    from uadtool.metadata import Metadata, Quantization

    return Metadata(
        method="stfpm", teacher="resnet10t", classes=["green", "red"], image_size=(32, 32), map_size=(8, 8),
        threshold=3.0, false_positive_rate=0.05, parameters=6, macs=1024, thresholds={"a b": 2.5},
        good_scores={"a b": [-1.0, 0.5], "": [2.0]}, target="onnxruntime",
        options={"fusion": "sum", "shared_stages": 0, "dcam": False},
        quantization=Quantization("ptq", "entropy", "good", "all", ["teacher.conv1"]),
        provenance=[{"command": "train", "seed": 0, "held_out": 0.2}], tool_version="0.1.0")


def _metadata(folder: Path) -> Parse:
    from uadtool.metadata import Metadata

    return lambda data: Metadata.from_json(data.decode("utf-8", "replace"), "model")


def _metadata_seeds(folder: Path) -> Iterable[bytes]:
    return [example_metadata().to_json().encode()]


def _onnx_seeds(folder: Path) -> Iterable[bytes]:
    """Tensors in all possible places."""
    from onnx import AttributeProto, ModelProto, TensorProto, helper

    from uadtool.metadata import KEY

    tensor = helper.make_tensor("t", TensorProto.FLOAT, [2], [1.0, 2.0])
    sparse = helper.make_sparse_tensor(tensor, helper.make_tensor("i", TensorProto.INT64, [2], [0, 3]), [5])
    branch = helper.make_graph([helper.make_node("Constant", [], ["c"], value=tensor)], "branch", [], [], [tensor])
    nodes = [helper.make_node("If", ["image"], ["o"], then_branch=branch, else_branch=branch),
             helper.make_node("Constant", [], ["s"], sparse_value=sparse),
             helper.make_node("Other", [], ["t"], tensors=[tensor], graphs=[branch])]
    graph = helper.make_graph(nodes, "detector", [], [], [tensor], sparse_initializer=[sparse])
    function = helper.make_function("d", "f", [], [], nodes, [helper.make_opsetid("", 17)],
                                    attribute_protos=[helper.make_attribute("a", tensor)])
    model: ModelProto = helper.make_model(graph, functions=[function])
    helper.set_model_props(model, {KEY: example_metadata().to_json()})
    external = ModelProto()
    external.CopyFrom(model)
    external.graph.initializer[0].external_data.add(key="location", value="../secret")
    external.graph.initializer[0].data_location = TensorProto.EXTERNAL
    assert AttributeProto.GRAPHS
    return [model.SerializeToString(), external.SerializeToString()]


def _safetensors_seeds(folder: Path) -> Iterable[bytes]:
    import torch
    from safetensors.torch import save

    from uadtool.metadata import KEY

    return [save({"weight": torch.zeros(2, 3)}, {KEY: example_metadata().to_json()})]


def _checkpoint(folder: Path) -> Parse:
    import torch

    from uadtool.lab.training.checkpoint import read_checkpoint, restore

    model = torch.nn.Linear(2, 1)

    def parse(path: str) -> None:
        restore(read_checkpoint(Path(path), {"seed": 0}), model,
                torch.optim.SGD(model.parameters(), 0.1, momentum=0.9))

    return file_parser(parse, "checkpoint")(folder)


def _checkpoint_seeds(folder: Path) -> Iterable[bytes]:
    import torch

    from uadtool.lab.training.checkpoint import save_checkpoint

    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    path = folder / "seed.checkpoint"
    progress = {"step": 1, "best_step": 1, "best_loss": 0.5}
    save_checkpoint(path, {"seed": 0}, progress, model, model.state_dict(), optimizer)
    return [path.read_bytes()]


def _model(folder: Path) -> Parse:
    """Metadata of a model with valid tensors."""
    from safetensors.torch import load_file, save_file

    from uadtool.lab.models import load_model
    from uadtool.metadata import KEY

    _model_seeds(folder)
    tensors, path = load_file(folder / "seed.safetensors"), folder / "model.safetensors"

    def parse(data: bytes) -> None:
        save_file(tensors, path, {KEY: data.decode("utf-8", "replace")})
        load_model(path)

    return parse


def _model_seeds(folder: Path) -> Iterable[bytes]:
    from uadtool.lab.detectors.registry import build_detector
    from uadtool.lab.models import save_model

    metadata = example_metadata().replace(quantization=None)
    save_model(build_detector(metadata), metadata, folder / "seed.safetensors")
    return [metadata.to_json().encode(), metadata.replace(precision="int8").to_json().encode()]


def _ranges_seeds(folder: Path) -> Iterable[bytes]:
    from uadtool.lab.quantization.ranges import RangesFile

    ranges = {"a": (0.0, 1.5), "b": (-1.0, 1.0)}
    source = {"kind": "good", "count": 2, "seed": 0, "parts": [{"kind": "good", "count": 2}]}
    file = RangesFile(f"sha256:{64 * '0'}", "entropy", source, ranges, "uadtool 0.1.0")
    file.write(str(folder / "seed.json"))
    return [(folder / "seed.json").read_bytes()]


def _engine(folder: Path) -> Parse:
    from uadtool.tensorrt.engine_file import read_engine_metadata

    _engine_seeds(folder)
    return file_parser(lambda path: read_engine_metadata(path[:-len(".json")]), "model.engine.json")(folder)


def _engine_seeds(folder: Path) -> Iterable[bytes]:
    from uadtool.tensorrt.builder import Engine
    from uadtool.tensorrt.engine_file import save_engine

    build = {"package": "tensorrt_rtx", "version": "1.4", "gpu": None, "compute_capability": "8.6", "precision": "int8",
             "workspace": None, "max_batch": 8, "timing_cache": None, "dla": None, "gpu_fallback": False,
             "dla_fallback": []}
    save_engine(Engine(b"plan", build), example_metadata(), f"sha256:{64 * '0'}", str(folder / "model.engine"))
    return [(folder / "model.engine.json").read_bytes()]


# Results


def _results(folder: Path) -> Parse:
    from uadtool.comparing import comparison
    from uadtool.comparing.gates import Gate, decide
    from uadtool.comparing.junit import as_junit
    from uadtool.comparing.page.page import as_html
    from uadtool.comparing.table import as_csv, as_table
    from uadtool.errors import UadtoolError

    comparison.RESAMPLES = 10
    gates = [Gate.parse("image_auroc>=-0.01"), Gate.parse("file_size<=0.3x")]

    def parse(path: str) -> None:
        models = comparison.join([path])
        with contextlib.suppress(UadtoolError):
            comparison.changed(models)
        record = comparison.set_side_by_side(models)
        verdicts = decide(gates, record)
        as_junit(verdicts)
        as_table(record, True), as_table(record), as_csv(record)
        as_html(models, record, [verdict for verdict in verdicts if not verdict.error])

    return file_parser(parse, "scores.jsonl")(folder)


def _results_seeds(folder: Path) -> Iterable[bytes]:
    """Scores of two models, one of them in two shards, and a bench file."""
    sys.path.insert(0, str(TESTS))
    from records import bench_record, lines, model, score_records

    def shard(path: str, images: slice) -> List[Dict[str, Any]]:
        run, *scored, summary = score_records(path, noise=len(path))
        run["model"]["quantization"] = {"method": "ptq", "calibration": "mse", "source": "good", "scope": "all",
                                        "float_layers": 1}
        pixels = {"bolt": {"regions": 0, "bins": _bins([[5], [4], [0], [0]])}}
        return [run, *scored[images], {**summary, "pixels": pixels}]

    parts = ("a.onnx", slice(0, 70, 9)), ("b.onnx", slice(0, 40, 9)), ("b.onnx", slice(5, 79, 9))
    scores = "".join(lines(shard(*part)) for part in parts)
    bench = json.dumps(bench_record(model("a.onnx"), model("b.onnx")))
    return [scores.encode(), bench.encode(), (lines(shard(*parts[0])) + bench).encode()]


def _bins(lists: List[List[int]]) -> str:
    return base64.b64encode(zlib.compress(json.dumps(lists).encode())).decode()


def _pixels(folder: Path) -> Parse:
    """The text within the base64 within a summary."""
    from uadtool.errors import UadtoolError
    from uadtool.scoring.evaluation import Evaluation

    def parse(data: bytes) -> None:
        evaluation = Evaluation()
        evaluation.add("a", True, 1.0, 1.0, True)
        regions, _, text = data.partition(b"\n")
        bins = base64.b64encode(zlib.compress(text)).decode()
        try:
            evaluation.merge_pixels({"a": {"regions": len(regions), "bins": bins}})
        except ValueError as error:  # shards.py makes it one
            raise UadtoolError(str(error)) from error
        evaluation.figures()

    return parse


def _pixels_seeds(folder: Path) -> Iterable[bytes]:
    return [b"xx\n" + json.dumps([[5, 1, 7], [4, 2, 0], [0, 1, 4], [0, 9, 99]]).encode()]


def _gates(folder: Path) -> Parse:
    from uadtool.comparing.gates import Gate, decide
    from uadtool.comparing.junit import as_junit
    from uadtool.errors import UadtoolError

    record = {"models": [{"label": "a"}, {"label": "b"}],
              "rows": [{"metric": "image_auroc", "values": [0.9, 0.8]}, {"metric": "recall", "values": [None, 0.0]}]}

    def parse(data: bytes) -> None:
        try:
            gate = Gate.parse(data.decode("utf-8", "surrogateescape"))
        except ValueError as error:  # the command makes it wrong usage
            raise UadtoolError("usage") from error
        as_junit(decide([gate], record))

    return parse


def _gates_seeds(folder: Path) -> Iterable[bytes]:
    return [b"image_auroc>=-0.01", b"recall < 1e-3x", b"image_auroc.a b<=+.5", b"recall>1e308"]


# Images


def _image(folder: Path) -> Parse:
    from uadtool.data.images import image_size, read_image, read_mask

    def parse(path: str) -> None:
        image_size(path)
        read_mask(path, (8, 8))
        read_image(path, (8, 8))

    return file_parser(parse, "image")(folder)


def _image_seeds(folder: Path) -> Iterable[bytes]:
    sys.path.insert(0, str(TESTS))
    from corpus import corpus

    made = folder / "corpus"
    made.mkdir()
    for item in corpus():
        if item.read and item.name.partition(b"-")[0].partition(b".")[0] not in (b"wide", b"tall"):
            item.make(item.path(made))
    contents = {path.read_bytes() for path in made.iterdir() if path.is_file()}
    return sorted((content for content in contents if len(content) < 20_000), key=len)


def _frames(folder: Path) -> Parse:
    """Streams, in pieces of a length that their first byte says."""
    from uadtool.data.frame_stream import split, split_raw

    def parse(data: bytes) -> None:
        length = 1 + (data[0] if data else 0)
        for splitting in (split, lambda read: split_raw(read, (2, 3))):
            pieces = iter([data[at:at + length] for at in range(0, len(data), length)])
            taken = sum(len(frame.content) for frame in splitting(lambda pieces=pieces: next(pieces, b"")))
            assert taken <= 2 * len(data)  # raw frames have headers

    return parse


def _frames_seeds(folder: Path) -> Iterable[bytes]:
    sys.path.insert(0, str(TESTS))
    from corpus import encoded

    jpeg, png = encoded("JPEG", quality=20), encoded("PNG")
    holding = encoded("JPEG", exif=b"Exif\0\0" + jpeg)
    return [b"\x40" + jpeg + png + jpeg[:400] + jpeg, b"\x07" + holding + png[:900] + png]


TARGETS = {
    "manifest-csv": Target(_manifest("m.csv"), _csv_seeds),
    "manifest-jsonl": Target(_manifest("m.jsonl"), _jsonl_seeds),
    "metadata": Target(_metadata, _metadata_seeds),
    "onnx": Target(imported("uadtool.runtimes.onnx_file", "read_metadata", "model.onnx"), _onnx_seeds),
    "safetensors": Target(imported("uadtool.lab.models", "read_metadata", "model.safetensors"), _safetensors_seeds),
    "checkpoint": Target(_checkpoint, _checkpoint_seeds, 0.2),
    "model": Target(_model, _model_seeds, 0.02),
    "ranges": Target(imported("uadtool.lab.quantization.ranges", "RangesFile.read", "ranges.json"), _ranges_seeds),
    "engine": Target(_engine, _engine_seeds),
    "results": Target(_results, _results_seeds, 0.2),
    "pixels": Target(_pixels, _pixels_seeds, 0.5),
    "gates": Target(_gates, _gates_seeds),
    "image": Target(_image, _image_seeds, 0.2),
    "frames": Target(_frames, _frames_seeds),
}

# Mutations


def mutate_json(data: bytes, rng: random.Random) -> bytes:
    """Replace, remove or repeat a random value in a random JSON object of the text."""
    lines = data.split(b"\n") if b"\n{" in data else [data]
    index = rng.randrange(len(lines))
    start = lines[index].find(b"{")
    try:
        value, end = json.JSONDecoder().raw_decode(lines[index][start:].decode())
    except (ValueError, RecursionError):
        return data
    before, after = lines[index][:start], lines[index][start:].decode()[end:].encode()
    lines[index] = before + json.dumps(_changed(value, rng)).encode() + after
    if rng.random() < 0.2:
        lines.insert(rng.randrange(len(lines) + 1), rng.choice(lines))
    return b"\n".join(lines)


STRANGE = [
    None, True, 0, -1, 1, 3, 2**31, 2**63, 10**400, 0.5, -1e308, float("nan"), float("inf"), "", "good", "\0", "\ud800",
    "<b>", "../../x", "\x1b[31m\n", "x" * 3000, [], {}, [[]], [0], [None], {"": {}}, [32, 32], "uadtool.score/1",
    "summary",
]


def _changed(value: Any, rng: random.Random) -> Any:
    if rng.random() < 0.8 and isinstance(value, (dict, list)) and value:
        key = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
        new = _changed(value[key], rng)
        items = dict(value) if isinstance(value, dict) else list(value)
        chance = rng.random()
        if chance < 0.1:
            del items[key]
        elif chance < 0.2 and isinstance(items, list):
            items.insert(key, new)
        elif chance < 0.2:
            items[rng.choice(["", "a", "class", "label", "path", "pooled", "error", str(key)])] = new
        else:
            items[key] = new
        return items
    if rng.random() < 0.05:
        for _ in range(rng.choice([3, 900, 3000])):
            value = [value] if rng.random() < 0.9 else {"a": value}
        return value if _depth_can_be_written(value) else []
    return rng.choice(STRANGE)


def _depth_can_be_written(value: Any) -> bool:
    try:
        json.dumps(value)
    except RecursionError:
        return False
    return True


def check(parse: Parse, data: bytes) -> None:
    """Require that the input is parsed, or refused with a message, in time."""
    from uadtool.errors import UadtoolError

    began, message = time.process_time(), "parsed"
    try:
        parse(data)
    except UadtoolError as error:
        message = str(error)
    assert message
    assert time.process_time() - began < SECONDS


# The fuzzer


def fuzz(name: str, folder: Path, arguments: List[str]) -> None:
    """Run one target in this process with libFuzzer's arguments; does not return."""
    import atheris

    with atheris.instrument_imports(include=["uadtool"]):
        parse = TARGETS[name].prepare(folder)

    def mutator(data: bytes, longest: int, seed: int) -> bytes:
        rng = random.Random(seed)
        mutated = mutate_json(data, rng) if rng.random() < 0.5 else data
        return (atheris.Mutate(data, longest) if mutated == data else mutated)[:longest]

    seeds = list(TARGETS[name].seeds(folder))
    for number, seed in enumerate(seeds):
        Path(arguments[-1], f"seed-{number}").write_bytes(seed)
    structured = {"custom_mutator": mutator} if any(b"{" in seed for seed in seeds) else {}
    atheris.Setup([sys.argv[0], *arguments], lambda data: check(parse, data), **structured)
    atheris.Fuzz()


def run(name: str, runs: int, folder: Path) -> Dict[str, Any]:
    """Run one target in its own process and return the outcome."""
    corpus = folder / name
    corpus.mkdir(parents=True, exist_ok=True)
    options = [f"-runs={runs}", f"-timeout={HANGING}", f"-rss_limit_mb={MEMORY}", f"-artifact_prefix={folder / name}-",
               "-max_len=20000", "-len_control=0", "-print_final_stats=1"]
    began = time.monotonic()
    log = folder / f"{name}.log"
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # a disk is slow to write a file anew
    with log.open("wb") as output, tempfile.TemporaryDirectory(prefix="uadtool-fuzz-", dir=memory) as scratch:
        process = subprocess.Popen([sys.executable, __file__, "--target", name, scratch, *options, str(corpus)],
                                   stdout=output, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"})
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    done = re.search(rb"number_of_executed_units: (\d+)", log.read_bytes())
    return {"inputs": int(done[1]) if done else 0, "seconds": round(time.monotonic() - began),
            "memory": usage.ru_maxrss >> 10, "failed": process.returncode != 0, "log": log}


def main(runs: int, names: List[str]) -> int:
    folder = Path("build/fuzz").absolute()
    total, failed = 0, []
    print("| target | inputs | seconds | peak MiB | |\n| --- | --- | --- | --- | --- |", flush=True)
    for name in names or TARGETS:
        found = run(name, max(1, int(runs * TARGETS[name].share)), folder)
        total += found["inputs"]
        failed += [name] * found["failed"]
        print(f"| {name} | {found['inputs']:,} | {found['seconds']} | {found['memory']} | "
              f"{'BROKEN: see ' + str(found['log']) if found['failed'] else 'ok'} |", flush=True)
    print(f"| all | {total:,} | | | {len(failed)} broken |")
    return 1 if failed else 0


if __name__ == "__main__":
    if sys.argv[1] == "--target":
        fuzz(sys.argv[2], Path(sys.argv[3]), sys.argv[4:])
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
