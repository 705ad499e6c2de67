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

import numpy as np
import numpy.typing as npt

from edgekit.errors import EdgekitError

# As in edge_tpu.py, which is not imported here: another Python than EdgeKit's runs this module too.
COMPILED = "edgetpu-custom-op"

if TYPE_CHECKING:
    from edgekit.flatbuffer import Model

FOLDER = Path(__file__).with_name("ops")
LIBRARY_NAME = "libedgekit_ops.so"
# Of a user's operator; those of EdgeKit itself are in setup.py.
COMPILER_OPTIONS = ("-std=c11", "-O3", "-fPIC", "-shared", "-fvisibility=hidden", "-Wall")

# numpy's names of the types in edgekit_op.h.
_DTYPES = {
    1: "float32",
    2: "int32",
    3: "uint8",
    4: "int64",
    6: "bool",
    7: "int16",
    9: "int8",
    11: "float64",
}
_INTEGER, _REAL, _TEXT = 1, 2, 3
_ABI = 1

Array = npt.NDArray[Any]
Kernel = Callable[..., Any]


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int32),
        ("rank", ctypes.c_int32),
        ("dims", ctypes.POINTER(ctypes.c_int32)),
        ("data", ctypes.c_void_p),
        ("bytes", ctypes.c_size_t),
        ("scale", ctypes.c_float),
        ("zero_point", ctypes.c_int32),
        ("constant", ctypes.c_int32),
    )


class _Option(ctypes.Structure):
    _fields_ = (
        ("key", ctypes.c_char_p),
        ("kind", ctypes.c_int32),
        ("integer", ctypes.c_int64),
        ("real", ctypes.c_double),
        ("text", ctypes.c_char_p),
    )


class _Node(ctypes.Structure):
    _fields_ = (
        ("inputs", ctypes.POINTER(_Tensor)),
        ("outputs", ctypes.POINTER(_Tensor)),
        ("input_count", ctypes.c_int32),
        ("output_count", ctypes.c_int32),
        ("options", ctypes.POINTER(_Option)),
        ("option_count", ctypes.c_int32),
        ("blob", ctypes.c_void_p),
        ("blob_bytes", ctypes.c_size_t),
        ("state", ctypes.c_void_p),
        ("user", ctypes.c_void_p),
        ("index", ctypes.c_int32),
        ("version", ctypes.c_int32),
        ("resize", ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_void_p])),
        ("fail", ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_void_p, ctypes.c_char_p, ctypes.c_char_p])),
    )


_Call = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)
_Free = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class _Op(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("version", ctypes.c_int32),
        ("init", _Call),
        ("prepare", _Call),
        ("invoke", _Call),
        ("free", _Free),
        ("user", ctypes.c_void_p),
    )


class _Library(ctypes.Structure):
    _fields_ = (
        ("abi", ctypes.c_int32),
        ("op_count", ctypes.c_int32),
        ("ops", ctypes.POINTER(ctypes.POINTER(_Op))),
    )


# As in tensorflow/lite/core/c/common.h; see ops/tflite.h.
_Init = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


