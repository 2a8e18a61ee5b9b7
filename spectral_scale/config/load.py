"""From YAML files and `--section.key value` overrides to one checked RunConfig.

Later sources win: defaults, then `spectral.settings`, then the file, then the command line. Unknown
keys are errors that name the nearest key. Values are checked against the schema's types by
jsonargparse.
"""

import argparse
import dataclasses
import difflib
import functools
import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser, set_parsing_settings

from spectral_scale.config.named_settings import add_named_settings
from spectral_scale.config.schema import RunConfig
from spectral_scale.errors import ConfigError
from spectral_scale.files.paths import user_path

MAX_FILE_BYTES = 1 << 20
PATH_KEYS = frozenset(
    ("model.path", "data.train", "data.validation", "parallel.deepspeed_config", "train.run_dir")
)
"""Keys whose values are files and folders."""
_LEADING_ZERO = re.compile(r"[-+]?0[0-9_]+")


@dataclass(frozen=True, kw_only=True)
class ResolvedConfig:
    """A configuration and where each of its values came from."""

    config: RunConfig
    """The values."""
    sources: dict[str, str]
    """Dotted key -> "default", "spectral.settings NAME", a file's name, or "command line"."""

    def to_yaml(self, *, with_sources: bool = False) -> str:
        """The configuration as YAML, each value's source as a comment if asked for."""
        if not with_sources:
            return yaml.safe_dump(to_dict(self.config), sort_keys=False)
        lines = []
        for section, values in to_dict(self.config).items():
            lines.append(f"{section}:")
            for key, value in values.items():
                text = yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()
                lines.append(f"  {key}: {text}  # {self.sources[f'{section}.{key}']}")
        return "\n".join(lines) + "\n"


def to_dict(config: RunConfig) -> dict[str, dict[str, Any]]:
    """Plain nested dicts, lists and scalars (JSON- and YAML-safe)."""
    raw = dataclasses.asdict(config)
    raw["optimizer"]["betas"] = list(raw["optimizer"]["betas"])
    return raw


def known_keys() -> list[str]:
    """Every dotted key of the schema, in its order."""
    return [
        f"{section.name}.{field.name}"
        for section in dataclasses.fields(RunConfig)
        for field in dataclasses.fields(section.type)  # type: ignore[arg-type]
    ]


def load_config(files: Sequence[str | Path] = (), overrides: Sequence[str] = ()) -> ResolvedConfig:
    """Merge YAML files and command-line overrides over the defaults. Raises ConfigError.

    Args:
        files: YAML files, later ones win.
        overrides: `--section.key value` or `--section.key=value` words.
    """
    values: dict[str, Any] = {}
    sources = dict.fromkeys(known_keys(), "default")
    for file in files:
        for key, value in _flatten(_read_yaml(Path(file)), str(file)):
            values[key], sources[key] = value, str(file)
    for key, value in _pairs(overrides):
        values[key], sources[key] = value, "command line"
    for key in PATH_KEYS & values.keys():
        if isinstance(values[key], str):
            values[key] = user_path(values[key], what=f"{sources[key]}: {key}")
    add_named_settings(values, sources)
    return ResolvedConfig(config=_build(values, sources), sources=sources)


def config_from_dict(raw: Mapping[str, Any], origin: str) -> RunConfig:
    """Rebuild a RunConfig from nested dicts, as stored in a run folder."""
    values = dict(_flatten(raw, origin))
    return _build(values, dict.fromkeys(values, origin))


