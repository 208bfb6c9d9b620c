"""The methods that commands offer, as documents."""

from recycle_cli.merging.catalog import METHODS, WEIGHT_USES, MergeMethod
from recycle_cli.records import MethodDocument, MethodParameter


def merge_methods() -> list[MethodDocument]:
    """Every rule of `recycle merge`."""
    return [_describe(method) for method in METHODS.values()]


def _describe(method: MergeMethod) -> MethodDocument:
    return MethodDocument(
        command="merge",
        name=method.name,
        summary=method.summary,
        detail=method.detail,
        formula=method.formula,
        paper=method.paper,
        parameters=[
            MethodParameter(
                name=parameter.name,
                option=parameter.option,
                help=parameter.help,
                range=parameter.range,
                default=method.defaults[parameter.name],
            )
            for parameter in method.parameters
        ],
        weights=f"{method.weights}: {WEIGHT_USES[method.weights]}",
        invariant=method.invariant,
        lossless=None if method.lossless is None else dict(method.lossless),
        most_adapters=method.most_adapters,
    )
