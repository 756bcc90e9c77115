"""Rows of numbers that may not fit into memory."""

import dataclasses
import functools
import tempfile
from typing import Any, ClassVar

import numpy as np

_IN_MEMORY = 2**26  # bytes; more lie in a file without a name in the folder for temporary files
_file = functools.partial(tempfile.SpooledTemporaryFile, _IN_MEMORY)


@dataclasses.dataclass(eq=False)
class Rows:
    """float32 (N, D), in bounded memory: rows are added at the end, and a slice reads some.

    Attributes:
        shape: (N, D); D is that of the rows added last.
    """

    ndim: ClassVar[int] = 2
    dtype: ClassVar[np.dtype] = np.dtype(np.float32)
    shape: tuple[int, int] = (0, 0)
    _file: Any = dataclasses.field(default_factory=_file)

    def add(self, rows_BxD: np.ndarray) -> None:
        self._file.seek(0, 2)
        self._file.write(np.ascontiguousarray(rows_BxD, self.dtype).data)
        self.shape = len(self) + len(rows_BxD), rows_BxD.shape[1]

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> np.ndarray:
        start, stop, _ = rows.indices(len(self))
        size = self.shape[1] * self.dtype.itemsize  # bytes
        self._file.seek(start * size)
        data = self._file.read(max(0, stop - start) * size)
        return np.frombuffer(data, self.dtype).reshape(-1, self.shape[1])

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        return self[:].astype(dtype or self.dtype)