class _Registration(ctypes.Structure):
    _fields_ = (
        ("init", _Init),
        ("free", ctypes.c_void_p),
        ("prepare", ctypes.c_void_p),
        ("invoke", ctypes.c_void_p),
        ("profiling_string", ctypes.c_void_p),
        ("builtin_code", ctypes.c_int32),
        ("custom_name", ctypes.c_char_p),
        ("version", ctypes.c_int),
        ("registration_external", ctypes.c_void_p),
        ("async_kernel", ctypes.c_void_p),
        ("inplace_operator", ctypes.c_uint64),
    )


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
        if (own := library_path()) is not None:
            self.versions.update(_listed(own))
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
            self.versions.update(_listed(path))
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
        python = _PythonKernel(name, kernel, version, shape, self._raised)
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
            delegate = load(os.fspath(_library()), self._options)
        except ValueError as error:
            raise EdgekitError(f"custom operators do not load ({error})", mend="build them again") from error
        delegate.edgekit_resolver = self  # which has what the delegate calls
        return delegate

    def take_error(self) -> BaseException | None:
        """What a Python kernel raised in this thread since this was last asked for."""
        error: BaseException | None = getattr(self._raised, "error", None)
        self._raised.error = None
        return error

    def unresolved(self, model: Model, failure: str) -> str:
        """What is to be done about the custom operator without a kernel that a runtime's ``failure`` on ``model`` is
        about; empty where it is about something else."""
        for operator in model.operators:
            if not operator.custom or operator.name not in failure:
                continue
            if self.versions.get(operator.name, 0) >= operator.version:
                continue
            needed = f"the custom operator {operator.name} version {operator.version}"
            if operator.name in self.versions:
                return f"{needed}, and its kernel is of version {self.versions[operator.name]}; get a newer one"
            if operator.name == COMPILED:
                return f"{needed}: it was compiled for the Edge TPU; give the model that it was made of"
            if library_path() is None:
                return f"{needed}; {NOT_BUILT}"
            return f"{needed}, and no kernel for it is known; give its library with --ops LIB.so, or ops= in Python"
        return ""

    def registerer(self, address: int) -> None:
        """Adds all operators to the ``tflite::MutableOpResolver`` at ``address``, as TensorFlow hands it to the
        registerers of custom operators. What is added stays in memory to the end of the process.

        Raises:
            EdgekitError: the library was not built, or TensorFlow is not loaded.
        """
        library = ctypes.CDLL(os.fspath(_library()))
        library.edgekit_init.restype = ctypes.c_void_p
        library.edgekit_init.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
        add = _add_custom()
        for op in self._ops():
            registration = _registration(library, op)
            add(address, ctypes.c_char_p(op.name), ctypes.addressof(registration), 1)
            _registered.append((registration, op, self))

    def _ops(self) -> Iterable[_Op]:
        """All, later ones of the same name first."""
        ops = {}
        for path in [_library(), *(path for path in self.paths if path.suffix != ".py")]:
            ops.update({op.name: op for op in _ops_of(path)})
        ops.update({python.op.name: python.op for python in self._kept})
        return ops.values()


# What ``ops`` may be: a resolver, or the files to make one of.
Ops = CustomOpResolver | Sequence[str | os.PathLike[str]]


def resolver(ops: Ops) -> CustomOpResolver:
    return ops if isinstance(ops, CustomOpResolver) else CustomOpResolver(*ops)


class _PythonKernel:
    """An operator, as edgekit_op.h has it, that calls a Python function."""

    def __init__(
        self, name: str, function: Kernel, version: int, shape: Callable[..., Any] | None, raised: threading.local
    ) -> None:
        self._name, self._function, self._shape, self._raised = name, function, shape, raised
        self._calls: dict[int, Callable[[], None]] = {}
        self.op = _Op(
            name.encode(),
            version,
            _Call(),
            _Call(self._guarded(self._prepare)),
            _Call(self._guarded(lambda address: self._calls[address]())),
            _Free(lambda address: self._calls.pop(address, None) and None),
        )

    def _guarded(self, work: Callable[[int], None]) -> Callable[[int], int]:
        """``work``, whose exceptions are kept for Python and told to the interpreter."""
        raised, name = self._raised, self._name

        def call(address: int) -> int:
            try:
                work(address)
            except BaseException as error:
                raised.error = error
                if isinstance(error, Exception):
                    error.edgekit_operator = name  # type: ignore[attr-defined]
                text = f"{type(error).__name__}: {error}".encode(errors="replace")
                return int(_Node.from_address(address).fail(address, b"%s", text))
            return 0

        return call

    def _prepare(self, address: int) -> None:
        node = _Node.from_address(address)
        inputs, outputs = node.inputs[: node.input_count], node.outputs[: node.output_count]
        options = _options(node)
        if self._shape:
            shapes = self._shape(*(_dims(tensor) if tensor.type else None for tensor in inputs), **options)
            for number, dims in enumerate([shapes] if len(outputs) == 1 and np.ndim(shapes) == 1 else shapes):
                if node.resize(address, number, len(dims), (ctypes.c_int32 * len(dims))(*dims)):
                    raise ValueError(f"output {number} cannot have the shape {tuple(dims)}")
        self._calls[address] = self._call(node, len(inputs), options)

    def _call(self, node: _Node, count: int, options: dict[str, Any]) -> Callable[[], None]:
        """A function that runs the kernel on the node's tensors as they are when it is called. A tensor keeps its place
        from call to call, but for a dynamic one: its array is made anew when the address has changed."""
        function, name = self._function, self._name
        tensors = [node.inputs[i] for i in range(count)] + [node.outputs[i] for i in range(node.output_count)]
        arrays: list[Array | None] = [None] * len(tensors)
        places: list[int | None] = [-1] * len(tensors)

        def call() -> None:
            for number, tensor in enumerate(tensors):
                if (place := tensor.data) != places[number]:
                    arrays[number], places[number] = _array(tensor, writeable=number >= count), place
            made = function(*arrays[:count], **options)
            results = made if isinstance(made, tuple) else (made,)
            if len(results) != len(arrays) - count:
                raise ValueError(f"{name}: expected {len(arrays) - count} arrays of its kernel, got {len(results)}")
            for array, result in zip(arrays[count:], results, strict=True):
                assert array is not None
                if np.shape(result) != array.shape:
                    raise ValueError(
                        f"{name}: expected an array of shape {array.shape} of its kernel, got {np.shape(result)}"
                    )
                np.copyto(array, result, casting="same_kind")

        return call


