"""Records that ``score`` and ``bench`` would print about models that do not exist."""

import json
from typing import Any, Dict, List, Optional, Sequence

import numpy as np

from uadtool.files import list_digest
from uadtool.scoring.metrics import auroc

HOST = {"system": "Linux", "machine": "aarch64", "cpu": "some", "cores": 4, "python": "3.8.10"}
RUNTIME = {"name": "onnxruntime", "version": "1.23.0", "threads": 2, "streams": 2}


def model(path: str, digest: str = "") -> Dict[str, Any]:
    return {"path": path, "digest": list_digest([digest or path]), "method": "stfpm", "teacher": "resnet18",
            "precision": "fp32", "target": "onnxruntime", "classes": ["bolt", "nut"], "image_size": [256, 256]}


def score_records(path: str, digest: str = "", noise: float = 0.0, folder: str = "data") -> List[Dict[str, Any]]:
    """A run over two classes of 40 images; ``noise`` makes the model worse."""
    random = np.random.default_rng(0)
    images: List[Dict[str, Any]] = []
    for name in ("bolt", "nut"):
        for index in range(40):
            score = round(random.normal() + 3 * (index % 2) + noise * random.normal(), 4)
            images.append({
                "type": "image", "path": f"{folder}/{name}/{index:03}.png", "score": score, "raw_score": score,
                "anomalous": score > 2, "nearest_class": name, "class": name,
                "label": "anomalous" if index % 2 else "good", "milliseconds": 3.1})
    images.append({"type": "image", "path": f"{folder}/broken.png", "error": f"{folder}/broken.png is cut short"})

    def area(name: Optional[str]) -> float:
        of = [image for image in images if "score" in image and name in (None, image["class"])]
        return auroc([image["label"] == "anomalous" for image in of], [image["score"] for image in of])

    def above(label: str) -> Dict[str, Any]:
        verdicts = {name: [image["anomalous"] for image in images if image.get("class") == name
                           and image["label"] == label] for name in ("bolt", "nut")}
        shares = {name: sum(found) / len(found) for name, found in verdicts.items()}
        return {"mean": sum(shares.values()) / 2, "pooled": sum(shares.values()) / 2, "per_class": shares}

    per_class = {name: area(name) for name in ("bolt", "nut")}
    figure = {"mean": sum(per_class.values()) / 2, "pooled": area(None), "per_class": per_class}
    summary = {
        "type": "summary", "images": 81, "errors": 1, "anomalous": 40, "seconds": 1.0, "images_per_second": 80.0,
        "metrics": {
            "image_auroc": {**figure, "pooled_raw": 0.7}, "average_precision": figure, "f1_max": figure,
            "false_positive_rate": above("good"), "recall": above("anomalous"), "pixel_auroc": figure, "aupro": figure,
        }}
    run = {"schema": "uadtool.score/1", "type": "run", "tool": "uadtool 0.1.0", "started": "2026-01-01T12:00:00Z",
           "model": model(path, digest), "runtime": RUNTIME, "host": HOST, "threshold": 2.0}
    return [run, *images, summary]


def bench_record(*models: Dict[str, Any], speed: Sequence[float] = (1, 2, 4)) -> Dict[str, Any]:
    def spread(value: float) -> Dict[str, float]:
        return {"median": value, "min": 0.9 * value, "max": 1.1 * value, "n": 3}

    return {
        "schema": "uadtool.bench/1", "tool": "uadtool 0.1.0", "started": "2026-01-01T12:00:00Z", "host": HOST,
        "settings": {"warmup": 3, "repetitions": 3, "duration": 1.0, "threads": 2, "batch_sizes": [1, 8]},
        "machine": {"before": {}, "after": {}},
        "models": [
            {
                "model": of, "runtime": RUNTIME, "file_bytes": int(12e6 / faster), "parameters": 2_800_000,
                "macs": 1_800_000_000, "cold_start_ms": spread(400 / faster), "peak_rss_bytes": 200_000_000,
                "latency_ms": {"p50": 10 / faster, "p90": 11 / faster, "p95": 12 / faster, "p99": 15 / faster,
                               "mean": 10 / faster, "std": 1.0, "min": 9 / faster, "n": 100},
                "throughput": [{"batch_size": 1, "images_per_second": spread(100 * faster)},
                               {"batch_size": 8, "images_per_second": spread(130 * faster)}]}
            for of, faster in zip(models, speed)
        ]}


def lines(records: List[Dict[str, Any]]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)
