"""What delegates take of a graph: as measured, or as their rules tell from the ``.tflite`` file alone."""

from __future__ import annotations

from collections import Counter

import msgspec

from edgekit import edge_tpu as edge_tpus
from edgekit import gpu as gpus
from edgekit.flatbuffer import Model


class Left(msgspec.Struct, frozen=True, kw_only=True):
    """``count`` operators named ``operator`` that are left to the CPU for one ``reason``."""

    operator: str
    count: int
    reason: str


class Coverage(msgspec.Struct, frozen=True, kw_only=True):
    """What a delegate takes of a graph: ``delegated`` of its ``operators``, in ``pieces`` runs between which the CPU
    works. ``delegate`` is ``xnnpack``, ``edge-tpu`` or ``gpu``; ``measured`` is False where this was predicted from
    the delegate's rules, not seen."""

    delegate: str
    measured: bool
    operators: int
    delegated: int
    pieces: int
    left: tuple[Left, ...]


def edge_tpu(model: Model) -> Coverage:
    """What ``edgetpu_compiler`` 16.0 would map to the Edge TPU, without its option for several subgraphs. A file that
    it has compiled already is told as it is: ``measured``.

    Raises:
        BundleError: an offset in the options of an operator leads out of the file.
    """
    compiled = any(operator.name == edge_tpus.COMPILED for operator in model.operators)
    return _coverage("edge-tpu", model, edge_tpus.refusals(model), measured=compiled)


def gpu(model: Model) -> Coverage:
    """What LiteRT's GPU accelerator would take, which computes 8-bit graphs in float too.

    Raises:
        BundleError: an offset in the options of an operator leads out of the file.
    """
    return _coverage("gpu", model, gpus.refusals(model), measured=False)


def measured(delegate: str, model: Model, pieces: list[list[int]]) -> Coverage:
    """What ``delegate`` took of ``model`` when it was loaded: the positions of the operators in each piece, as
    :class:`edgekit.sandbox.Sandbox` finds them."""
    taken = {position for piece in pieces for position in piece}
    left = Counter(
        (operator.name, "a custom operator" if operator.custom else "not taken")
        for position, operator in enumerate(model.operators)
        if position not in taken
    )
    return Coverage(
        delegate=delegate,
        measured=True,
        operators=len(model.operators),
        delegated=len(taken),
        pieces=len(pieces),
        left=tuple(Left(operator=name, count=count, reason=reason) for (name, reason), count in left.items()),
    )


def _coverage(delegate: str, model: Model, refusals: list[str], *, measured: bool) -> Coverage:
    left = Counter((op.name, reason) for op, reason in zip(model.operators, refusals, strict=True) if reason)
    taken = refusals.count("")
    return Coverage(
        delegate=delegate,
        measured=measured,
        operators=len(refusals),
        delegated=taken,
        pieces=1 if taken else 0,
        left=tuple(Left(operator=name, count=count, reason=reason) for (name, reason), count in left.items()),
    )