# Registrations that TensorFlow's resolvers point to.
_registered: list[Any] = []

NOT_BUILT = (
    f"EdgeKit's {LIBRARY_NAME} was not built when EdgeKit was installed here: install a C compiler "
    "(apt-get install gcc libc6-dev), and EdgeKit again"
)


def library_path() -> Path | None:
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
        versions = _listed(temporary, source) if for_this_machine else {}
    return output, versions


def _machine(path: Path) -> bytes:
    """Of an ELF file: what it is for, as a number."""
    with path.open("rb") as file:
        return file.read(20)[18:]


def _listed(path: Path, source: Path | None = None) -> dict[str, int]:
    return {op.name.decode(errors="replace"): op.version for op in _ops_of(path, source)}


def _ops_of(path: Path, source: Path | None = None) -> list[_Op]:
    try:
        library = ctypes.CDLL(os.fspath(path))
    except OSError as error:
        raise EdgekitError(
            f"operators {path} do not load ({error})",
            mend="build them on this kind of machine, with `edgekit ops build`",
        ) from error
    try:
        library.edgekit_library.restype = ctypes.POINTER(_Library)
        listed = library.edgekit_library().contents
    except (AttributeError, ValueError) as error:
        raise EdgekitError(
            f"{source or path} exports no operators", mend="name them in EDGEKIT_OPS(&...), of edgekit_op.h"
        ) from error
    if listed.abi != _ABI:
        raise EdgekitError(
            f"operators {path}", expected=f"edgekit_op.h number {_ABI}", got=str(listed.abi), mend="build them again"
        )
    return [listed.ops[i].contents for i in range(listed.op_count)]


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


def _library() -> Path:
    path = library_path()
    if path is None:
        raise EdgekitError("custom operators", mend=NOT_BUILT)
    return path


def _options(node: _Node) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for option in node.options[: node.option_count] if node.option_count else []:
        text = option.text.decode(errors="replace") if option.kind == _TEXT else ""
        value = {_INTEGER: option.integer, _REAL: option.real, _TEXT: text}[option.kind]
        values[option.key.decode(errors="replace")] = value
    values.pop("version", None)
    return values


def _dims(tensor: _Tensor) -> tuple[int, ...]:
    return tuple(tensor.dims[: tensor.rank]) if tensor.rank else ()


def _array(tensor: _Tensor, writeable: bool) -> Array | None:
    """The memory of a tensor, not a copy."""
    if not tensor.type:
        return None
    memory = (ctypes.c_char * tensor.bytes).from_address(tensor.data) if tensor.bytes else b""
    array: Array = np.frombuffer(memory, _DTYPES[tensor.type]).reshape(_dims(tensor))
    array.flags.writeable = writeable and bool(tensor.bytes)
    return array


def _registration(library: ctypes.CDLL, op: _Op) -> _Registration:
    operator = ctypes.addressof(op)

    def init(context: int, blob: int, blob_bytes: int) -> int:
        return int(library.edgekit_init(context, operator, blob, blob_bytes) or 0)

    pointers = (
        ctypes.cast(getattr(library, f"edgekit_{name}"), ctypes.c_void_p) for name in ("free", "prepare", "invoke")
    )
    return _Registration(_Init(init), *pointers, custom_name=op.name, version=1)


def _add_custom() -> Callable[..., None]:
    """``tflite::MutableOpResolver::AddCustom`` of the TensorFlow in this process."""
    symbol = "_ZN6tflite17MutableOpResolver9AddCustomEPKcPK18TfLiteRegistrationi"
    loaded = [line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if ".so" in line]
    for path in dict.fromkeys(path for path in loaded if "tensorflow" in path):
        try:
            function = getattr(ctypes.CDLL(path), symbol)
        except (OSError, AttributeError):
            continue
        function.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int]
        function.restype = None
        return function  # type: ignore[no-any-return]
    raise EdgekitError(
        "TensorFlow has no way to register a custom operator",
        expected=f"the symbol {symbol}",
        mend="install another TensorFlow",
    )