def _read_yaml(path: Path) -> Mapping[str, Any]:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ConfigError(f"{path} is larger than {MAX_FILE_BYTES} bytes: not a configuration")
        raw = yaml.load(path.read_text(encoding="utf-8"), Loader=_PlainLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"configuration file {path} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"configuration file {path} is not plain YAML: {error}") from None
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise ConfigError(
            f"{path} must hold sections (model:, spectral:, ...), not a {type(raw).__name__}"
        )
    return raw


class _PlainLoader(yaml.SafeLoader):
    """Safe YAML in which nothing is given twice or expanded: each would hide what a run uses."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.MarkedYAMLError(problem="aliases are not allowed", problem_mark=mark)
        return super().compose_node(parent, index)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """A decimal number; YAML 1.1 would make 64 of 0100 and 90 of 1:30."""
        if _LEADING_ZERO.fullmatch(str(node.value)) or ":" in node.value:
            problem = f"{node.value}: {_ZERO_REMEDY}"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
        return int(super().construct_yaml_int(node))

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(
                    problem="a key must be a name", problem_mark=key.start_mark
                )
            if key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"{key.value} is given twice", problem_mark=key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_PlainLoader.add_constructor("tag:yaml.org,2002:int", _PlainLoader.construct_yaml_int)
_ZERO_REMEDY = (
    "not a decimal number (YAML takes a leading zero for octal and a colon for base 60); write it "
    "without, or in quotes if it is a name"
)


def _flatten(raw: Mapping[str, Any], origin: str) -> Iterator[tuple[str, Any]]:
    sections = [section.name for section in dataclasses.fields(RunConfig)]
    for section, body in raw.items():
        if section not in sections:
            raise ConfigError(f"{origin}: {_unknown(str(section), sections, 'section')}")
        if body is None:  # every key of the section is commented out
            continue
        if not isinstance(body, Mapping):
            raise ConfigError(
                f"{origin}: section {section} must hold keys, not {reprlib.repr(body)}"
            )
        for key, value in body.items():
            yield _known(f"{section}.{key}", origin), value


def _pairs(words: Sequence[str]) -> Iterator[tuple[str, Any]]:
    queue = list(words)
    while queue:
        word = queue.pop(0)
        if not word.startswith("--"):
            raise ConfigError(
                f"command line: {word!r} is not expected; overrides are --section.key value"
            )
        key, equals, value = word[2:].partition("=")
        _known(key, "command line")
        if not equals:
            if not queue or queue[0].startswith("--"):
                raise ConfigError(f"command line: --{key} needs a value, as in --{key} VALUE")
            value = queue.pop(0)
        if key not in PATH_KEYS and _LEADING_ZERO.fullmatch(value):
            raise ConfigError(f"command line: --{key} {value}: {_ZERO_REMEDY}")
        yield key, value


def _known(key: str, origin: str) -> str:
    if key not in known_keys():
        raise ConfigError(f"{origin}: {_unknown(key, known_keys(), 'key')}")
    return key


def _unknown(given: str, known: Sequence[str], what: str) -> str:
    near = max(known, key=lambda key: _likeness(given, key))
    hint = f"; did you mean {near}?" if _likeness(given, near) > 0.6 else ""
    return f"unknown {what} {given}{hint} (--print-config lists all)"


def _likeness(given: str, key: str) -> float:
    """How likely `key` was meant: by its own name first (whole or in part), then by section."""
    (section, _, name), (other, _, own) = given.rpartition("."), key.rpartition(".")
    part = 0.5 if len(name) > 2 and (name in own or own in name) else 0.0
    similar = difflib.SequenceMatcher(None, name, own).ratio()
    return similar + part + 0.2 * difflib.SequenceMatcher(None, section, other).ratio()


@functools.cache  # reading the schema's source takes longer than parsing a configuration
def build_parser() -> ArgumentParser:
    """The jsonargparse parser of the schema: type checks and the generated help."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(exit_on_error=False, usage=argparse.SUPPRESS, add_help=False)
    parser.add_class_arguments(RunConfig)
    return parser


def _build(values: Mapping[str, Any], sources: Mapping[str, str]) -> RunConfig:
    nested: dict[str, dict[str, Any]] = {}
    for dotted, value in values.items():
        section, key = dotted.split(".")
        nested.setdefault(section, {})[key] = value
    parser = build_parser()
    try:
        config = parser.instantiate(parser.parse_object(nested)).as_dict()
    except argparse.ArgumentError as error:
        raise ConfigError(_type_error(str(error), values, sources)) from None
    return RunConfig(**config)


def _type_error(message: str, values: Mapping[str, Any], sources: Mapping[str, str]) -> str:
    """jsonargparse's message in the words of a configuration file."""
    message = re.sub(r"<class '(\w+)'>", r"\1", " ".join(message.split()))
    message = message.replace("Expected a typing.Literal", "Expected one of ").replace(
        "a int.", "an int."
    )
    culprit = next((key for key in values if f'"{key}"' in message), None)
    if culprit is None:
        return message
    message = message.removeprefix(f'Parser key "{culprit}": ')
    return (
        f"{sources[culprit]}: {culprit}={reprlib.repr(values[culprit])}: {message} "
        "(--help-config describes every key)"
    )
