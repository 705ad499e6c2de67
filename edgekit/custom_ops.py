"""Custom operators: the kernels there are for those that a model has, and the delegate that brings them to a runtime.

The wheels of the runtimes have no way to register an operator (google-ai-edge/LiteRT issue 7996). All load external
delegates, so the library in ``edgekit/ops`` is one: it claims the custom nodes it has a kernel for, and leaves the
others to XNNPACK.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shlex
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from edgekit.errors import EdgekitError
from edgekit.native_ops import Op, PythonKernel, listed_versions, ops_of

if TYPE_CHECKING:
    from edgekit.flatbuffer import Model, Operator

FOLDER = Path(__file__).with_name("ops")
LIBRARY_NAME = "libedgekit_ops.so"
# Of a user's operator; those of EdgeKit itself are in setup.py.
COMPILER_OPTIONS = ("-std=c11", "-O3", "-fPIC", "-shared", "-fvisibility=hidden", "-Wall")

Kernel = Callable[..., Any]


def kernel(name: str, *, version: int = 1, shape: Callable[..., Any] | None = None) -> Callable[[Kernel], Kernel]:
    """Marks a function in a ``.py`` file that ``--ops`` names as the kernel of the operator ``name``. Arguments as
    :meth:`CustomOpResolver.add`."""

    def mark(function: Kernel) -> Kernel:
        function.edgekit_kernel = (name, version, shape)  # type: ignore[attr-defined]
        return function

    return mark


class CustomOpResolver:
    """The custom operators that a model may have: those shipped with EdgeKit, and yours.

    ::

        resolver = CustomOpResolver("mish.so")
        resolver.add("Swish", lambda x, beta=1.0: x / (1 + np.exp(-beta * x)))
        edgekit.load("model.tflite", ops=resolver)

    Args:
        paths: as :meth:`load` takes them.

    Attributes:
        versions: the newest version of each operator that there is a kernel for.
        paths: what was loaded.
    """

    def __init__(self, *paths: str | os.PathLike[str]) -> None:
        self.versions: dict[str, int] = {}
        self.paths: list[Path] = []
        self._options: dict[str, str] = {}
        self._kept: list[Any] = []
        self._raised = threading.local()
        if (own := find_library()) is not None:
            self.versions.update(listed_versions(own))
        for path in paths:
            self.load(path)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Adds the operators in a library that ``edgekit ops build`` made, or the functions marked with :func:`kernel`
        in a ``.py`` file.

        Raises:
            EdgekitError: it is neither, or does not load.
        """
        path = Path(path).resolve()
        if not path.is_file():
            raise EdgekitError(
                f"operators {path}",
                expected="a .so of `edgekit ops build`, or a .py",
                got="no such file",
                mend="check the path",
            )
        if path.suffix == ".py":
            for function in _functions(path):
                name, version, shape = function.edgekit_kernel
                self.add(name, function, version=version, shape=shape)
        elif path.suffix == ".c":
            raise EdgekitError(
                f"operators {path} are a source", mend=f"edgekit ops build {path}, and give what it makes"
            )
        else:
            self.versions.update(listed_versions(path))
            self._options[f"ops{len(self._options)}"] = os.fspath(path)
        self.paths.append(path)

    def add(self, name: str, kernel: Kernel, *, version: int = 1, shape: Callable[..., Any] | None = None) -> None:
        """Adds a kernel in Python: for trying a formula out, at some 10 us a call beside its own work.

        Args:
            name: of the operator in the model.
            kernel: called with an array for each input, read-only and as the tensor is (integers where it is
                quantized; None for an optional one that is absent), and with the operator's options by name. It gives
                an array of the output's shape, or a tuple of them. What it raises ends the call of the interpreter.
            version: the newest of the operator that it does.
            shape: called with the shape of each input, and the options; gives the shape of the output, or a list of
                shapes. Without it an output has the shape that the model gives it.
        """
        python = PythonKernel(name, kernel, version, shape, self._raised)
        self._kept.append(python)
        self._options[f"kernel{len(self._options)}"] = hex(ctypes.addressof(python.op))
        self.versions[name] = version

    def wanted(self, model: Model) -> bool:
        """Whether ``model`` has an operator that these are for."""
        return any(operator.custom and operator.name in self.versions for operator in model.operators)

    def delegate(self, module: ModuleType) -> Any:
        """For ``module.Interpreter(experimental_delegates=[...])``; ``module`` is that of a runtime, or ``tf.lite``.

        Raises:
            EdgekitError: the library was not built, or a kernel's does not load.
        """
        load = getattr(module, "load_delegate", None) or module.experimental.load_delegate
        try:
            delegate = load(os.fspath(library()), self._options)
        except ValueError as error:
            raise EdgekitError(f"custom operators do not load ({error})", mend="build them again") from error
        delegate.edgekit_resolver = self  # which has what the delegate calls
        return delegate

    def take_error(self) -> BaseException | None:
        """What a Python kernel raised in this thread since this was last asked for."""
        error: BaseException | None = getattr(self._raised, "error", None)
        self._raised.error = None
        return error

    def outdated(self, model: Model) -> str:
        """What is to be done about the operator of ``model`` whose kernel is older than it; empty where there is none.
        The library cannot see to it: the interpreter does not tell a delegate the version of such an operator."""
        older = (op for op in model.operators if op.custom and self.versions.get(op.name, op.version) < op.version)
        return next(map(self._problem, older), "")

    def unresolved(self, model: Model, failure: str) -> str:
        """What is to be done about the operator without a kernel that a runtime's ``failure`` on ``model`` is about;
        empty where it is about something else."""
        missing = (op for op in model.operators if op.custom and op.name in failure and op.name not in self.versions)
        return next(map(self._problem, missing), "")

    def _problem(self, operator: Operator) -> str:
        from edgekit.edge_tpu import COMPILED

        needed = f"the custom operator {operator.name} version {operator.version}"
        if operator.name in self.versions:
            return f"{needed}, and its kernel is of version {self.versions[operator.name]}; get a newer one"
        if operator.name == COMPILED:
            return f"{needed}: it was compiled for the Edge TPU; give the model that it was made of"
        if find_library() is None:
            return f"{needed}; {NOT_BUILT}"
        return f"{needed}, and no kernel for it is known; give its library with --ops LIB.so, or ops= in Python"

    def ops(self) -> Iterable[Op]:
        """One for each name: of those of the same name the one that was added last."""
        ops = {}
        for path in [library(), *(path for path in self.paths if path.suffix != ".py")]:
            ops.update({op.name: op for op in ops_of(path)})
        ops.update({python.op.name: python.op for python in self._kept})
        return ops.values()


