"""Require every name of TensorRT's API that uadtool uses in a TensorRT that is installed, or in its type stubs.

usage: python check_tensorrt_api.py MODULE        imports it, in the interpreter and with the libraries it needs
       python check_tensorrt_api.py STUBS.pyi...  reads the stubs of a version that cannot be installed here

Standard library alone, Python 3.8: so it runs where TensorRT 8.5 does. No GPU is needed.
"""

import ast
import importlib
import re
import sys
from pathlib import Path
from typing import Iterator, List, Set, Tuple

PACKAGE = Path(__file__).parents[2] / "uadtool"
SOURCES = [*sorted((PACKAGE / "tensorrt").glob("*.py")), PACKAGE / "runtimes" / "tensorrt.py"]
CLASSES = {"builder": "Builder", "network": "INetworkDefinition", "parser": "OnnxParser", "config": "IBuilderConfig",
           "profile": "IOptimizationProfile", "layer": "ILayer",
           "error": "ParserError", "[runtime]": "Runtime",
           "[engine]": "ICudaEngine", "[context]": "IExecutionContext", "[inspector]": "EngineInspector"}
"""Class of what the variables and attributes of these names hold in the sources, and entries (in brackets)."""
BY_NAME = {"IProfiler.report_layer_time", "ILogger.log",
           "PreviewFeature.DISABLE_EXTERNAL_TACTIC_SOURCES_FOR_CORE_0805",
           "NetworkDefinitionCreationFlag.STRONGLY_TYPED", "NetworkDefinitionCreationFlag.EXPLICIT_BATCH",
           *(f"DataType.{name}" for name in ("UINT8", "INT32", "FLOAT"))}
"""Used, too, but as strings, or overridden."""
ONLY_IN = {
    "NetworkDefinitionCreationFlag.EXPLICIT_BATCH": lambda version, rtx: version < (10, 0) and not rtx,
    "NetworkDefinitionCreationFlag.STRONGLY_TYPED": lambda version, rtx: (10, 0) <= version < (11, 0) and not rtx,
    "BuilderFlag.OBEY_PRECISION_CONSTRAINTS": lambda version, rtx: version < (10, 0) and not rtx,
    "ILayer.precision": lambda version, rtx: version < (10, 0) and not rtx,
    "ILayer.set_output_type": lambda version, rtx: version < (10, 0) and not rtx,
    **dict.fromkeys(("IBuilderConfig.set_preview_feature", "IBuilderConfig.set_tactic_sources", "TacticSource.CUBLAS",
                     "IBuilderConfig.get_tactic_sources", "TacticSource.CUBLAS_LT", "TacticSource.CUDNN",
                     "PreviewFeature.DISABLE_EXTERNAL_TACTIC_SOURCES_FOR_CORE_0805"),
                    lambda version, rtx: version < (10, 0) and not rtx),
    "BuilderFlag.FP16": lambda version, rtx: version < (11, 0) and not rtx,
    "BuilderFlag.INT8": lambda version, rtx: version < (11, 0) and not rtx,
    "ParserError.node_name": lambda version, rtx: version >= (10, 0) or rtx,
    "ParserError.node_operator": lambda version, rtx: version >= (10, 0) or rtx,
    "ComputeCapability": lambda version, rtx: rtx,
    "IBuilderConfig.num_compute_capabilities": lambda version, rtx: rtx,
    "IBuilderConfig.set_compute_capability": lambda version, rtx: rtx,
    "DeviceType.DLA": lambda version, rtx: not rtx,
    "Builder.num_DLA_cores": lambda version, rtx: not rtx,
    "IBuilderConfig.DLA_core": lambda version, rtx: not rtx,
    "IBuilderConfig.can_run_on_DLA": lambda version, rtx: not rtx,
    "BuilderFlag.GPU_FALLBACK": lambda version, rtx: not rtx,
}
"""Where the sources use a name that not all versions have; they ask for the version, or for the name, first."""

CLASS = re.compile(r"class (\w+)(?:\((.*)\))?:")
MEMBER = re.compile(r"    (?:def (\w+)\(|(\w+) *[:=])")
"""Lines of type stubs; members of nested classes are further in."""


def used() -> Set[str]:
    """``Class.member`` or ``Name`` of all that the sources use."""
    return BY_NAME.union(*(set(_of_source(ast.parse(path.read_text(encoding="utf-8")))) for path in SOURCES))


def _of_source(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute):
            continue
        owner = node.value.id if isinstance(node.value, ast.Name) else getattr(node.value, "attr", None)
        if isinstance(node.value, ast.Subscript):
            index = getattr(node.value.slice, "value", None)
            owner = f"[{getattr(index, 'value', index)}]"  # before Python 3.9 another node lies between
        if owner == "trt":
            yield node.attr
        elif owner in CLASSES and not node.attr.startswith("__"):
            yield f"{CLASSES[owner]}.{node.attr}"
        elif owner != "__version__" and getattr(getattr(node.value, "value", None), "id", None) == "trt":
            yield f"{owner}.{node.attr}"


def of_module(name: str) -> Tuple[Set[str], str, bool]:
    """All the names that a module has, its version, and whether it is TensorRT-RTX."""
    module = importlib.import_module(name)
    found = set(dir(module))
    for owner in list(found):
        found |= {f"{owner}.{member}" for member in dir(getattr(module, owner))}
    return found, module.__version__, name == "tensorrt_rtx"


def of_stubs(paths: List[str]) -> Tuple[Set[str], str, bool]:
    """The same of what type stubs describe; the version is that of the package that has them, of the same number.

    Read line by line: those of 10.13 are no valid Python (a parameter without a default follows one with).
    """
    found, bases, owner = {"__version__", "__name__"}, {}, ""
    for path in paths:
        for line in Path(path).read_text(encoding="utf-8").splitlines():
            of_class, of_member = CLASS.match(line), MEMBER.match(line)
            if of_class:
                owner = of_class[1]
                bases[owner] = re.findall(r"\w+", of_class[2] or "")
                found.add(owner)
            elif of_member and owner:
                found.add(f"{owner}.{of_member[1] or of_member[2]}")
            elif line and not line[0].isspace():
                owner = ""
    for name, parents in bases.items():
        for parent in parents:
            found |= {f"{name}.{one.partition('.')[2]}" for one in list(found) if one.startswith(f"{parent}.")}
    (info,) = Path(paths[0]).parents[1].glob("tensorrt_stubs-*.dist-info")
    return found, info.name.split("-")[1][:-len(".dist")], False


def main(arguments: List[str]) -> None:
    there, version, rtx = of_stubs(arguments) if arguments[0].endswith(".pyi") else of_module(arguments[0])
    numbers = tuple(int(part) for part in version.split(".")[:2])
    wanted = {name for name in used() if ONLY_IN.get(name, lambda *_: True)(numbers, rtx)}
    missing = sorted(wanted - there)
    unknown = sorted(set(ONLY_IN) - used())
    print(f"TensorRT{'-RTX' * rtx} {version}: {len(wanted)} names, "
          + (f"without {', '.join(missing)}" if missing else "all there"))
    if missing or unknown:
        sys.exit(f"no longer used: {', '.join(unknown)}" if unknown else 1)


if __name__ == "__main__":
    main(sys.argv[1:]) if len(sys.argv) > 1 else sys.exit(__doc__)
