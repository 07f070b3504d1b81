"""Sensors, with the files of several machines laid out in a folder."""

import json
import time

import pytest
from conftest import validate

from uadtool.benchmarking.bench import Settings, bench
from uadtool.benchmarking.sensors import PowerMeter, Sensors, total
from uadtool.comparing.comparison import compare

NVPMODEL = "< POWER_MODEL ID=0 NAME=15W_2CORE >\nCPU_ONLINE CORE_0 1\n< POWER_MODEL ID=8 NAME=20W_6CORE >\n"

XAVIER_JETPACK_5 = {
    "sys/class/hwmon/hwmon0/name": "soctherm_oc",
    "sys/class/hwmon/hwmon0/oc1_event_cnt": 2,
    "sys/class/hwmon/hwmon0/oc3_event_cnt": 1,
    "sys/class/hwmon/hwmon3/name": "ina3221",
    "sys/class/hwmon/hwmon3/in1_label": "VDD_IN",
    "sys/class/hwmon/hwmon3/in1_input": 5000,
    "sys/class/hwmon/hwmon3/curr1_input": 1600,
    "sys/class/hwmon/hwmon3/in2_label": "VDD_CPU_GPU_CV",
    "sys/class/hwmon/hwmon3/in2_input": 5000,
    "sys/class/hwmon/hwmon3/curr2_input": 500,
    "sys/class/hwmon/hwmon3/in3_label": "NC",
    "sys/class/hwmon/hwmon3/in3_input": 5000,
    "sys/class/hwmon/hwmon3/curr3_input": 9,
    "sys/class/hwmon/hwmon3/in7_label": "sum of shunt voltages",
    "sys/class/hwmon/hwmon3/in7_input": 12,
    "sys/class/devfreq/17000000.gv11b/cur_freq": 1109250000,
    "sys/class/devfreq/15340000.vic/cur_freq": 601600000,
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": 1420800,
    "sys/class/thermal/thermal_zone0/type": "CPU-therm",
    "sys/class/thermal/thermal_zone0/temp": 41500,
    "var/lib/nvpmodel/status": "pmode:0008 fmode:fanNull",
    "etc/nvpmodel.conf": NVPMODEL,
}
ORIN_JETPACK_6 = {
    "sys/class/hwmon/hwmon1/name": "ina3221",
    "sys/class/hwmon/hwmon1/in1_label": "VDD_GPU_SOC",
    "sys/class/hwmon/hwmon1/in1_input": 19000,
    "sys/class/hwmon/hwmon1/curr1_input": 200,
    "sys/class/hwmon/hwmon1/in2_label": "VDD_CPU_CV",
    "sys/class/hwmon/hwmon1/in2_input": 19000,
    "sys/class/hwmon/hwmon1/curr2_input": 100,
    "sys/class/hwmon/hwmon2/name": "ina3221",
    "sys/class/hwmon/hwmon2/in2_label": "VDDQ_VDD2_1V8AO",
    "sys/class/hwmon/hwmon2/in2_input": 5000,
    "sys/class/hwmon/hwmon2/curr2_input": 200,
    "sys/class/devfreq/17000000.bus/cur_freq": 918000000,
    "sys/class/devfreq/17000000.bus/device/of_node/name": "gpu\0",
}
THOR_JETPACK_7 = {
    "sys/class/hwmon/hwmon4/name": "ina3221",
    "sys/class/hwmon/hwmon4/in1_label": "VDD_GPU",
    "sys/class/hwmon/hwmon4/in1_input": 20000,
    "sys/class/hwmon/hwmon4/curr1_input": 500,
    "sys/class/hwmon/hwmon5/name": "ina238",
    "sys/class/hwmon/hwmon5/in0_input": 1,
    "sys/class/hwmon/hwmon5/in1_input": 20000,
    "sys/class/hwmon/hwmon5/curr1_input": 1500,
    "sys/class/hwmon/hwmon5/power1_input": 30000000,
    "sys/class/devfreq/gpu-gpc-0/cur_freq": 1575000000,
    "sys/class/devfreq/gpu-nvd-0/cur_freq": 315000000,
}
NANO_JETPACK_4 = {
    "sys/bus/i2c/drivers/ina3221x/6-0040/iio:device0/rail_name_0": "POM_5V_IN",
    "sys/bus/i2c/drivers/ina3221x/6-0040/iio:device0/in_power0_input": 2400,
    "sys/bus/i2c/drivers/ina3221x/6-0040/iio:device0/rail_name_1": "POM_5V_GPU",
    "sys/bus/i2c/drivers/ina3221x/6-0040/iio:device0/in_power1_input": 300,
    "sys/class/devfreq/57000000.gpu/cur_freq": 921600000,
}
WORKSTATION = {
    "sys/class/powercap/intel-rapl:0/name": "package-0",
    "sys/class/powercap/intel-rapl:0/energy_uj": 262143000000,
    "sys/class/powercap/intel-rapl:0/max_energy_range_uj": 262143328850,
    "sys/class/powercap/intel-rapl:0:0/name": "core",
    "sys/class/powercap/intel-rapl:0:0/energy_uj": 1,
    "sys/class/powercap/intel-rapl:1/name": "psys",
    "sys/class/powercap/intel-rapl:1/energy_uj": 1,
    "sys/devices/system/cpu/cpu0/thermal_throttle/core_throttle_count": 7,
}


