"""`--help` that fits the reader: settings in groups, one line of help and the default each, one spelling a flag."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import shutil
from typing import Any

from transformers import HfArgumentParser

from common.errors import DEBUG_FLAG

GROUP = "group"  # key of a field's metadata: the heading that begins with this field
LIMITS = ("minimum", "maximum", "above", "below")  # keys of a number's range, see common.config.check_numbers
_LARGEST_WIDTH = 120
_METAVARS = {int: "N", float: "X", str: "TEXT"}


class GroupedParser(HfArgumentParser):
    """A parser of one config dataclass whose `--help` shows its fields under the headings of `field_groups`."""

    def __init__(self, config_class: type) -> None:
        self._titles = field_groups(config_class)
        super().__init__(
            config_class, allow_abbrev=False, description=config_class.__doc__, formatter_class=_Formatter,
            usage="%(prog)s [--config FILE.yaml ...] [--setting value ...]",
        )  # fmt: skip
        self.add_argument(
            "--config", metavar="FILE.yaml", nargs="+",
            help="YAML files with any of the keys below; a later file wins over those before it, flags over all.",
        )
        # common.errors.run_command takes it out of the arguments, so that it is here to be shown.
        self.add_argument(DEBUG_FLAG, action="store_true", help="Show the traceback of an error too.")

    def _add_dataclass_arguments(self, dtype: Any) -> None:
        titles = dict.fromkeys(self._titles.values())
        self._heading = {title: self.add_argument_group(title) for title in titles}
        super()._add_dataclass_arguments(dtype)

    def _parse_dataclass_field(self, parser: argparse.ArgumentParser, field: dataclasses.Field) -> None:
        field = copy.copy(field)
        field.metadata = {key: value for key, value in field.metadata.items() if key not in (GROUP, *LIMITS)}
        heading = self._heading[self._titles[field.name]]
        HfArgumentParser._parse_dataclass_field(heading, field)
        if field.default is True:
            heading._group_actions[-1].help = argparse.SUPPRESS  # --no_x is told beside --x


def field_groups(config_class: type) -> dict[str, str]:
    """The heading of each field, the class's own first, then those of its bases in the order of inheritance.

    A field with `group` in its metadata begins a heading, which holds until the next one in the same class. What stands
    before the first one is headed by the first line of the class's docstring, for the config class itself by
    "settings". A field that a class defines anew stays where its base put it.
    """
    defined: dict[type, list[dataclasses.Field]] = {}
    known: set[str] = set()
    for owner in filter(dataclasses.is_dataclass, reversed(config_class.__mro__)):
        defined[owner] = [field for field in dataclasses.fields(owner) if field.name not in known]
        known.update(field.name for field in defined[owner])
    groups: dict[str, str] = {}
    for owner, fields in reversed(defined.items()):
        title = "settings" if owner is config_class else (owner.__doc__ or "").strip().splitlines()[0].rstrip(".")
        for field in fields:
            title = field.metadata.get(GROUP, title)
            groups[field.name] = title
    return groups


class _Formatter(argparse.HelpFormatter):
    """Help texts as they are written (a per cent sign is one), each with its default."""

    def __init__(self, prog: str) -> None:
        width = min(shutil.get_terminal_size().columns, _LARGEST_WIDTH)
        super().__init__(prog, max_help_position=32, width=width - 2)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        flags = [flag for flag in action.option_strings if "-" not in flag[2:]]  # --a-b is --a_b to the parser too
        if action.nargs == 0:
            return ", ".join(flags)
        return f"{', '.join(flags)} {self._format_args(action, self._get_default_metavar_for_optional(action))}"

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return "true|false" if isinstance(action.default, bool) else _METAVARS.get(action.type, action.dest.upper())

    def _expand_help(self, action: argparse.Action) -> str:
        if action.default in (None, argparse.SUPPRESS) or action.dest == DEBUG_FLAG.removeprefix("--"):
            return action.help or ""
        return f"{action.help} (default: {shown_default(action.default)}{_negation(action)})"


def shown_default(value: Any) -> str:
    """A default as `--help` shows it, in the form in which a flag takes it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return " ".join(map(str, value)) or "empty"
    return str(value) or "empty"


def _negation(action: argparse.Action) -> str:
    return f"; --no_{action.dest}: false" if action.default is True else ""
