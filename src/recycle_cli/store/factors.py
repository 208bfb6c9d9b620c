"""The factors in a weights file whose header was checked, read from where the header says.

Mapping the file would do too, but what was read of a mapped file stays in the process's memory,
up to the size of the whole file.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from recycle_cli.lora.config import AdapterConfig
from recycle_cli.lora.folder import check_pair
from recycle_cli.lora.update import LowRankUpdate
from recycle_cli.store.safetensors_header import LENGTH_BYTES, TensorInfo, header_length

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
Pair = tuple[TensorInfo, TensorInfo]


class FactorsFile:
    """A weights file, one module of which is read at a time. Close it.

    Args:
        path: the file.
        pairs: module path -> what its header says of A and B.
        config: the adapter's configuration.
    """

    def __init__(self, path: Path, pairs: Mapping[str, Pair], config: AdapterConfig) -> None:
        self._pairs, self._config = pairs, config
        self._file: BinaryIO = path.open("rb")
        self._start = LENGTH_BYTES + header_length(self._file.read(LENGTH_BYTES))

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def read(self, module: str) -> LowRankUpdate:
        """One module's update, factors in float32.

        Raises:
            AdapterProblem: they do not fit each other or the configuration.
            OSError: they cannot be read.
        """
        a, b = self._pairs[module]
        check_pair(module, a.shape, b.shape, self._config)
        scale = self._config.scale_of(module, a.shape[0])
        return LowRankUpdate(self._tensor(a).float(), self._tensor(b).float(), scale)

    def _tensor(self, info: TensorInfo) -> Tensor:
        self._file.seek(self._start + info.start)
        data = bytearray(info.end - info.start)
        if self._file.readinto(data) != len(data):  # type: ignore[attr-defined]  # of open files
            raise OSError(f"{self._file.name} became shorter while it was read")
        return torch.frombuffer(data, dtype=DTYPES[info.dtype]).reshape(info.shape)
