"""Whether an exported program (.pt2) is data only. Asked before torch reads the file, because reading one can run code.

torch.export.load (read in torch 2.13) runs what the file says in these places, each of which is refused here:
- weights and constants marked as pickled, torchbind and opaque objects, and the older layout's `.pt` files: unpickled;
- sample inputs: unpickled without limits when the limited unpickler fails, so they have to pass that one;
- AOTInductor packages, which are compiled libraries, and delegates of other runtimes;
- sizes written as expressions, which sympy evaluates as Python: only arithmetic on plain symbols passes;
- operators named by any path below `torch`, `torch.os.system` among them: only ATen's operators and arithmetic pass;
- names, from which a Python function is generated and compiled: only plain identifiers pass;
- how inputs and outputs are nested, which may name a module to import: only tuples, lists and dicts of text pass.
Guards, strings of Python code as well, are never compiled: the engine asks for the module without them.

What passes computes on tensors and nothing else. That torch's own operators and archive reader are free of memory errors
is not checked here; the process that runs a model is the bound for those.
"""

from __future__ import annotations

import ast
import io
import json
import keyword
import re
from pathlib import Path
from typing import Any

from tenure.errors import SpecError

_RECORDS = re.compile(
    r"(\.data/(version|serialization_id)|byteorder|\.format_version|\.storage_alignment|archive_format|archive_version"
    r"|models/\w+\.json|extra/[\w.]+|data/(weights|constants)/\w+_(weights|constants)_config\.json"
    r"|data/weights/weight_\d+|data/constants/tensor_\d+|data/sample_inputs/\w+\.pt)"
)
_PAYLOAD = re.compile(r"(weight|tensor)_\d+")
_OPERATOR = re.compile(
    r"torch\.ops\.(aten|prims|quantized_decomposed|torchvision)\.\w+\.\w+|torch\.sym_[a-z]+"
    r"|torch\.ops\.higher_order\.(cond|wrap_with_set_grad_enabled|wrap_with_autocast)"
    r"|_operator\.(add|sub|mul|truediv|floordiv|mod|pow|neg|pos|getitem|eq|ne|lt|le|gt|ge|and_|or_|not_|truth)"
    r"|math\.(ceil|floor|trunc|sqrt)"
)
_DENIED = frozenset({"from_file", "set_", "set_data", "_print", "_debug_has_internal_overlap"})
"""ATen operators that reach files, the console, or memory beside a tensor's own."""
_NAME = re.compile(r"[A-Za-z_]\w*")
_PATH = re.compile(r"[\w\-]+(\.[\w\-]+)*")
_SYMBOL = re.compile(r"[a-z]{1,4}\d+")
_PLAIN = re.compile(r"[\w.+\-:]*")
_NAME_KEYS = frozenset({"name", "as_name", "user_input_name", "forward_arg_names"})
_PATH_KEYS = frozenset({"fqn", "parameter_name", "buffer_name", "tensor_constant_name"})
_TEXT_KEYS = frozenset({"as_string", "as_strings"})
"""Arguments of operators: quoted by torch where it generates code."""
_NAMED = frozenset({"tensor_values", "sym_int_values", "sym_bool_values", "sym_float_values"})
_METADATA = frozenset({"stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn", "custom", "from_node"})
_NESTS = frozenset({None, "builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict"})
_FUNCTIONS = frozenset(
    re.findall(r"\w+", """
        Symbol Integer Float Rational Add Mul Pow Max Min Mod Abs ceiling floor FloorDiv ModularIndexing Where PythonMod
        CleanDiv CeilToInt FloorToInt CeilDiv LShift RShift PowByNatural FloatPow FloatTrueDiv IntTrueDiv TruncToFloat
        TruncToInt RoundToInt RoundDecimal ToFloat Identity Eq Ne Equality Unequality Lt Le Gt Ge StrictLessThan
        StrictGreaterThan LessThan GreaterThan And Or Not true false
    """)
)  # fmt: skip


def check_program(content: io.BytesIO, path: Path) -> None:
    """Refuse a .pt2 file that could run code when it is loaded, or is no exported program. Raises SpecError.

    content: what will be loaded, in memory, so that nobody can change it in between. path: what the errors name.
    """
    import torch  # heavy: only where such a model is really loaded

    try:
        reader = torch._C.PyTorchFileReader(content)  # the reader that torch.export.load uses: both see the same records
        records = list(reader.get_all_records())
        models = [json.loads(reader.get_record(r)) for r in records if r.startswith("models/") and r.endswith(".json")]
        payloads = [json.loads(reader.get_record(r)) for r in records if r.endswith("_config.json")]
    except (RuntimeError, ValueError, RecursionError) as error:
        raise SpecError(f"torch cannot read {path}: {str(error).splitlines()[0][:200]}") from error
    try:
        _check_records(records)
        if len(models) != 1:
            raise _Refused(f"it holds {len(models)} exported programs", "Save one with torch.export.save")
        for config in payloads:
            _check_payloads(config)
        for record in records:
            if record.startswith("data/sample_inputs/"):
                _check_sample(reader.get_record(record))
        _check_part(models[0], "")
    except _Refused as error:
        raise SpecError(f"{path} is not loaded: {error.what}. {error.remedy}") from error
    except (TypeError, AttributeError, RecursionError) as error:
        raise SpecError(f"{path} is not loaded: its description is not laid out as torch.export.save does it") from error


class _Refused(Exception):
    def __init__(self, what: str, remedy: str = "Export the model again with torch.export, or to ONNX") -> None:
        super().__init__(what)
        self.what, self.remedy = what, remedy


