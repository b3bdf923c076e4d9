"""``--config FILE``: every flag as a key of a YAML or JSON file, and the ``run.json`` of an earlier run as it is."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from megalowrank.errors import ConfigError, nearest
from megalowrank.flags.fields import Flag, flags_of
from megalowrank.flags.names import foreign
from megalowrank.flags.text import read_mapping, shown, shown_path

# what run.json says about the earlier run and no flag can set
DESCRIPTIVE = {
    "world_size": "the launcher decides the number of ranks",
    "versions": "they describe an earlier run",
    "unigram_loss": "it is measured on the data",
    "bytes_per_token": "it is measured on the data",
    "labels": "they are read from the data",
}
_ELSEWHERE = {"local_rank": "the launcher sets it", "config": "a file names no further file", "help": "see --help"}
_DS_PATH = ("ds_config", "deepspeed_config")
# what a resolved DeepSpeed configuration has from the flags, which stand in the same run.json
_RESOLVED = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")


@dataclass(frozen=True)
class Setting:
    """A value of the file, the section it stands in (None: none), and the key as it is written there."""

    value: Any
    section: str | None
    key: str


@dataclass
class ConfigFile:
    """What a configuration file says, by the names of fields. ``deepspeed`` is a path or an object."""

    path: str = ""
    settings: dict[str, Setting] = field(default_factory=dict)
    deepspeed: str | dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def method(self) -> str | None:
        """The method that the file names, if it does; ConfigError if that is no text."""
        found = self.settings.get("method")
        if found is None or found.value is None:
            return None
        if not isinstance(found.value, str):
            raise self._error(found.key, "is not a name", shown(found.value), "a method")
        return found.value

    def values(self, classes: Mapping[str, type], methods: Mapping[str, type], replaced: bool) -> dict[str, Any]:
        """Checked values by field name; null where null is the default counts as not given.

        ``classes`` are the sections of this run, ``methods`` the configuration classes of all methods. If the
        command line ``replaced`` the method of the file, what only other methods know is left out, with a note.
        Raises ConfigError, naming key and file, for unknown keys, keys in a wrong section and values of a wrong type.
        """
        known = {flag.name: (section, flag) for section, cls in classes.items() for flag in flags_of(cls)}
        found, left_out = {}, []
        for name, setting in self.settings.items():
            if name not in known:
                self._refuse_unless(replaced, name, setting, known, methods)
                left_out.append(setting.key)
                continue
            section, flag = known[name]
            if setting.section not in (None, section):
                raise self._error(setting.key, "stands in a wrong section", None, f"{section}.{name}")
            if setting.value is not None or flag.default is not None:
                found[name] = self._typed(flag, setting)
        if left_out:
            self.notes.append(f"left out, because the chosen method has no such flags: {', '.join(left_out)}")
        return found

    def _error(self, key: str, what: str, got: Any = None, allowed: Any = None) -> ConfigError:
        return ConfigError(f"{shown_path(key)} in {shown_path(self.path)} {what}", got, allowed)

    def _refuse_unless(
        self, replaced: bool, name: str, setting: Setting, known: Mapping[str, Any], methods: Mapping[str, type]
    ) -> None:
        """Raise ConfigError for an unknown key, except one of another method if ``replaced``."""
        owners = [m for m, cls in methods.items() if name in {flag.name for flag in flags_of(cls)}]
        if owners and replaced and setting.section in (None, "method_config"):
            return
        if owners:
            raise self._error(setting.key, "does not belong to the method", None, f"with {' or '.join(owners)}")
        entry = foreign(name)
        if entry is not None:
            raise self._error(setting.key, f"is unknown: {entry.answer}")
        close = nearest(name, [*known, *_DS_PATH, "deepspeed"])
        raise self._error(setting.key, "is unknown, " + (f"did you mean {close}?" if close else "see docs/flags.md"))

    def _typed(self, flag: Flag, setting: Setting) -> Any:
        value, wanted = setting.value, _WANTED[flag.kind]
        if flag.kind is list and isinstance(value, (str, int, float)) and not isinstance(value, bool):
            value = [value]
        if not _fits(value, flag.kind):
            raise self._error(setting.key, f"is not {wanted}", shown(value), wanted)
        if flag.kind is float:
            value = float(value)
        if flag.kind is list:
            value = [str(item) for item in value]
        if flag.kind in (list, str) and not all(word.strip() for word in _words(value)):
            raise self._error(setting.key, "is empty", None, "at least one word")
        if flag.choices and value not in flag.choices:
            raise self._error(setting.key, "is unknown", shown(value), ", ".join(map(str, flag.choices)))
        return value


_WANTED = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text (quote it if it looks like a number)",
    list: "a list of words",
}


def _words(value: str | list[str]) -> list[str]:
    """The words of a value; one empty word where there are none."""
    return [value] if isinstance(value, str) else value or [""]


def _fits(value: Any, kind: type) -> bool:
    """Whether a value of the file may be of ``kind``; no text becomes a number, no number a truth value."""
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300
    if kind is list:
        return isinstance(value, list) and all(_fits(item, str) or _fits(item, float) for item in value)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63
    if kind is str:
        return isinstance(value, str) and "\0" not in value
    return isinstance(value, kind)


def read_config(path: str, sections: Collection[str]) -> ConfigFile:
    """Read ``path``; ``sections`` are the names a nested object may have.

    Raises ConfigError for what is not YAML or JSON, for keys that stand there twice in any spelling, and for keys
    that cannot be set in a file.
    """
    raw = read_mapping(path)
    file = ConfigFile(path)
    earlier_run = "versions" in raw
    for key, value in raw.items():
        name = key.replace("-", "_")
        if name in sections:
            _add_section(file, name, value)
        elif name in (*_DS_PATH, "deepspeed"):
            _set_deepspeed(file, name, value, earlier_run)
        elif name in DESCRIPTIVE and earlier_run:
            continue
        elif name in DESCRIPTIVE or name in _ELSEWHERE:
            raise file._error(key, f"is no setting: {(DESCRIPTIVE | _ELSEWHERE)[name]}")
        else:
            _add(file, None, key, value)
    if earlier_run:
        file.notes.append(f"settings of an earlier run ({', '.join(_facts(raw))}) from {shown_path(path)}")
    return file


def _add_section(file: ConfigFile, section: str, value: Any) -> None:
    if value is not None and not isinstance(value, dict):
        raise file._error(section, "is no section", shown(value), "keys and their values")
    for key, inner in (value or {}).items():
        _add(file, section, key, inner)


def _add(file: ConfigFile, section: str | None, key: str, value: Any) -> None:
    """Take one value; the method may stand in run.json twice, if it is the same."""
    name, full = key.replace("-", "_"), f"{section}.{key}" if section else key
    other = file.settings.get(name)
    if other is not None and not (name == "method" and other.value == value):
        raise file._error(full, "stands there twice", f"{other.key} and {full}", "once")
    file.settings[name] = Setting(value, section, full)


def _set_deepspeed(file: ConfigFile, name: str, value: Any, earlier_run: bool) -> None:
    if name == "deepspeed" and value is True:
        return
    if name == "deepspeed" and not isinstance(value, dict):
        raise file._error(name, "is not usable", shown(value), "the object itself (a path goes under ds_config)")
    if name != "deepspeed" and not (_fits(value, str) and value.strip()):
        raise file._error(name, "is not usable", shown(value), "a path (the object itself goes under deepspeed)")
    if file.deepspeed is not None:
        raise file._error(name, "is a second DeepSpeed configuration", None, "one of ds_config and deepspeed")
    file.deepspeed = _automatic(value) if earlier_run and isinstance(value, dict) else value


def _automatic(deepspeed: dict[str, Any]) -> dict[str, Any]:
    """A resolved configuration with "auto" for what it took from flags, so that flags and ranks may change."""
    found = deepspeed | {key: "auto" for key in _RESOLVED if key in deepspeed}
    if isinstance(found.get("bf16"), dict) and "enabled" in found["bf16"]:
        found["bf16"] = found["bf16"] | {"enabled": "auto"}
    return found


def _facts(raw: Mapping[str, Any]) -> Iterator[str]:
    """What run.json says about where it ran, for a note."""
    if isinstance(raw.get("versions"), dict):
        yield from (f"{shown_path(name)} {shown_path(str(value))}" for name, value in raw["versions"].items())
    if isinstance(raw.get("world_size"), int):
        yield f"world size {shown(raw['world_size'])}"