# What ``ops`` may be: a resolver, or the files to make one of.
Ops = CustomOpResolver | Sequence[str | os.PathLike[str]]


def paths_of(files: Sequence[str | os.PathLike[str]] | str | os.PathLike[str]) -> Sequence[str | os.PathLike[str]]:
    """One path is easily given instead of a list with it, and would be taken letter by letter."""
    return (files,) if isinstance(files, str | os.PathLike) else files


def resolver(ops: Ops) -> CustomOpResolver:
    return ops if isinstance(ops, CustomOpResolver) else CustomOpResolver(*paths_of(ops))


NOT_BUILT = (
    f"EdgeKit's {LIBRARY_NAME} was not built when EdgeKit was installed here: install a C compiler "
    "(apt-get install gcc libc6-dev), and EdgeKit again"
)


def find_library() -> Path | None:
    """EdgeKit's own library of operators; None where it was not built, for want of a C compiler."""
    path = FOLDER / LIBRARY_NAME
    return path if path.is_file() else None


def build(source: str | os.PathLike[str], output: str | os.PathLike[str] | None = None) -> tuple[Path, dict[str, int]]:
    """Compiles operators written with ``edgekit_op.h`` into a library that ``--ops`` loads.

    Args:
        source: a C file.
        output: the ``.so`` to write; by default beside ``source``, with its name.

    Returns:
        The library, and the operators in it with their versions; none where ``CC`` compiles for another machine.

    Raises:
        EdgekitError: there is no C compiler, the source does not compile, or it exports no operators.
    """
    from edgekit.bundle import replacing

    source = Path(source)
    output = Path(output) if output else source.with_suffix(".so")
    if not source.is_file():
        raise EdgekitError(f"source {source}", expected="a C file", got="no such file", mend="check the path")
    if source.resolve() == output.resolve():
        raise EdgekitError(f"output {output} is the source", mend="give another path with -o")
    named = shlex.split(os.environ.get("CC", ""))
    compiler = next(filter(None, map(shutil.which, named[:1] or ("cc", "gcc", "clang"))), None)
    if compiler is None:
        what = f"the C compiler {named[0]}, of the variable CC, is not here" if named else "no C compiler is here"
        raise EdgekitError(what, mend="apt-get install gcc libc6-dev, or name another in CC")
    with replacing(output) as temporary:
        command = [compiler, *named[1:], *COMPILER_OPTIONS, *shlex.split(os.environ.get("CFLAGS", ""))]
        command += [f"-I{FOLDER}", os.fspath(source), "-o", os.fspath(temporary), "-lm"]
        result = subprocess.run(command, capture_output=True, text=True, errors="replace")
        if result.returncode:
            lines = [line for line in result.stderr.splitlines() if "error" in line] or ["it says nothing"]
            raise EdgekitError(f"{source} does not compile ({lines[0].strip()})", mend="mend it")
        for_this_machine = _machine(temporary) == _machine(Path("/proc/self/exe"))
        versions = listed_versions(temporary, source) if for_this_machine else {}
    return output, versions


def _machine(path: Path) -> bytes:
    """Of an ELF file: what it is for, as a number."""
    with path.open("rb") as file:
        return file.read(20)[18:]


def _functions(path: Path) -> list[Any]:
    """Those in a Python file that are marked as kernels, in order."""
    name = f"edgekit_ops_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise EdgekitError(
            f"operators {path} do not load ({type(error).__name__}: {error})", mend="mend them"
        ) from error
    return [value for value in vars(module).values() if hasattr(value, "edgekit_kernel")]


def library() -> Path:
    """EdgeKit's own library of operators.

    Raises:
        EdgekitError: it was not built.
    """
    path = find_library()
    if path is None:
        raise EdgekitError("custom operators", mend=NOT_BUILT)
    return path
