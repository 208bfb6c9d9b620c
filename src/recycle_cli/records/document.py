"""What every document is made of, and the parts that several of them share."""

import json
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from recycle_cli.errors import InputError


class Part(BaseModel):
    """A piece of a document. Immutable; unknown fields are ignored, NaN is refused."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class Document(Part):
    """A whole document: one line of JSON with its schema in front."""

    kind: ClassVar[str]
    major: ClassVar[int] = 1

    @classmethod
    def schema_name(cls) -> str:
        """The value of the `schema` field, as in `recycle.merge/1`."""
        return f"recycle.{cls.kind}/{cls.major}"

    def to_line(self) -> str:
        """One line of JSON, without the line break."""
        fields = {"schema": self.schema_name(), **self.model_dump(mode="json")}
        return json.dumps(fields, ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_fields(cls, fields: dict[str, Any], where: str) -> Self:
        """The document held by a parsed line.

        Raises:
            InputError: a field is missing or has the wrong type; `where` names the line.
        """
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(step) for step in first["loc"])
            raise InputError(
                f"{where}: {cls.schema_name()} has a bad field {field!r}: {first['msg']}",
                "pass the line on as the command printed it",
            ) from error


class AdapterRef(Part):
    """An adapter by identity.

    `revision` is the Hub commit, null for a folder; `sha256` is that of the weights file; `path`
    is the folder that holds it, one that PEFT can load unless the adapter routes.
    """

    id: str
    revision: str | None = None
    sha256: str
    path: str


class TaskRef(Part):
    """A task by identity; `sha256` is over its rows, `path` is what `--task` takes.

    `revision` is the commit of a data set of the Hub, null where the rows are from elsewhere or it
    is not known.
    """

    name: str
    sha256: str
    path: str
    revision: str | None = None


class RankRange(Part):
    """The smallest and largest rank among an adapter's modules."""

    min: int
    max: int


class Run(Part):
    """How a result came to be: what it takes to run it again, and what it cost.

    `peak_memory_bytes` is what the process held in main memory; `peak_device_memory_bytes` what
    tensors held on the accelerator, null without one.
    """

    seed: int
    versions: dict[str, str]
    command: list[str]
    elapsed_s: float
    peak_memory_bytes: int
    peak_device_memory_bytes: int | None = None
