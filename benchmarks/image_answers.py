"""Whether a service gives the same answers in every form it is built in.

Services: 5 engines (NumPy, scikit-learn, ONNX Runtime, LiteRT, PyTorch) with 3 small models each (`benchmarks.image_models`: a
multi-layer perceptron, a convolution or logistic regression, a gradient boosting or the like), made by the seed. NumPy is a
plain program with a v2 door of its own (`benchmarks/programs/numpy_door.py`); the others run in our server.
Forms: the bare process, and `root`, `oci` and `microvm` built from one closure each (one analysis per engine and model).
Requests: 12 per service, the same in every form: 1, 2, 7 and 32 rows, each by HTTP with JSON, HTTP with binary tensors and
gRPC (NumPy's door has none: 8). Values are drawn by the seed in the model's data type, finite. One thread, one instance.
Counts: a cell (engine, model, form) is right when all its answers have the process's status, names, shapes, data types and
bytes. In a microVM whose CPU is emulated, libraries see other vector extensions than outside and choose other kernels, so that
sums are rounded otherwise: there, and nowhere else, floats may differ by 1e-5 + 1e-5 |expected| (FP32) or 1e-12 + 1e-12
|expected| (FP64); integers and text may not. How many cells are equal bit by bit is told beside.
Bar: all cells right (`value` is the share). A form that can't be run here is named in `details`, and is no cell; without
`root` there is no verdict. --quick: NumPy, ONNX Runtime and LiteRT, one model each, `root` and `oci`.
Control: the root form of the first service with the last bit of one weight turned must be called wrong.
Left out: GPUs, several threads (sums in another order are no matter of the form).
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks import image_builds as builds
from benchmarks import image_models as models
from benchmarks.harness import Control, Options, Result, Skip, judge
from benchmarks.image_grammar import DOORS, Door, Infer, Run, Service, Start
from benchmarks.image_player import Player, Said, differs

NAME = "image_answers"
BAR = "5 engines x 3 models answer the same in process, root, container and microVM, bit by bit or within a stated tolerance"
ROWS = (1, 2, 7, 32)
FORMS, QUICK_FORMS = ("root", "oci", "microvm"), ("root", "oci")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One service in one form."""

    name: str
    wrong: str = ""
    """The first answer that is not right, in words."""
    exact: bool = False
    """Every answer is equal bit by bit."""


def requests(service: Service, seed: int) -> list[Infer]:
    """Return the requests that every form of a service gets."""
    doors: Sequence[Door] = [door for door in DOORS if door in service.doors]
    return [
        Infer(
            door=door, rows=rows, values="normal", values_seed=seed + number, outputs=(), id="", compression="", fresh=True
        )
        for number, (rows, door) in enumerate((rows, door) for rows in ROWS for door in doors)
    ]  # fmt: skip


def answers(image: builds.Built, form: str, seed: int) -> list[Said]:
    """Return what a service says in a form; "process" is the bare one."""
    with builds.running(image, form) as addresses, Player(addresses, image.served) as player:
        return [player.infer(asked) for asked in requests(models.service(image.engine), seed)]


def compare(name: str, expected: Sequence[Said], found: Sequence[Said], *, emulated: bool) -> Cell:
    """Return what a form's answers are against those of the process."""
    assert all(said.status in ("200", "OK") and said.tensors for said in expected), f"{name}: the process answers {expected[0]}"
    exact = not any(differs(*pair) for pair in zip(expected, found, strict=True))
    told = [why for one, other in zip(expected, found, strict=True) if (why := differs(one, other, near=emulated))]
    return Cell(name=name, wrong=told[0] if told else "", exact=exact)


def run(options: Options) -> Result:
    """Build every service in every form, ask each the same, and see the control called wrong."""
    builds.need_tools()
    engines, forms = (models.LIGHT, QUICK_FORMS) if options.quick else (models.ENGINES, FORMS)
    kinds = models.KINDS[1:2] if options.quick else models.KINDS
    absent = {name: why for name in engines if (why := builds.available(name))}
    absent |= {form: why for form in forms if (why := builds.cannot_run(form))}
    forms = tuple(form for form in forms if form not in absent)
    if "root" not in forms:
        raise Skip(absent["root"])
    cells: list[Cell] = []
    checked = None
    with builds.container_engine(forms), builds.workshop() as folder:
        for engine in (name for name in engines if name not in absent):
            for kind in kinds:
                image = builds.build(engine, kind, folder, forms=forms)
                expected = answers(image, "process", options.seed)
                for form in forms:
                    found = answers(image, form, options.seed)  # a guest is emulated wherever these run: see the definition
                    cells.append(compare(f"{engine} {kind} {form}", expected, found, emulated=form == "microvm"))
                    print(cells[-1], flush=True)
                checked = checked or control(image, expected, options.seed)
                shutil.rmtree(image.folder)
    wrong = [f"{cell.name}: {cell.wrong}" for cell in cells if cell.wrong]
    holds, why = judge(not wrong, checked)
    return Result(
        value=1 - len(wrong) / len(cells),
        spread=None,
        unit="share of cells",
        holds=holds,
        why=" | ".join(wrong[:4]) or why,
        control=checked,
        details={
            "cells": len(cells),
            "equal_bit_by_bit": sum(cell.exact for cell in cells),
            "within_tolerance_only": [cell.name for cell in cells if not cell.exact and not cell.wrong],
            "wrong": wrong,
            "left_out": absent,
        },
    )


def control(image: builds.Built, expected: Sequence[Said], seed: int) -> Control:
    """Turn the last bit of a weight of the model in the root, and ask once more."""
    service = models.service(image.engine)
    life_of = Run(service=service.name, number=0, start=Start(model=image.kind), exchanges=(), end="SIGTERM")
    with builds.changed(image, builds.model_inside(image), models.turn_a_bit):
        life = builds.in_root(image, life_of)
        try:
            assert life.wait_listening(), life.output()
            with Player(life.addresses, image.served) as player:
                found = [player.infer(asked) for asked in requests(service, seed)]
        finally:
            life.close()
    cell = compare("control", expected, found, emulated=False)
    name = "the last bit of one weight turned"
    return Control(name=name, value=None, failed=bool(cell.wrong), how=cell.wrong or "it was called right")
