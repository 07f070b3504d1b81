"""Power, clocks and temperatures of a Jetson or a PC, as sysfs reports them."""

import math
import re
import threading
import time
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Tuple

INTERVAL = 0.05
"""Seconds between two readings of the rails. An INA3221 updates its three channels about every 10 ms."""

TOTAL_RAILS = ("VIN", "VDD_IN", "POM_5V_IN")
"""Names of the rail that feeds the whole module. On Jetsons without it, the rails add up to the total
(https://forums.developer.nvidia.com/t/xavier-jetson-total-power-consumption/81016)."""

FED_BY_OTHERS = ("VDDQ_VDD2_1V8AO",)
"""Rails that do not count for the total: on an AGX Orin, VIN_SYS_5V0 feeds this rail of the memory."""

THROTTLING = ("sys/class/hwmon/hwmon*/oc*_event_cnt",
              "sys/devices/system/cpu/cpu*/thermal_throttle/core_throttle_count")
"""Event counters: over-current throttling of a Jetson (JetPack 5 and 6), thermal throttling of an x86 core."""


class Sensors:
    """The sensors of the machine whose file system begins at ``root``.

    Sensors that are missing or unreadable are left out: every method then returns fewer entries, or None.
    """

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root
        self._rails = dict(self._find_rails())
        self._packages = [path.parent for path in self._glob("sys/class/powercap/intel-rapl:*/energy_uj")
                          if (_text(path.parent / "name") or "").startswith("package")]

    @property
    def has_rails(self) -> bool:
        """Whether the machine has a power monitor."""
        return bool(self._rails)

    def rails(self) -> Dict[str, float]:
        """The power of each rail now, in watts."""
        factors = {name: [_number(path, 1000) for path in paths] for name, paths in self._rails.items()}
        return {name: math.prod(factor for factor in values if factor is not None)
                for name, values in factors.items() if None not in values}

    def energy(self) -> Dict[str, Tuple[float, float]]:
        """The energy counter of each processor package (RAPL): joules now, and the value at which it wraps around."""
        counters = {}
        for path in self._packages:
            now, wraps = _number(path / "energy_uj", 1e6), _number(path / "max_energy_range_uj", 1e6)
            if now is not None and wraps:
                counters[str(_text(path / "name"))] = (now, wraps)
        return counters

    def state(self) -> Dict[str, Any]:
        """Power mode, clocks (MHz) and temperatures (degrees Celsius) now; ``throttling`` counts events since boot."""
        clocks = {path.parent.parent.name: _number(path, 1000)
                  for path in self._glob("sys/devices/system/cpu/cpu[0-9]*/cpufreq/scaling_cur_freq")}
        for path in self._glob("sys/class/devfreq/*/cur_freq"):
            if re.search(r"gpu(?!-nvd)|g[pva]\d+b", f"{path.parent.name} {_text(path.parent / 'device/of_node/name')}"):
                clocks["gpu"] = _number(path, 1e6)
        zones = {_text(path.parent / "type") or path.parent.name: _number(path, 1000)
                 for path in self._glob("sys/class/thermal/thermal_zone*/temp")}
        counts = [_number(path) for pattern in THROTTLING for path in self._glob(pattern)]
        return _known({
            "power_mode": self._power_mode(), "clocks_mhz": _known(clocks), "temperatures_c": _known(zones),
            "throttling": int(sum(count for count in counts if count is not None)) if counts else None})

    def _find_rails(self) -> Iterator[Tuple[str, List[Path]]]:
        """The name of each rail of the power monitors, and the files whose product is its power: mV and mA, or mW.

        An INA3221 has three rails. The INA238 of a Thor has one, the input of the whole board
        (https://docs.kernel.org/hwmon/ina238.html).
        """
        for name in self._glob("sys/class/hwmon/hwmon*/name"):  # JetPack 5 and later
            if _text(name) == "ina238":
                yield "VIN", [name.parent / "in1_input", name.parent / "curr1_input"]
            if _text(name) != "ina3221":
                continue
            for label in sorted(name.parent.glob("in[1-3]_label")):
                channel, rail = label.name[2], _text(label)
                if rail and rail != "NC":  # not connected
                    yield rail, [name.parent / f"in{channel}_input", name.parent / f"curr{channel}_input"]
        for label in self._glob("sys/bus/i2c/drivers/ina3221x/*/iio:device*/rail_name_*"):  # JetPack 4
            rail = _text(label)
            if rail and rail != "NC":
                yield rail, [label.parent / f"in_power{label.name[-1]}_input"]

    def _power_mode(self) -> Optional[str]:
        """The power mode as ``nvpmodel -q`` reports it, from the files that it reads."""
        status = _text(self._root / "var/lib/nvpmodel/status") or ""
        modes = _text(self._root / "etc/nvpmodel.conf") or ""
        number = re.search(r"pmode:(\d+)", status)
        if not number:
            return None
        name = re.search(rf"POWER_MODEL\s+ID={int(number[1])}\s+NAME=(\S+)", modes)
        return name[1] if name else str(int(number[1]))

    def _glob(self, pattern: str) -> List[Path]:
        return sorted(self._root.glob(pattern))


class PowerMeter:
    """Measures the energy of a ``with`` block: reads rails in a thread of its own, and counters at both ends.

    After the block, ``joules`` is its energy by rail or package, and ``seconds`` its duration.
    """

    def __init__(self, sensors: Sensors) -> None:
        self._sensors = sensors
        self._done = threading.Event()
        self.joules: Dict[str, float] = {}
        self.seconds = 0.0

    def __enter__(self) -> "PowerMeter":
        self._counters = self._sensors.energy()
        self._began = time.perf_counter()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self.seconds = time.perf_counter() - self._began
        for name, (after, wraps) in self._sensors.energy().items():
            if name in self._counters:
                self.joules[name] = (after - self._counters[name][0]) % wraps

    def _sample(self) -> None:
        """Each reading counts for the time since the previous one. A rail that does not answer keeps its last value."""
        last, watts = self._began, self._sensors.rails()
        ended = not self._sensors.has_rails
        while not ended:
            ended = self._done.wait(INTERVAL)
            now = time.perf_counter()
            watts.update(self._sensors.rails())
            for name, value in watts.items():
                self.joules[name] = self.joules.get(name, 0.0) + value * (now - last)
            last = now


def total(by_rail: Dict[str, float]) -> Optional[float]:
    """The figure of the whole board from the figures of its rails; None without rails."""
    for name in TOTAL_RAILS:
        if name in by_rail:
            return by_rail[name]
    return sum(value for name, value in by_rail.items() if name not in FED_BY_OTHERS) if by_rail else None


def _text(path: Path) -> Optional[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip("\0\n ")
    except OSError:  # drivers also answer so while their device sleeps
        return None


def _number(path: Path, divisor: float = 1) -> Optional[float]:
    try:
        number = float(_text(path) or "") / divisor
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _known(values: Dict[str, Any]) -> Dict[str, Any]:
    return {name: value for name, value in values.items() if value not in (None, {})}
