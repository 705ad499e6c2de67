from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from edgekit.devices.profiles import GENERIC, AudioHints, CameraHints, Profile, detect, load_profile, profile_names
from edgekit.errors import EdgekitError

pytestmark = pytest.mark.no_runtime


def board(root: Path, *compatible: str) -> Path:
    """A machine with this device tree."""
    (root / "proc" / "device-tree").mkdir(parents=True)
    (root / "proc" / "device-tree" / "compatible").write_bytes("".join(f"{name}\0" for name in compatible).encode())
    return root


def usb(root: Path, vendor: str, product: str) -> Path:
    for number, (one, other) in enumerate([("1d6b", "0002"), (vendor, product)], 1):
        device = root / "sys" / "bus" / "usb" / "devices" / f"{number}-1"
        device.mkdir(parents=True)
        (device / "idVendor").write_text(f"{one}\n")
        (device / "idProduct").write_text(f"{other}\n")
    (root / "sys" / "bus" / "usb" / "devices" / "1-0:1.0").mkdir()  # an interface has no ids
    return root


def zones(root: Path, **degrees: str) -> Path:
    for number, (kind, temp) in enumerate(degrees.items()):
        zone = root / "sys" / "class" / "thermal" / f"thermal_zone{number}"
        zone.mkdir(parents=True)
        (zone / "type").write_text(f"{kind.replace('_', '-') if kind != 'x86_pkg_temp' else kind}\n")
        (zone / "temp").write_text(f"{temp}\n")
    return root


@pytest.mark.parametrize(
    ("compatible", "name"),
    [
        (("raspberrypi,3-model-b", "brcm,bcm2837"), "raspberry-pi-3"),
        (("raspberrypi,3-model-b-plus", "brcm,bcm2837"), "raspberry-pi-3"),
        (("raspberrypi,model-zero-2-w", "brcm,bcm2837"), "raspberry-pi-3"),
        (("raspberrypi,4-model-b", "brcm,bcm2711"), "raspberry-pi-4"),
        (("raspberrypi,400", "brcm,bcm2711"), "raspberry-pi-4"),
        (("raspberrypi,4-compute-module", "brcm,bcm2711"), "raspberry-pi-4"),
        (("raspberrypi,5-model-b", "brcm,bcm2712"), "raspberry-pi-5"),
        (("raspberrypi,5-compute-module", "brcm,bcm2712d0"), "raspberry-pi-5"),
        (("nvidia,p3449-0000-b00+p3448-0000-b00", "nvidia,jetson-nano", "nvidia,tegra210"), "jetson-nano"),
        (("nvidia,p3542-0000+p3448-0003", "nvidia,jetson-nano-2gb", "nvidia,jetson-nano"), "jetson-nano"),
        (("nvidia,p3541-0000", "nvidia,p3450-0000", "nvidia,tegra210"), "jetson-nano"),
        (("nvidia,p3737-0000+p3701-0000", "nvidia,tegra234", "nvidia,tegra23x"), "jetson-orin"),
        (("nvidia,p3768-0000+p3767-0005-super", "nvidia,p3767-0005", "nvidia,tegra234"), "jetson-orin"),
        (("fsl,imx8mq-phanbell", "fsl,imx8mq"), "coral-dev-board"),
        (("google,imx8mq-phanbell", "fsl,imx8mq"), "coral-dev-board"),
        # neither a Jetson Nano's relatives nor an older Pi
        (("nvidia,p2371-2180", "nvidia,tegra210"), GENERIC),
        (("raspberrypi,2-model-b", "brcm,bcm2836"), GENERIC),
        (("fsl,imx8mq-evk", "fsl,imx8mq"), GENERIC),
        ((), GENERIC),
    ],
)  # fmt: skip
def test_detect_by_the_device_tree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compatible: tuple[str, ...], name: str
) -> None:
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert detect(board(tmp_path, *compatible)).name == name


@pytest.mark.parametrize("ids", [("1a6e", "089a"), ("18d1", "9302")])
def test_detect_an_edge_tpu_on_usb_where_no_board_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ids: tuple[str, str]
) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    assert detect(usb(tmp_path / "pc", *ids)).name == "coral-usb"
    assert detect(board(usb(tmp_path / "pi", *ids), "raspberrypi,4-model-b", "brcm,bcm2711")).name == "raspberry-pi-4"


@pytest.mark.parametrize(("machine", "name"), [("x86_64", "x86-64"), ("aarch64", GENERIC), ("riscv64", GENERIC)])
def test_detect_by_the_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, machine: str, name: str) -> None:
    """A machine that tells nothing else: a PC, or a container."""
    monkeypatch.setattr("platform.machine", lambda: machine)
    assert detect(usb(tmp_path, "046d", "0825")).name == name


