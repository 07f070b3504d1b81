"""Drift: images as a whole come to lie farther from their class than before, when a lamp ages or a lens is touched.

A test martingale bets that the next image is farther from its prototype than most before it. While images are
exchangeable with those of training, its expected value stays 1, and the probability that it ever reaches ``LEVEL`` is
at most 1 / ``LEVEL``, however long the run (Ville's inequality). After Vovk et al., "Retrain or not retrain: conformal
test martingales for change-point detection" (COPA 2021).
"""

import math
import os
import random
import time
from bisect import bisect_left, bisect_right, insort
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Mapping, Optional, Sequence

from uadtool import host
from uadtool.errors import UadtoolError
from uadtool.files import file_digest
from uadtool.metadata import Metadata
from uadtool.schemas.json_files import read_json, write_json
from uadtool.schemas.validation import validate
from uadtool.terminal import log

LEVEL = 1000.0
"""The evidence that raises an alarm."""
STAKES = (0.125, 0.25, 0.5, 1.0)
"""A stake e bets 1 + e (1 - 2 p) on a p-value p. So a single image at most doubles the evidence, and some defective
images do not raise the alarm, though they may lie far from good ones. The usual bets, e p^(e - 1), would let them."""
MOST_REFERENCES = 2000
"""Distances of a class that are remembered; of more, a random half goes on."""
SAVED_EVERY = 60.0
"""Seconds after which a state is saved."""
SCHEMA = "uadtool.drift/1"


class Evidence:
    """The capital of bets on a series of p-values. It begins with 1.

    A change may come late, when early bets have lost everything. So a share 1 / (n (n + 1)) of the capital starts with
    the n-th image, and is kept until then.
    """

    def __init__(self, count: int = 0, capital: Sequence[float] = (0.0,) * len(STAKES), since: str = "",
                 rise: float = 0.0) -> None:
        self.count, self.capital = count, list(capital)
        self.since, self.rise = since, rise
        """The image with which the present rise of a middle stake began, and its logarithm."""

    @property
    def value(self) -> float:
        """Expected to be 1 if the p-values are independent and uniform."""
        return sum(self.capital) / len(STAKES) + 1 / (self.count + 1)

    def bet(self, p_value: float, path: str) -> None:
        self.count += 1
        new = 1 / (self.count * (self.count + 1))
        self.capital = [(capital + new) * (1 + stake * (1 - 2 * p_value))
                        for capital, stake in zip(self.capital, STAKES)]
        if self.rise == 0:
            self.since = path
        self.rise = max(0.0, self.rise + math.log(1 + STAKES[-2] * (1 - 2 * p_value)))


class Drift:
    """Watches the class distances of a stream of images.

    A p-value compares an image with good images of training and with all earlier images of its class: with a fixed
    reference, p-values would not be independent, and a long run would raise an alarm. The bets on all images have half
    of the capital, those on the single classes the other half. After an alarm, the images from then on are what is
    usual.

    Args:
        classes: of the model.
        good: distances of good images by class, as far as they are known.
        seed: of the random numbers that break ties between distances; a new one if None.
    """

    def __init__(self, classes: Sequence[str], good: Mapping[str, Sequence[float]], seed: Optional[str] = None) -> None:
        self.watched, self.seed = 0, seed or os.urandom(8).hex()
        self.alarms: List[Dict[str, Any]] = []
        self.save: Callable[[], None] = lambda: None
        """Called about once a minute, for a run may be killed."""
        self._saved = time.monotonic()
        self._references = {name: sorted(good.get(name, ())) for name in classes}
        self._start()

    def _start(self) -> None:
        self._evidence = {name: Evidence() for name in ("", *self._references)}
        self._total = 1.0

    def add(self, path: str, class_name: str, distance: Optional[float]) -> Optional[Dict[str, Any]]:
        """Watch an image; returns the ``drift`` record (schemas/score.json) if it raises the alarm.

        Args:
            distance: the class distance; None of models that do not know it (files before 2026-12).
        """
        if distance is None:
            return None
        if time.monotonic() - self._saved > SAVED_EVERY:
            self._saved = time.monotonic()
            try:
                self.save()
            except UadtoolError as error:  # a full disk, say; the images are still scored, and the end tries again
                log.warning("%s", error)
        p_value = self._p_value(self._references[class_name], distance)
        for name in ("", class_name):
            self._total -= self._share(name)
            self._evidence[name].bet(p_value, path)
            self._total += self._share(name)
        if self._total < LEVEL:
            return None
        worst = max(("", class_name), key=self._share)
        alarm = {"type": "drift", "path": path, "time": host.now_exactly(), "since": self._evidence[worst].since,
                 **({"class": worst} if worst else {}), "evidence": float(f"{self._total:.4g}")}
        log.warning("%s have changed since %s: they lie farther from their class than before; look at light, lens and "
                    "position", f"images of {worst}" if worst else "images", alarm["since"])
        self.alarms.append(alarm)
        self._references = {name: [] for name in self._references}
        self._start()
        return alarm

    def _share(self, name: str) -> float:
        return self._evidence[name].value / (2 * len(self._references) if name else 2)

    def _p_value(self, references: List[float], distance: float) -> float:
        """Uniform in 0..1 if all are exchangeable, since ties are broken at random. The image joins the references."""
        self.watched += 1
        own = random.Random(f"{self.seed} {self.watched}")  # so that a run that goes on is as one without a pause
        lower, upper = bisect_left(references, distance), bisect_right(references, distance)
        p_value = (len(references) - upper + own.random() * (upper - lower + 1)) / (len(references) + 1)
        insort(references, distance)
        if len(references) > MOST_REFERENCES:
            # A random part is as good a reference, and does not depend on the order that the bets have seen.
            references[:] = sorted(own.sample(references, MOST_REFERENCES // 2))
        return p_value

    def to_json(self, model_digest: str) -> Dict[str, Any]:
        """The state as JSON (schemas/drift.json)."""
        return {"schema": SCHEMA, "model_digest": model_digest, "watched": self.watched, "seed": self.seed,
                "references": self._references, "evidence": {name: vars(one) for name, one in self._evidence.items()}}

    def restore(self, state: Mapping[str, Any], model_digest: str, source: str) -> None:
        """Go on from a state that ``to_json`` returned.

        Raises:
            UadtoolError: it is about another model.
        """
        if state["model_digest"] != model_digest or state["references"].keys() != self._references.keys() or (
                state["evidence"].keys() != self._evidence.keys()):
            raise UadtoolError(f"{source} is about another model; give --drift-state another file, or delete this one")
        self.watched, self.seed = state["watched"], state["seed"]
        self._references = {name: sorted(values) for name, values in state["references"].items()}
        self._evidence = {name: Evidence(**fields) for name, fields in state["evidence"].items()}
        self._total = sum(map(self._share, self._evidence))


@contextmanager
def watch(metadata: Metadata, model: str, state: Optional[str] = None) -> Iterator[Drift]:
    """Watch images that a ``model`` file scores. A file keeps the ``state``, from earlier runs on and for later ones.

    Raises:
        UadtoolError: the file cannot be read or written, or is about another model.
    """
    drift = Drift(metadata.classes, metadata.good_distances)
    if not state:
        yield drift
        return
    digest = file_digest(model)
    if Path(state).exists():
        found = read_json(state, SCHEMA)
        try:
            validate(found, "drift", strict=True)
        except ValueError as error:
            raise UadtoolError(f"{state} is not the state of a watch: {error}; delete it") from error
        drift.restore(found, digest, state)
    drift.save = lambda: write_json(drift.to_json(digest), state)
    try:
        yield drift
    finally:
        drift.save()