def _check_records(records: list[str]) -> None:
    if len(set(records)) < len(records):
        raise _Refused("it has several records of one name")
    for record in records:
        if record.startswith("data/aotinductor/"):
            raise _Refused(
                "it is an AOTInductor package, a compiled library that would run with the server's rights",
                "Save the exported program itself with torch.export.save",
            )
        if not _RECORDS.fullmatch(record):
            raise _Refused(f"it holds {record[:80]!r}, which could run code when it is loaded or is not known to be harmless")


def _check_payloads(config: Any) -> None:
    for name, meta in config["config"].items():
        if meta.get("use_pickle") is not False or not _PAYLOAD.fullmatch(meta["path_name"]):
            raise _Refused(f"its tensor {name[:80]!r} is stored as a pickle, which runs whatever it holds when loaded")
        _match(_PATH, name, "a tensor")


def _check_sample(content: bytes) -> None:
    import torch

    try:
        if content:
            torch.load(io.BytesIO(content), weights_only=True)
    except Exception as error:  # the unpickler raises what it meets
        raise _Refused(
            "its sample inputs are a pickle of more than tensors, which runs whatever it holds when loaded"
        ) from error


def _check_part(value: Any, key: str) -> None:
    """Walk a program's description; what is not known to be harmless is refused."""
    if isinstance(value, dict):
        for name, part in value.items():
            _check_entry(name, part, key)
            if name == "metadata":
                if not set(part) <= _METADATA:
                    raise _Refused(
                        f"a node carries metadata {sorted(set(part) - _METADATA)}, which is not known to be harmless"
                    )
            elif name not in ("guards_code", "in_spec", "out_spec"):
                _check_part(part, name)
    elif isinstance(value, list):
        for part in value:
            _check_part(part, key)
    elif isinstance(value, str):
        _check_text(value, key)


def _check_entry(name: str, part: Any, owner: str) -> None:
    if owner in _NAMED:
        _match_name(name)
    elif owner == "range_constraints":
        _match(_SYMBOL, name, "a symbol")
    elif name in ("as_custom_obj", "custom_obj", "custom_obj_values", "treespec_namedtuple_fields") and part:
        raise _Refused(f"it holds custom objects ({name}), whose loading runs code")
    elif name in ("in_spec", "out_spec"):
        _check_nesting(json.loads(part)[1])


def _check_text(text: str, key: str) -> None:
    if key in ("target", "as_operator"):
        if not _OPERATOR.fullmatch(text) or _DENIED & set(text.split(".")[3:4]):
            raise _Refused(f"it calls {text[:80]!r}, which is not known to compute on tensors only")
    elif key == "expr_str":
        _check_expression(text)
    elif key in _NAME_KEYS:
        _match_name(text)
    elif key in _PATH_KEYS:
        if text:
            _match(_PATH, text, "a path")
    elif key not in _TEXT_KEYS:
        _match(_PLAIN, text, f"{key or 'a text'}")


def _match_name(text: str) -> None:
    if text and (keyword.iskeyword(text) or text.startswith("__")):
        raise _Refused(f"it uses {text[:80]!r} as a name, from which code would be generated")
    if text:
        _match(_NAME, text, "a name")


def _match(pattern: re.Pattern[str], text: str, what: str) -> None:
    if not pattern.fullmatch(text):
        raise _Refused(f"it uses {text[:80]!r} as {what}, from which code would be generated")


def _check_nesting(spec: Any) -> None:
    if spec["type"] not in _NESTS:
        raise _Refused(f"its inputs or outputs are nested in {str(spec['type'])[:80]!r}; known are tuple, list and dict")
    context = None if spec["context"] is None else json.loads(spec["context"])
    if context is not None and not (isinstance(context, list) and all(isinstance(key, str) for key in context)):
        raise _Refused(f"its inputs or outputs have keys {str(context)[:80]} that are not text")
    for part in spec["children_spec"]:
        _check_nesting(part)


def _check_expression(text: str) -> None:
    """Let arithmetic on symbols pass. sympy would evaluate anything else that Python can."""
    try:
        nodes = list(ast.walk(ast.parse(text, mode="eval"))) if len(text) < 10_000 else []
    except (SyntaxError, ValueError, RecursionError) as error:
        raise _Refused(f"a size is written as {text[:80]!r}, which is no arithmetic") from error
    if not nodes or not all(map(_is_arithmetic, nodes)):
        raise _Refused(f"a size is written as {text[:80]!r}, which is more than arithmetic and would be run")


def _is_arithmetic(node: ast.AST) -> bool:
    match node:
        case ast.Name(id=name):
            return name in _FUNCTIONS or _SYMBOL.fullmatch(name) is not None
        case ast.Call(func=ast.Name(id=name), keywords=keywords):
            if name in ("Pow", "PowByNatural", "FloatPow") and not _is_small(node.args[-1]):
                return False
            return name in _FUNCTIONS and all(
                word.arg is not None and isinstance(word.value, ast.Constant) for word in keywords
            )
        case ast.Constant(value=str(text)):
            return _SYMBOL.fullmatch(text) is not None
        case ast.Constant(value=value):
            return isinstance(value, bool | int | float) and abs(value) < 1 << 64
        case ast.BinOp(op=ast.Pow(), right=right):
            return _is_small(right)
        case ast.Expression() | ast.BinOp() | ast.UnaryOp() | ast.Compare() | ast.keyword() | ast.expr_context():
            return True
        case ast.operator() | ast.unaryop() | ast.cmpop():
            return True
    return False


def _is_small(node: ast.AST) -> bool:
    """Return whether an exponent is a number below 100, so that no power grows without a bound."""
    match node:
        case ast.Call(func=ast.Name(id="Integer"), args=[ast.Constant(value=int(value))]) | ast.Constant(value=int(value)):
            return abs(value) < 100
        case ast.UnaryOp(operand=operand):
            return _is_small(operand)
    return False
