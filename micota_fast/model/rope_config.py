"""RoPE in config.json: both spellings are read, what disagrees is refused, both are written. Imports no torch.

transformers 5 keeps everything in `rope_parameters`. transformers 4, and the tools built on it, read `rope_theta` and
`rope_scaling`, and ignore the new key in silence. People add `rope_scaling` to files of either kind, as model cards
tell them to; it then takes precedence over a `rope_parameters` that says "default", as in transformers 5.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeVar, get_args

from micota_fast.model.json_keys import Keys

T = TypeVar("T")
RopeType = Literal["default", "linear", "llama3", "yarn"]


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding (RoFormer, arXiv 2104.09864) and its scaling for longer contexts.

    The fields carry the names and defaults of the `rope_parameters` of transformers 5 (`rope_scaling` before it).
    `factor` belongs to all types but default; `low_freq_factor` and `high_freq_factor` to llama3;
    `original_max_position_embeddings` (tokens) to llama3 and yarn; the rest to yarn.
    """

    rope_type: RopeType = "default"
    rope_theta: float = 10000.0
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


_KNOWN = {field.name for field in fields(RopeConfig)} | {"type", "partial_rotary_factor"}
_TOP = {"rope_theta", "rope_scaling", "rope_parameters"}


def read_rope(keys: Keys, max_position_embeddings: int) -> RopeConfig:
    """Read RoPE from the top level of a config.json.

    Raises:
        InputError: a key that is not known, a bad value, or two places that disagree, both of them named.
    """
    for key, value in keys.d.items():
        if key.startswith(("rope_", "rotary_")) and key not in _TOP and value not in (None, False):
            raise keys.refuse(key, f"{value!r} is not supported; remove it if the checkpoint does not depend on it")
    _refuse_partial(keys)
    objects = [
        _object(keys, name) for name in ("rope_scaling", "rope_parameters") if keys.d.get(name) not in (None, {})
    ]
    theta = _one([keys, *objects], "rope_theta", lambda place: place.number("rope_theta")) or 10000.0
    ropes = [_read(keys, place, theta, max_position_embeddings) for place in objects]
    if len(ropes) == 2 and ropes[1].rope_type != "default":
        for field in fields(RopeConfig):
            one, other = (getattr(rope, field.name) for rope in ropes)
            if one != other:
                raise keys.refuse(
                    "rope_scaling",
                    f"its {field.name} is {one}, but that of rope_parameters is {other}; make the two agree, or remove "
                    "one",
                )
    return ropes[0] if ropes else RopeConfig(rope_theta=theta)


def written_rope(rope: RopeConfig, raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys that make a config.json say to any reader what `rope` is, which was read from `raw`.

    A file that has only `rope_theta` and `rope_scaling` keeps them as they are: all readers understand them.
    """
    scaling, parameters = raw.get("rope_scaling"), raw.get("rope_parameters")
    stated: dict[str, Any] = {"rope_type": rope.rope_type, "rope_theta": rope.rope_theta}
    if rope.rope_type != "default":
        stated["factor"] = rope.factor  # no reader but transformers 5 works it out, if it is null
    written: dict[str, Any] = {}
    if isinstance(parameters, Mapping):
        whole = {key: value for key, value in (scaling or parameters).items() if key != "type"}
        for key, value in stated.items():
            if whole.get(key) is None:
                whole[key] = value
        written["rope_theta"] = rope.rope_theta
        written["rope_parameters"] = whole
        if rope.rope_type != "default":
            written["rope_scaling"] = whole
    elif scaling:
        if "rope_theta" in scaling:
            written["rope_theta"] = rope.rope_theta
        if "factor" in stated and scaling.get("factor") is None:
            written["rope_scaling"] = {**scaling, "factor": rope.factor}
    return written


def _object(keys: Keys, name: str) -> Keys:
    d = keys.d[name]
    if not isinstance(d, Mapping):
        raise keys.refuse(name, f"expected an object, found {type(d).__name__}")
    place = Keys(d, keys.where, f"{name}.")
    for key, value in d.items():
        if key == "attn_factor":
            raise place.refuse(
                key,
                "some programs multiply YaRN's attention factor by it, others ignore it; state the product as "
                "`attention_factor`",
            )
        if key not in _KNOWN and value is not None:
            raise place.refuse(key, f"unknown; known here: {', '.join(sorted(_KNOWN))}")
    _refuse_partial(place)
    return place


def _refuse_partial(place: Keys) -> None:
    factor = place.d.get("partial_rotary_factor")
    if factor not in (None, 1, 1.0):
        raise place.refuse("partial_rotary_factor", f"{factor!r} is not supported, only 1.0")


def _one(places: Sequence[Keys], key: str, read: Callable[[Keys], T]) -> T | None:
    """The value of a key that several places may state; None if none does."""
    stating = [place for place in places if place.d.get(key) is not None]
    values = [read(place) for place in stating]
    for place, value in zip(stating, values, strict=True):
        if value != values[0]:
            raise stating[0].refuse(
                key, f"{values[0]}, but {place.prefix}{key} is {value}; make the two agree, or remove one"
            )
    return values[0] if values else None


def _read(keys: Keys, place: Keys, theta: float, max_position_embeddings: int) -> RopeConfig:
    """RoPE of one of the two objects."""
    d = place.d
    names = [d[key] for key in ("rope_type", "type") if d.get(key) is not None]
    if len(names) == 2 and names[0] != names[1]:
        raise place.refuse("rope_type", f"{names[0]!r}, but {place.prefix}type is {names[1]!r}; make the two agree")
    rope_type: Any = names[0] if names else "default"
    if rope_type not in get_args(RopeType):
        raise place.refuse(
            "rope_type", f"{rope_type!r} is not supported; supported are {', '.join(get_args(RopeType))}"
        )
    if rope_type == "default":
        if d.get("factor") not in (None, 1):
            stated = f"is {rope_type!r}" if names else "is missing"
            raise place.refuse("rope_type", f"{stated}, but {place.prefix}factor is {d['factor']!r}; say which scaling")
        return RopeConfig(rope_theta=theta)
    if rope_type == "linear":
        return RopeConfig(rope_type, theta, factor=place.number("factor"))
    length = "original_max_position_embeddings"
    original = _one([keys, place], length, lambda place: place.positive_int(length)) or max_position_embeddings
    if rope_type == "llama3":
        low, high = place.number("low_freq_factor"), place.number("high_freq_factor")
        if not low < high:
            raise place.refuse("low_freq_factor", f"{low} is not below high_freq_factor {high}")
        return RopeConfig(rope_type, theta, place.number("factor"), original, low, high)
    return RopeConfig(
        rope_type,
        theta,
        place.number("factor", max_position_embeddings / original),
        original,
        beta_fast=place.number("beta_fast", 32.0),
        beta_slow=place.number("beta_slow", 1.0),
        attention_factor=place.optional_number("attention_factor"),
        mscale=place.optional_number("mscale"),
        mscale_all_dim=place.optional_number("mscale_all_dim"),
        truncate=place.boolean("truncate", True),
    )
