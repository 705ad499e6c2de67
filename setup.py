"""Builds the library of custom operators, the one part of EdgeKit that is not Python. The rest is in setup.cfg."""

import os
import shutil
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext


class BuildLibrary(build_ext):
    """A library for C, of no particular Python."""

    def get_ext_filename(self, fullname):
        return str(Path(*fullname.split("."))) + ".so"

    def get_export_symbols(self, ext):
        return ext.export_symbols

    def run(self):
        # Some Pythons name the compiler they were built with, which is not here.
        named = os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc"
        if not shutil.which(named.split()[0]):
            found = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
            if found:
                os.environ["CC"], os.environ["LDSHARED"] = found, f"{found} -shared"
        super().run()


class WheelOfAnyPython(bdist_wheel):
    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[
        Extension(
            "edgekit.ops.libedgekit_ops",
            sources=sorted(map(str, Path("edgekit/ops").glob("*.c"))),
            depends=sorted(map(str, Path("edgekit/ops").glob("*.h"))),
            libraries=["m", "dl"],
            extra_compile_args=[
                "-std=c11",
                "-O3",
                "-ffp-contract=fast",
                "-fno-math-errno",
                "-fvisibility=hidden",
                "-g0",
            ],
            # Where there is no C compiler EdgeKit works without custom operators, and says so when one is needed.
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": WheelOfAnyPython},
)
