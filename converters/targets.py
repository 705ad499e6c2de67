"""What ``--target`` and ``--quantize auto`` know of devices and of their TFLite runtimes."""

from __future__ import annotations

from dataclasses import dataclass

from edgekit.errors import ConversionError

# Latency against float32 of a MobileNetV3-Small, one thread, measured by benchmarks/recipes.py; int8 as rewritten for
# XNNPACK, on a CPU without 8-bit dot products. tflite-runtime 2.14 delegates nothing that has 8-bit activations.
LATENCY = {
    "litert": {"float16": 1.0, "int8-weights": 1.0, "dynamic": 1.5, "int8": 1.2, "int16x8": 40.0},
    "tflite-runtime": {"float16": 1.0, "int8-weights": 1.0, "dynamic": 14.0, "int8": 19.0, "int16x8": 36.0},
}
SLOW = 2.0
# Recipes that need calibration data.
CALIBRATED = ("int8", "int16x8")


@dataclass(frozen=True)
class Target:
    """A kind of device.

    Attributes:
        runtimes: the TFLite runtimes that people run on it; tflite-runtime is the only one with wheels for 32 bits.
        dot_product: whether its CPU surely has 8-bit dot products (Arm's SDOT, x86's VNNI), without which int8 is no
            faster than float.
        accelerator: ``edge-tpu``, ``gpu`` or nothing.
    """

    runtimes: tuple[str, ...] = ("litert",)
    dot_product: bool = False
    accelerator: str = ""


TARGETS = {
    "raspberry-pi-3": Target(runtimes=("litert", "tflite-runtime")),  # Cortex-A53
    "raspberry-pi-4": Target(runtimes=("litert", "tflite-runtime")),  # Cortex-A72
    "raspberry-pi-5": Target(dot_product=True),  # Cortex-A76
    "jetson-nano": Target(accelerator="gpu"),  # Maxwell, Cortex-A57
    "jetson-orin": Target(accelerator="gpu", dot_product=True),  # Ampere, Cortex-A78AE
    "coral": Target(accelerator="edge-tpu", runtimes=("litert", "tflite-runtime")),
    "x86-64": Target(runtimes=("litert", "tflite-runtime")),
    "android": Target(dot_product=True),  # all but the oldest: SDOT came with Armv8.2
}


@dataclass(frozen=True)
class Choice:
    """A recipe and why it was chosen."""

    recipe: str
    reason: str


def choose(target: str | None, calibrated: bool) -> list[Choice]:
    """The recipes for ``target``, the best first; a later one is for when an earlier one loses too much.

    Args:
        target: a name in ``TARGETS``, or None where the device is not known.
        calibrated: whether there is calibration data, which int8 needs.

    Raises:
        ConversionError: the target needs int8, and there is no calibration data.
    """
    weights_only = Choice("int8-weights", "no slower than float32 in any runtime, at 0.29 of its size")
    if target is None:
        return [weights_only]
    device = find(target)
    if device.accelerator == "edge-tpu":
        if not calibrated:
            raise ConversionError(
                f"target {target} needs calibration data: its Edge TPU runs int8 graphs only",
                mend="give --calibration a folder of 100 or more typical images or clips",
            )
        return [Choice("int8", f"the Edge TPU of {target} runs int8 graphs only")]
    if device.accelerator == "gpu":
        return [
            Choice("float16", f"the GPU of {target} computes in half precision; its CPU runs it as fast as float32")
        ]
    if slow := [name for name in device.runtimes if LATENCY[name]["int8"] > SLOW]:
        factor = LATENCY[slow[0]]["int8"]
        return [Choice("int8-weights", f"{weights_only.reason}; {slow[0]} would run int8 {factor:.0f} x slower")]
    if device.dot_product and calibrated:
        return [
            Choice("int8", f"the CPU of {target} has 8-bit dot products, and XNNPACK takes the whole graph"),
            weights_only,
        ]
    return [Choice("int8-weights", f"{weights_only.reason}; with --calibration int8 would be faster on {target}")]


def caution(target: str, recipe: str) -> str:
    """What speaks against ``recipe`` on ``target``; empty if nothing does."""
    device = find(target)
    if device.accelerator == "edge-tpu" and recipe != "int8":
        return f"the Edge TPU of {target} runs int8 graphs only: all of {recipe} will run on its CPU"
    slow = {name: LATENCY[name].get(recipe, 1.0) for name in device.runtimes if LATENCY[name].get(recipe, 1.0) > SLOW}
    # What an accelerator runs is no matter of the CPU's kernels.
    if slow and device.accelerator != "edge-tpu":
        told = " and ".join(f"{name} about {factor:.0f} x" for name, factor in slow.items())
        return f"{recipe} is slower than float32 on {target}'s CPU: in {told}; --quantize auto avoids it"
    return ""


def caution_custom(target: str) -> str:
    """What speaks against custom operators on ``target``; empty if nothing does."""
    return {
        "edge-tpu": f"the Edge TPU of {target} takes no custom operator, and nothing that comes after one",
        "gpu": f"the GPU of {target} takes whole graphs of built-in operators only: its CPU will run this one",
    }.get(find(target).accelerator, "")


def find(target: str) -> Target:
    """The target of that name.

    Raises:
        ConversionError: there is none.
    """
    if target not in TARGETS:
        raise ConversionError(f"target {target!r}", expected=" or ".join(TARGETS), mend="give one of these")
    return TARGETS[target]