@pytest.fixture
def machine(tmp_path):
    def machine(files):
        for name, content in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(f"{content}\n")
        return Sensors(tmp_path)

    return machine


@pytest.mark.parametrize(("files", "rails", "watts"), [
    (XAVIER_JETPACK_5, {"VDD_IN": 8.0, "VDD_CPU_GPU_CV": 2.5}, 8.0),
    (ORIN_JETPACK_6, {"VDD_GPU_SOC": 3.8, "VDD_CPU_CV": 1.9, "VDDQ_VDD2_1V8AO": 1.0}, 5.7),
    (THOR_JETPACK_7, {"VDD_GPU": 10.0, "VIN": 30.0}, 30.0),
    (NANO_JETPACK_4, {"POM_5V_IN": 2.4, "POM_5V_GPU": 0.3}, 2.4),
    (WORKSTATION, {}, None),
])
def test_rails_and_the_power_of_the_whole_board(machine, files, rails, watts):
    found = machine(files).rails()
    assert found == pytest.approx(rails)
    assert total(found) == (watts and pytest.approx(watts))


@pytest.mark.parametrize(("files", "state"), [
    (XAVIER_JETPACK_5, {"power_mode": "20W_6CORE", "clocks_mhz": {"cpu0": 1420.8, "gpu": 1109.25},
                        "temperatures_c": {"CPU-therm": 41.5}, "throttling": 3}),
    (ORIN_JETPACK_6, {"clocks_mhz": {"gpu": 918.0}}),
    (THOR_JETPACK_7, {"clocks_mhz": {"gpu": 1575.0}}),
    (NANO_JETPACK_4, {"clocks_mhz": {"gpu": 921.6}}),
    (WORKSTATION, {"throttling": 7}),
    ({"var/lib/nvpmodel/status": "pmode:0003"}, {"power_mode": "3"}),
    ({}, {}),
])
def test_the_state_of_a_machine(machine, files, state):
    assert machine(files).state() == state


def test_unreadable_sensors_are_left_out(machine, tmp_path):
    sensors = machine(XAVIER_JETPACK_5)
    (tmp_path / "sys/class/hwmon/hwmon3/curr1_input").write_text("n/a\n")
    (tmp_path / "sys/class/hwmon/hwmon3/curr2_input").unlink()
    assert sensors.rails() == {}
    (tmp_path / "sys/class/thermal/thermal_zone0/temp").unlink()
    (tmp_path / "sys/class/thermal/thermal_zone0/temp").mkdir()  # unreadable, as with a failing driver
    assert "temperatures_c" not in sensors.state()


def test_energy_is_power_times_time(machine, tmp_path):
    sensors = machine(XAVIER_JETPACK_5)
    with PowerMeter(sensors) as meter:
        time.sleep(0.2)
    assert meter.seconds >= 0.2
    assert meter.joules == pytest.approx({"VDD_IN": 8.0 * meter.seconds, "VDD_CPU_GPU_CV": 2.5 * meter.seconds},
                                         rel=0.05)


def test_a_counter_of_energy_that_wraps_around(machine, tmp_path):
    with PowerMeter(machine(WORKSTATION)) as meter:
        (tmp_path / "sys/class/powercap/intel-rapl:0/energy_uj").write_text("1000000\n")
    assert meter.joules == pytest.approx({"package-0": 1.32885})


def test_without_sensors_there_is_no_energy(machine):
    with PowerMeter(machine({})) as meter:
        pass
    assert (meter.joules, total(meter.joules)) == ({}, None)


def test_bench_reports_the_energy_of_an_image(machine, detector, tmp_path):
    record = bench([str(detector)], Settings(2, 0.2, warmup=0, threads=1), machine(XAVIER_JETPACK_5))
    validate(record, "bench")
    assert record["machine"]["before"]["power_mode"] == "20W_6CORE"
    assert record["machine"]["idle_watts"] == pytest.approx({"VDD_IN": 8, "VDD_CPU_GPU_CV": 2.5, "total": 8}, rel=0.05)
    (model,) = record["models"]
    for load in model["throughput"]:
        assert load["watts"]["total"] == pytest.approx(8, rel=0.05)
        rate = load["images_per_second"]
        per_image = 8000 / rate["max"], 8000 / rate["min"]
        assert 0.9 * per_image[0] < load["millijoules_per_image"] < 1.3 * per_image[1]
    (tmp_path / "bench.json").write_text(json.dumps(record))
    (row,) = [row for row in compare([str(tmp_path / "bench.json")])["rows"] if row["metric"] == "energy"]
    assert row["values"] == [min(load["millijoules_per_image"] for load in model["throughput"])]


def test_bench_without_sensors_reports_no_energy(detector, machine):
    record = bench([str(detector)], Settings(1, 0.01, warmup=0, threads=1), machine({}))
    validate(record, "bench")
    assert record["machine"] == {"before": {}, "after": {}}
    assert all("watts" not in load for load in record["models"][0]["throughput"])
