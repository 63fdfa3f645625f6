"""Rows out of parquet files and Hugging Face datasets, a few at a time; pyarrow and datasets are loaded when first needed.

A damaged row group costs its own rows only; a value that is no text, its own row.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megaspark.data_prep.sources import open_dataset, open_input
from megaspark.data_prep.streams import Damage

_BATCH_ROWS = 256
_BUFFER_BYTES = 1 << 20


def parquet_rows(path: str) -> Iterator[dict[str, Any] | Damage]:
    """Each row of a parquet file as a mapping of its columns; row groups are streamed, not loaded."""
    import pyarrow
    from pyarrow.parquet import ParquetFile

    with open_input(path) as source:
        try:
            file = ParquetFile(source, buffer_size=_BUFFER_BYTES, pre_buffer=False)
        except (pyarrow.ArrowException, OSError) as error:
            yield Damage(f"no parquet file ({_short(error)})")
            return
        for group in range(file.num_row_groups):
            given = 0
            try:
                for batch in file.iter_batches(_BATCH_ROWS, row_groups=[group], use_threads=False):
                    yield from _rows(batch)
                    given += batch.num_rows
            except (pyarrow.ArrowException, OSError) as error:
                lost = file.metadata.row_group(group).num_rows - given
                yield Damage(f"damaged row group {group} ({_short(error)}), {lost:,} of its rows are lost")


def dataset_rows(name: str) -> Iterator[dict[str, Any] | Damage]:
    """Each row of a shard of a Hugging Face dataset; what the library cannot read ends the shard."""
    try:
        yield from open_dataset(name)
    except Exception as error:  # from any part of that library, or of a dataset's own store
        yield Damage(f"{type(error).__name__}: {_short(error)}; the rest of this shard is lost")


def _rows(batch: Any) -> Iterator[dict[str, Any] | Damage]:
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:  # one value of many: raised before the first row is given
        for number in range(batch.num_rows):
            try:
                yield batch.slice(number, 1).to_pylist()[0]
            except UnicodeDecodeError as error:
                yield Damage(f"not UTF-8 (byte {error.start})")


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