@pytest.mark.parametrize("name", profile_names())
def test_load_profile(name: str) -> None:
    profile = load_profile(name)
    assert profile.name == name and profile.title
    assert profile.delegates[-1] == "cpu" and set(profile.delegates) <= {"coral", "gpu", "cpu"}
    assert 1 <= profile.threads <= len(os.sched_getaffinity(0))
    assert set(profile.hints) <= {"coral", "gpu", "camera", "microphone"}
    assert set(profile.delegates) - {"cpu"} <= set(profile.hints)


def test_load_profile_knows_the_targets_of_convert() -> None:
    from edgekit.converters.targets import TARGETS

    assert set(TARGETS) - {"coral", "android"} <= set(profile_names())


def test_load_profile_takes_no_more_threads_than_cores() -> None:
    code = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "from edgekit.devices.profiles import load_profile; print(load_profile('jetson-orin').threads)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "1\n"


def test_load_profile_of_another_name_lists_the_names() -> None:
    with pytest.raises(
        EdgekitError, match=r"profile 'rasberry-pi-4': expected coral-dev-board, .* or x86-64"
    ) as caught:
        load_profile("rasberry-pi-4")
    assert caught.value.mend == "did you mean 'raspberry-pi-4'?"


def test_load_profile_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "board.toml"
    path.write_text('title = "ours"\n[camera]\nsize_wh = [1280, 720]\n[audio]\nmicrophone = "hat"\n')
    profile = load_profile(str(path))
    assert profile == Profile(
        name="board", title="ours", camera=CameraHints((1280, 720)), audio=AudioHints("hat")
    ) and profile.delegates == ("cpu",)
    path.write_text('title = "ours"\n[camera]\nsize = [1280, 720]')
    with pytest.raises(EdgekitError, match=r"board.toml line 3: camera: unknown key 'size': .* mean 'size_wh'"):
        load_profile(str(path))
    path.write_text('title = "ours"\n[camera]\nsize_wh = [1280]')
    with pytest.raises(EdgekitError, match=r"board.toml line 3: camera: size_wh: expected \[width, height\]"):
        load_profile(str(path))
    path.write_text("threads = 1")
    with pytest.raises(EdgekitError, match=r"board.toml line 1: title is missing"):
        load_profile(str(path))


@pytest.mark.parametrize(
    ("name", "degrees", "temp_c"),
    [
        ("raspberry-pi-4", {"cpu_thermal": "51540"}, 51.5),
        ("jetson-nano", {"AO_therm": "60000", "CPU_therm": "41500", "GPU_therm": "39000", "PMIC_Die": "100000"}, 41.5),
        ("jetson-nano", {"cpu_thermal": "34500", "mem_thermal": "40000"}, 34.5),
        ("jetson-orin", {"cpu_thermal": "47400", "gpu_thermal": "-256000", "tj_thermal": "48500"}, 47.4),
        ("coral-dev-board", {"cpu_thermal": "50000", "gpu_thermal": "52000"}, 50.0),
        ("x86-64", {"acpitz": "27800", "x86_pkg_temp": "44000"}, 44.0),
        # none of the profile's places: what looks like the processor, the hottest
        ("x86-64", {"acpitz": "27800", "cpu0_thermal": "48000", "cpu1_thermal": "49000"}, 49.0),
        ("raspberry-pi-4", {"soc_thermal": "45000"}, 45.0),
        ("raspberry-pi-4", {"cpu_thermal": ""}, None),  # asleep
        ("jetson-orin", {"cpu_thermal": "-256000"}, None),  # switched off
        ("raspberry-pi-4", {}, None),
    ],
)  # fmt: skip
def test_cpu_temp_of_thermal_zones(tmp_path: Path, name: str, degrees: dict[str, str], temp_c: float | None) -> None:
    assert load_profile(name).cpu_temp_c(zones(tmp_path, **degrees)) == temp_c


def test_cpu_temp_of_other_sensors(tmp_path: Path) -> None:
    """Wherever they are after this start."""
    for number, (name, *degrees) in enumerate([("nvme", 39000), ("k10temp", 52125, 49000)]):
        sensor = tmp_path / "sys" / "class" / "hwmon" / f"hwmon{number}"
        sensor.mkdir(parents=True)
        (sensor / "name").write_text(f"{name}\n")
        for place, temp in enumerate(degrees, 1):
            (sensor / f"temp{place}_input").write_text(f"{temp}\n")
    assert load_profile("x86-64").cpu_temp_c(tmp_path) == 52.1
    ours = Profile(title="ours", temperature=("/sys/nowhere/temp", "/sys/class/hwmon/hwmon0/temp*_input"))
    assert ours.cpu_temp_c(tmp_path) == 39.0
