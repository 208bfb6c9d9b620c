"""Options made from the parameters that a catalog lists."""

import inspect
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Protocol

import typer

from recycle_cli.parameters import Parameter, Value


class Takes(Protocol):
    """A method of a catalog."""

    @property
    def name(self) -> str:
        """What `--method` takes."""

    @property
    def defaults(self) -> Mapping[str, Value]:
        """Its parameters and their defaults; None lets the method choose."""


Command = Callable[..., None]


def with_parameters(
    parameters: Mapping[str, Parameter], methods: Mapping[str, Takes]
) -> Callable[[Command], Command]:
    """Gives a command an option for each parameter, in place of its **parameters.

    Typer reads a function's signature, so that is where they are put. An option that was not given
    is None.
    """

    def decorate(command: Command) -> Command:
        signature = inspect.signature(command)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        options = [_option(parameter, methods) for parameter in parameters.values()]
        # Where typer looks; mypy knows functions without it.
        vars(command)["__signature__"] = signature.replace(parameters=[*own, *options])
        return command

    return decorate


def _option(parameter: Parameter, methods: Mapping[str, Takes]) -> inspect.Parameter:
    flag = f"/--no-{parameter.option.removeprefix('--')}" if parameter.kind is bool else ""
    option = typer.Option(parameter.option + flag, help=_help(parameter, methods))
    return inspect.Parameter(
        parameter.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[parameter.kind | None, option],
    )


def _help(parameter: Parameter, methods: Mapping[str, Takes]) -> str:
    defaults: dict[Any, list[str]] = {}
    for method in methods.values():
        if parameter.name in method.defaults:
            defaults.setdefault(method.defaults[parameter.name], []).append(method.name)
    told = "; ".join(f"{', '.join(names)}: {_shown(value)}" for value, names in defaults.items())
    allowed = parameter.range[0].upper() + parameter.range[1:]
    allowed = "" if parameter.kind is bool else f" {allowed}."
    return f"{parameter.help}{allowed} Defaults: {told}."


def _shown(value: Value) -> str:
    if value is None:
        return "their own choice"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)
