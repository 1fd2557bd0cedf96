"""Typed dataclasses <-> YAML: unknown keys, wrong types and bad values are errors that name file, line and key."""

import contextlib
import copy
import dataclasses
import functools
import json
import math
import re
import sys
import types
import typing
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

import yaml

from micota_fast.config.suggestions import OTHER_VALUES, closest, closest_key
from micota_fast.config.yaml_nodes import Lineless, Where, compose, read_text
from micota_fast.errors import InputError

_QUOTED = re.compile("`([^`]+)`")  # the keys that a message names

T = TypeVar("T")


def option(
    default: Any = dataclasses.MISSING,
    *,
    doc: str,
    source: str = "",
    operational: bool = False,
    alias: str = "",
    infinite: bool = False,
    newer: bool = False,
) -> Any:
    """Declare a documented dataclass field.

    Args:
        default: value if the file does not set it; a list, dict or dataclass is copied. Absent: the key is required.
        doc: what the key does, with its unit.
        source: where the default comes from (paper section, repository); "ours" if the sources leave it open.
        operational: says where or how fast, not what: a change leaves the result the same and makes no stage stale.
        alias: the option's name in the version before. It is still read, with a notice on stderr, and it stays the key
            in `identity`, so that stages which are done remain so.
        infinite: its number may be infinite.
        newer: it came after runs had been made without it; at its default, which must stay what it is, it is not part
            of `identity`, so that they remain done.
    """
    metadata = {"doc": doc, "source": source, "operational": operational, "alias": alias, "infinite": infinite}
    metadata["newer"] = newer
    if default is dataclasses.MISSING:
        return dataclasses.field(metadata=metadata)
    if isinstance(default, list | dict) or dataclasses.is_dataclass(default):
        return dataclasses.field(default_factory=lambda: copy.deepcopy(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def load(cls: type[T], path: Path | str | None, overrides: typing.Sequence[str] = (), flag: str = "--set") -> T:
    """Read `path` (None: an empty file) into the dataclass `cls`, after applying overrides of the form `a.b=value`.

    The value of an override is YAML, so `--set seeds=[1,2]` and `--set url=null` mean what they look like. Errors name
    an override by the `flag` that it was given with.

    Raises:
        InputError: naming file, line and key of what is unknown, missing or of the wrong type.
    """
    node: yaml.Node | None = None
    source = "command line"
    if path is not None:
        source = str(path)
        node = compose(read_text(Path(path)), source)
    if node is None:
        node = yaml.MappingNode("tag:yaml.org,2002:map", [])
    for override in overrides:
        _apply_override(cls, node, override, flag)
    result: T = _build(cls, node, Where(source, ""))
    return result


def build(cls: type[T], values: dict[str, Any], source: str) -> T:
    """Make the dataclass `cls` from plain values; `source` is named in errors."""
    result: T = _build(cls, compose(yaml.safe_dump(values), Lineless(source)), Where(source, ""))
    return result


def dump(value: Any) -> str:
    """Return the YAML text of a dataclass, in field order; `load` of it gives an equal value."""
    return yaml.safe_dump(plain(value), sort_keys=False, allow_unicode=True, width=120)


def plain(value: Any) -> Any:
    """Turn dataclasses, tuples and paths into dicts, lists and strings."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def identity(value: Any) -> Any:
    """Return what the result depends on: `plain` without the operational options and newer ones at their defaults.

    A mapping becomes a list of pairs, since its order may matter (arms of a table, parts of a mix).
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        shown: frozenset[str] = getattr(value, "operational", frozenset())  # options that are so in this case
        fields = [f for f in dataclasses.fields(value) if not f.metadata.get("operational") and f.name not in shown]
        fields = [f for f in fields if not (f.metadata.get("newer") and getattr(value, f.name) == _default(f))]
        return {field.metadata.get("alias") or field.name: identity(getattr(value, field.name)) for field in fields}
    if isinstance(value, dict):
        return [[key, identity(item)] for key, item in value.items()]
    if isinstance(value, list | tuple):
        return [identity(item) for item in value]
    return plain(value)


def _default(field: "dataclasses.Field[Any]") -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def find_option(hint: Any, key: str) -> tuple[str, Any]:
    """Return the name and the type of what `key`, a name or an alias, stands for in values of the type `hint`.

    A key that the type does not know is returned as it is, with the type Any.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        for field in dataclasses.fields(hint):
            if key in (field.name, field.metadata.get("alias")):
                return field.name, _hints(typing.cast(type, hint))[field.name]
    elif origin is dict:
        return key, args[1]
    elif origin in (Union, types.UnionType):
        held = [arg for arg in args if dataclasses.is_dataclass(arg) or typing.get_origin(arg) is dict]
        return find_option(held[0], key) if held else (key, Any)
    return key, Any


def merged(hint: Any, values: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """Return plain values of the type `hint` with overrides in them; mappings are merged, all else is replaced.

    An option's old name (`option(alias=...)`) overrides the new one and stays in the result, for `build` to notice.
    """
    result = dict(values)
    for key, value in overrides.items():
        name, inner = find_option(hint, key)
        old = result.pop(name, None)
        both = isinstance(value, dict) and isinstance(old, dict)
        result[key] = merged(inner, old, value) if both else value
    return result


def describe(cls: type, prefix: str = "") -> list[tuple[str, str, str]]:
    """Return (dotted key, default, documentation) of every option of a dataclass, including nested ones."""
    rows: list[tuple[str, str, str]] = []
    for field in dataclasses.fields(cls):
        key = prefix + field.name
        hint = _hints(cls)[field.name]
        if dataclasses.is_dataclass(hint):
            rows += describe(typing.cast(type, hint), f"{key}.")
            continue
        # JSON is YAML, on one line.
        default = "required" if _is_required(field) else json.dumps(plain(_default(field)), ensure_ascii=False)
        doc = field.metadata.get("doc", "")
        if field.metadata.get("source"):
            doc += f" [{field.metadata['source']}]"
        rows.append((key, default, doc))
        for shape, inner in _nested(hint):
            rows += describe(inner, f"{key}{shape}.")
    return rows


def _nested(hint: Any) -> typing.Iterator[tuple[str, type]]:
    """Yield (path, dataclass) of the dataclasses that a list, a mapping or an optional value contains."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        yield "", typing.cast(type, hint)
    elif origin in (Union, types.UnionType):
        for arg in args:
            yield from _nested(arg)
    elif origin in (list, dict):
        for shape, inner in _nested(args[-1]):
            yield ("[i]" if origin is list else ".NAME") + shape, inner


def _apply_override(cls: type, root: yaml.Node, override: str, flag: str) -> None:
    key, equals, text = override.partition("=")
    # A secret given by mistake, instead of the name of the variable that holds it, must not reach a log.
    source = Lineless(f"{flag} {key}=..." if key.endswith("_env") else f"{flag} {override}")
    if not equals or not key:
        raise InputError(f"{source}: expected key=value, as in {flag} KEY=2e-5")
    if not isinstance(root, yaml.MappingNode):
        raise InputError(f"{source}: the configuration is not a mapping")
    _unshare(root)
    value = compose(text, source) or yaml.ScalarNode("tag:yaml.org,2002:null", "null")
    value.start_mark = yaml.Mark(source, 0, 0, 0, "", 0)
    node, hint = root, typing.cast(Any, cls)
    names = key.split(".")
    for depth, name in enumerate(names):
        same, inner = find_option(hint, name)
        found = next((i for i, (k, _) in enumerate(node.value) if find_option(hint, k.value)[0] == same), None)
        hint = inner
        if depth == len(names) - 1:
            pair = (yaml.ScalarNode("tag:yaml.org,2002:str", name, value.start_mark), value)
            if found is None:
                node.value.append(pair)
            else:
                node.value[found] = pair
            return
        if found is None or not isinstance(node.value[found][1], yaml.MappingNode):
            child = yaml.MappingNode("tag:yaml.org,2002:map", [], value.start_mark)
            pair = (yaml.ScalarNode("tag:yaml.org,2002:str", name, value.start_mark), child)
            if found is None:
                node.value.append(pair)
            else:
                node.value[found] = pair
            node = child
        else:
            node = node.value[found][1]


def _unshare(node: yaml.Node) -> None:
    """Give every place of a YAML alias a node of its own, so that overriding one leaves the others alone."""
    if isinstance(node, yaml.MappingNode):
        node.value = [(key, copy.copy(child)) for key, child in node.value]
        children = [child for _, child in node.value]
    elif isinstance(node, yaml.SequenceNode):
        node.value = children = [copy.copy(child) for child in node.value]
    else:
        return
    for child in children:
        _unshare(child)


def _build(hint: Any, node: yaml.Node | None, where: Where) -> Any:
    if dataclasses.is_dataclass(hint):
        return _build_dataclass(typing.cast(type, hint), node, where)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return _build_union(args, node, where)
    if hint is Any or hint is object:
        return _scalar_or_tree(node, where)
    if origin is Literal:
        value = _scalar_or_tree(node, where)
        if value not in args:
            meant = closest(str(value), map(str, args), OTHER_VALUES)
            asked = f"; did you mean `{meant}`?" if meant else ""
            raise where.error(node, f"must be one of {', '.join(map(str, args))}, not {value!r:.60}{asked}")
        return value
    if origin is dict:
        if not isinstance(node, yaml.MappingNode):
            raise where.error(node, "must be a mapping of names to values")
        return {name: _build(args[1], child, where.child(name)) for name, _, child in _pairs(node, where)}
    if origin in (list, tuple):
        if not isinstance(node, yaml.SequenceNode):
            given = f": [{node.value}]" if isinstance(node, yaml.ScalarNode) and node.value else ""
            raise where.error(node, f"must be a list{given}")
        item_hints = list(args) if origin is tuple and args[-1] is not Ellipsis else [args[0]] * len(node.value)
        if len(item_hints) != len(node.value):
            raise where.error(node, f"must have {len(item_hints)} items, not {len(node.value)}")
        items = [
            _build(item, child, where.child(str(i)))
            for i, (item, child) in enumerate(zip(item_hints, node.value, strict=True))
        ]
        return tuple(items) if origin is tuple else items
    return _build_scalar(hint, node, where)


def _build_dataclass(cls: type, node: yaml.Node | None, where: Where) -> Any:
    if node is None or (isinstance(node, yaml.ScalarNode) and node.tag.endswith(":null")):
        node = yaml.MappingNode("tag:yaml.org,2002:map", [], node.start_mark if node is not None else None)
    if not isinstance(node, yaml.MappingNode):
        raise where.error(node, "must be a mapping of keys to values")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    values: dict[str, Any] = {}
    for key, key_node, child in _pairs(node, where):
        name, hint = find_option(cls, key)
        if name not in fields:
            # Options of named things are left out: which name is meant is not known.
            keys = [*fields, *(row[0] for row in describe(cls) if ".NAME" not in row[0])]
            meant = closest_key(key, keys)
            asked = f"did you mean `{where.child(meant).key}`? Known" if meant else "known"
            raise where.child(key).error(key_node, f"unknown key; {asked} here: {', '.join(fields)}")
        if name in values:
            raise where.child(key).error(
                child, f"given twice: `{fields[name].metadata['alias']}` is the old name of `{name}`"
            )
        if key != name:
            _notice(
                where.child(key).message(child, f"now called `{name}`; the old name will not work in later versions")
            )
        values[name] = _build(hint, child, where.child(key))
        if _is_infinite(values[name]) and not fields[name].metadata.get("infinite"):
            raise where.child(key).error(child, "must be a finite number")
    missing = [name for name, field in fields.items() if name not in values and _is_required(field)]
    if missing:
        rest = [where.child(name).key for name in missing[1:]]
        what = f"this key is required{', and so are ' if rest else ''}{', '.join(f'`{key}`' for key in rest)}"
        raise where.child(missing[0]).error(node if node.start_mark else None, what)
    try:
        return cls(**values)
    except InputError as error:  # a check in __post_init__ knows the keys, this place knows the file and line
        at = next(filter(None, (_node_at(cls, node, key) for key in _QUOTED.findall(str(error)))), node)
        raise where.error(at if at.start_mark else None, str(error)) from None


def _node_at(hint: Any, node: yaml.Node, path: str) -> yaml.Node | None:
    """Return the node of a dotted path, or None; names may have dots in them, and options go by both their names."""
    if not isinstance(node, yaml.MappingNode):
        return None
    for key, child in node.value:
        name, inner = find_option(hint, key.value)
        for written in (name, key.value):
            if path == written:
                return typing.cast(yaml.Node, key)
            if path.startswith(f"{written}.") and (found := _node_at(inner, child, path[len(written) + 1 :])):
                return found
    return None


def _is_required(field: "dataclasses.Field[Any]") -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _is_infinite(value: Any) -> bool:
    values = value if isinstance(value, list | tuple) else [value]
    return any(isinstance(each, float) and math.isinf(each) for each in values)


@functools.cache  # said once, however often the same values are read
def _notice(text: str) -> None:
    print(text, file=sys.stderr)


def _build_union(args: tuple[Any, ...], node: yaml.Node | None, where: Where) -> Any:
    is_null = node is None or (isinstance(node, yaml.ScalarNode) and node.tag.endswith(":null"))
    if is_null and type(None) in args:
        return None
    options = [arg for arg in args if arg is not type(None)]
    if isinstance(node, yaml.MappingNode):  # an error in it is that of the one type which is a mapping
        options = [arg for arg in options if dataclasses.is_dataclass(arg)] or options
    if len(options) == 1:
        return _build(options[0], node, where)
    for arg in options:
        try:
            return _build(arg, node, where)
        except InputError:
            continue
    kinds = ("a mapping of keys to values" if dataclasses.is_dataclass(arg) else _kind(arg) for arg in options)
    raise where.error(node, f"must be {' or '.join(kinds)}")


def _kind(hint: Any) -> str:
    return getattr(hint, "__name__", str(hint))


def _build_scalar(hint: Any, node: yaml.Node | None, where: Where) -> Any:
    value = _scalar_or_tree(node, where)
    if hint is float:
        # YAML 1.1 reads `1e-5` (no dot) as a string; people write it all the time.
        with contextlib.suppress(ValueError, TypeError, OverflowError):
            number = math.nan if isinstance(value, bool) else float(value)
            if not math.isnan(number):
                return number
        if isinstance(value, int | float) and not isinstance(value, bool):
            raise where.error(node, f"must be a finite number, not {value!r:.60}")
    elif hint is int:
        if isinstance(value, int) and not isinstance(value, bool):
            if not -(2**63) <= value < 2**63:
                raise where.error(node, f"must fit 64 bits, not {value!r:.60}")
            return value
    elif hint is str:
        if isinstance(value, str):
            return value
        if isinstance(node, yaml.ScalarNode) and value is not None:
            return str(node.value)
    elif isinstance(value, hint):
        return value
    raise where.error(node, f"must be {getattr(hint, '__name__', hint)}, not {value!r:.60}")


def _pairs(node: yaml.MappingNode, where: Where) -> list[tuple[str, yaml.Node, yaml.Node]]:
    """Return the name of each key, its node and that of its value."""
    pairs: list[tuple[str, yaml.Node, yaml.Node]] = []
    seen: set[str] = set()
    for key, child in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise where.error(key, "keys must be plain names")
        if not key.value.isprintable():
            raise where.error(key, f"{key.value!r:.60} cannot be a key: it holds control characters")
        if key.value in seen:
            raise where.child(key.value).error(key, "this key is given twice")
        seen.add(key.value)
        name, colon, value = key.value.partition(":")
        if colon and node.flow_style and isinstance(child, yaml.ScalarNode) and not child.value:
            raise where.error(key, f"`{key.value}` needs a space after the colon: {{{name}: {value}}}")
        pairs.append((key.value, key, child))
    return pairs


def _scalar_or_tree(node: yaml.Node | None, where: Where) -> Any:
    if node is None:
        return None
    constructor = yaml.constructor.SafeConstructor()
    try:
        return constructor.construct_document(node)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date or a number that does not exist
        raise where.error(node, getattr(error, "problem", None) or str(error)) from None
