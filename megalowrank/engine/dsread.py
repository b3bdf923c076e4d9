"""Reading a DeepSpeed JSON: every key checked against its decision in ``dskeys``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from megalowrank.engine.dskeys import Only, Refused, Table, Value
from megalowrank.errors import ConfigError, nearest

AUTO = "auto"
_LONGEST = 60
_LONGEST_PATH = 200


def load(path_or_dict: str | Path | dict[str, Any]) -> dict[str, Any]:
    """The object in a JSON file, or the dictionary itself; nothing is checked yet but the syntax."""
    if isinstance(path_or_dict, dict):
        return path_or_dict
    name = f"DeepSpeed JSON {_shown_path(str(path_or_dict))}"
    try:
        text = Path(path_or_dict).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{name} cannot be read", getattr(error, "strerror", None) or "no text") from None
    try:
        found = json.loads(text, object_pairs_hook=_without_duplicates, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{name} is not JSON", " ".join(str(error).split())) from None
    if not isinstance(found, dict):
        raise ConfigError(f"{name} is not an object", shown(found))
    return found


def check(raw: dict[str, Any], table: Table, path: str = "") -> dict[str, Any]:
    """The keys of ``raw`` that are read, with checked values; ``path`` is the dotted path of ``raw``."""
    kept: dict[str, Any] = {}
    for name, value in raw.items():
        key = f"{path}{_label(name)}"
        decision = table.get(name) if isinstance(name, str) else None
        if decision is None:
            close = nearest(name if isinstance(name, str) else "", table)
            hint = f"; did you mean {path}{close}?" if close else ""
            raise ConfigError(f"{key} is no key of the DeepSpeed JSON{hint}")
        if isinstance(decision, Value):
            kept[name] = _value(value, decision, key)
        elif isinstance(decision, dict):
            kept[name] = check(_object(value, key), decision, f"{key}.")
        else:
            _refuse_unless_harmless(value, decision, key)
    return kept


def shown(value: Any) -> str:
    """A value on one short line."""
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, (list, tuple)):
        return f"a list of {len(value)}"
    if isinstance(value, int) and abs(value) > sys.maxsize**2:
        return "a huge number"
    if not isinstance(value, (str, int, float, type(None))):
        return f"a {type(value).__name__}"
    text = json.dumps(value)
    return text if len(text) <= _LONGEST else text[:_LONGEST] + "..."


def _shown_path(path: str) -> str:
    """A path on one line; of a very long one the end, which tells files apart."""
    return json.dumps(path if len(path) <= _LONGEST_PATH else "..." + path[-_LONGEST_PATH:])


def _label(name: Any) -> str:
    """A key on one short line, without quotes where it is a plain name."""
    text = shown(name)
    return text[1:-1] if isinstance(name, str) and text == f'"{name}"' else text


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the key {shown(name)} stands there twice")
        found[name] = value
    return found


def _refuse_constant(text: str) -> Any:
    raise ValueError(f"{text} is not a number")


def _object(value: Any, key: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{key} is not an object", shown(value), "an object {...}")
    return value


def _refuse_unless_harmless(value: Any, decision: Only | Refused, key: str) -> None:
    """Raise ConfigError unless the value asks for what happens anyway."""
    if isinstance(decision, Only):
        if not _same(value, decision.value) and not _same(value, decision.also):
            raise ConfigError(f"{key} is not supported: {decision.reason}", shown(value), shown(decision.value))
        return
    off = decision.switch and isinstance(value, dict) and value.get("enabled") is False
    if not off:
        raise ConfigError(f"{key} is not supported: {decision.reason}")


def _same(value: Any, other: Any) -> bool:
    return other is not None and isinstance(value, bool) == isinstance(other, bool) and value == other


def _value(value: Any, spec: Value, key: str) -> Any:
    if spec.auto and value == AUTO:
        return AUTO
    readers = {"bool": _bool, "int": _int, "number": _number, "text": _text, "texts": _texts, "betas": _betas}
    return readers[spec.kind](value, spec, key)


def _wrong(value: Any, spec: Value, key: str, kind: str) -> ConfigError:
    return ConfigError(f"{key} is not {kind}", shown(value), f'{kind}, or "auto"' if spec.auto else kind)


def _bool(value: Any, spec: Value, key: str) -> bool:
    if not isinstance(value, bool):
        raise _wrong(value, spec, key, "true or false")
    return value


def _int(value: Any, spec: Value, key: str) -> int:
    """Also reads 5e8, which JSON makes a float."""
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    if isinstance(value, bool) or not whole or abs(value) > sys.maxsize:
        raise _wrong(value, spec, key, "a whole number")
    number = int(value)
    if spec.choices and number not in spec.choices:
        raise ConfigError(f"{key} is out of range", number, ", ".join(map(str, spec.choices)))
    if number < spec.minimum:
        raise ConfigError(f"{key} is out of range", number, f">= {spec.minimum}")
    if number % spec.multiple:
        raise ConfigError(f"{key} is not a multiple of {spec.multiple}", number)
    return number


def _number(value: Any, spec: Value, key: str) -> float:
    """NaN and the infinities are no numbers."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= sys.float_info.max:
        raise _wrong(value, spec, key, "a number")
    if value < spec.minimum:
        raise ConfigError(f"{key} is out of range", shown(value), f">= {spec.minimum}")
    return float(value)


def _text(value: Any, spec: Value, key: str) -> str:
    """One of the choices; case does not matter, as in DeepSpeed."""
    if isinstance(value, str) and value.lower() in spec.choices:
        return value.lower()
    reason = f": {spec.reason}" if spec.reason and isinstance(value, str) else ""
    raise ConfigError(f"{key} is not supported{reason}", shown(value), ", ".join(spec.choices))


def _texts(value: Any, spec: Value, key: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise _wrong(value, spec, key, "a list of names")
    return list(value)


def _betas(value: Any, spec: Value, key: str) -> list[float]:
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise _wrong(value, spec, key, "a list of two numbers")
    betas = [_number(item, spec, key) for item in value]
    if max(betas) >= 1:
        raise ConfigError(f"{key} is out of range", betas, "0 <= beta < 1")
    return betas
