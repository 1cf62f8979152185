"""CSV and Parquet files: their columns, in whole or by chunks, and results beside them.

Fitting reads the columns that it needs alone. Predicting keeps a file's other columns as they are: of CSV as texts.
pandas and pyarrow are imported where they are first needed: of CSV with plain numbers fitting needs pyarrow alone.
"""

import contextlib
import lzma
import os
import re
import sys
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import CommandError, unknown

STREAM = "-"  # the name of standard output
_FORMATS = {".csv": "csv", ".parquet": "parquet", ".pq": "parquet"}
_PACKED = (".gz", ".bz2", ".xz", ".zip", ".zst")  # CSV, as pandas reads and writes it
# What pandas takes for a missing value; said here so that a file means the same when it is fitted and predicted.
_NO_VALUE = ("", "NA", "N/A", "n/a", "<NA>", "#NA", "#N/A", "#N/A N/A", "NULL", "null", "None")
_NO_NUMBER = ("NaN", "nan", "-NaN", "-nan", "-1.#IND", "-1.#QNAN", "1.#IND", "1.#QNAN")
_MISSING = frozenset(_NO_VALUE + _NO_NUMBER)
_TRUTH = {"True": 1.0, "TRUE": 1.0, "true": 1.0, "False": 0.0, "FALSE": 0.0, "false": 0.0}
Columns = dict[str, NDArray[np.float64]]
_DATE = re.compile(r"\d{4}-\d\d-\d\d|\d\d?[./]\d\d?[./]\d{2,4}")


def format_of(path: str) -> str:
    """What the name's end says: "csv" or "parquet"."""
    if path == STREAM:
        return "csv"
    suffixes = Path(path).suffixes
    if suffixes and suffixes[-1].lower() in _PACKED:
        suffixes = [suffix for suffix in suffixes[:-1] if suffix.lower() == ".csv"]
    found = _FORMATS.get(suffixes[-1].lower()) if suffixes else None
    if found is None:
        raise CommandError(f"{path!r} ends in none of .csv (also .csv.gz and the like), .parquet, .pq")
    return found


def columns_of(path: str) -> list[str]:
    """The names of a file's columns."""
    kind = format_of(path)
    with _reading(path):
        if kind == "parquet":
            from pyarrow import parquet

            return list(parquet.read_schema(path).names)
        names = _plain_header(path)
        if names is not None:
            return names
        import pandas

        return [str(name) for name in pandas.read_csv(path, nrows=0).columns]


def pick(given: Sequence[str], known: Sequence[str], path: str, what: str = "column") -> list[str]:
    """Columns of a file: each text that was given is the name of one, or names separated by commas."""
    names: list[str] = []
    for text in given:
        names += [text] if text in known else [name.strip() for name in text.split(",")]
    for name in names:
        if name not in known:
            raise unknown(what, name, known, path)
        if names.count(name) > 1:
            raise CommandError(f"{what} {name!r} is given twice")
    return names


def read_numbers(path: str, names: list[str]) -> Columns:
    """These columns (n,) as float64, missing values as NaN."""
    kind = format_of(path)
    with _reading(path):
        if kind == "parquet":
            from pyarrow import parquet

            table = parquet.read_table(path, columns=names).to_pandas()
        else:
            found = _plain_numbers(path, names)
            if found is not None:
                return found
            table = _read_csv(path, names)
    if not len(table):
        raise CommandError(f"{path} has no rows")
    return numbers(table, names, path)


def _plain_header(path: str) -> list[str] | None:
    """The names of the columns of CSV, where its first line leaves no doubt about them: else pandas is to say."""
    if Path(path).suffix.lower() != ".csv":
        return None
    with open(path, "rb") as file:
        try:
            line = file.readline().decode("utf-8-sig").rstrip("\r\n")
        except UnicodeDecodeError:
            return None
    names = line.split(",")
    plain = line.isprintable() and '"' not in line and all(name.strip() for name in names)
    return names if plain and len(set(names)) == len(names) else None


def _plain_numbers(path: str, names: list[str]) -> Columns | None:
    """Columns of CSV with nothing but numbers and gaps, as pandas reads them, without its half second of imports."""
    if _plain_header(path) is None:
        return None
    try:
        from pyarrow import csv

        # A text, a truth value or a date is an error, and so are rows that are longer or shorter than the first.
        options = csv.ConvertOptions(
            include_columns=names,
            column_types=dict.fromkeys(names, "float64"),
            null_values=list(_MISSING),
            strings_can_be_null=True,
        )
        table = csv.read_csv(path, convert_options=options)
    except (ImportError, KeyError, ValueError):
        return None
    found = {}
    for name in names if len(table) else ():
        column = table[name].fill_null(np.nan) if table[name].null_count else table[name]
        # `to_numpy` of pyarrow imports pandas.
        found[name] = np.concatenate([np.from_dlpack(chunk) for chunk in column.chunks])
        if np.isinf(found[name]).any():
            return None
    return found or None


def _read_csv(path: str, names: list[str]) -> Any:
    """Some columns of CSV; in any case an error for rows longer than the header, whose values may be of others."""
    import pandas

    options: dict[str, Any] = dict(na_values=list(_MISSING), keep_default_na=False)
    try:
        # Counts the fields of every row, where pandas' own parser does so only if it reads all columns.
        return pandas.read_csv(path, usecols=names, engine="pyarrow", **options)
    except (ImportError, KeyError, ValueError):
        # Not installed; columns of one name, line breaks in quotes; or an error that the next line tells better.
        return pandas.read_csv(path, index_col=False, low_memory=False, **options)[names]


def numbers(table: Any, names: Sequence[str], path: str, start: int = 0) -> Columns:
    """These columns of a table as float64; an error that says where the first text is.

    `start` is the number of rows before the table's first.
    """
    return {name: _number_column(table[name], name, path, start) for name in names}


def _number_column(column: Any, name: str, path: str, start: int) -> NDArray[np.float64]:
    import pandas

    kinds = pandas.api.types
    if kinds.is_datetime64_any_dtype(column) or kinds.is_timedelta64_dtype(column):
        raise CommandError(_no_dates(path, name))
    if kinds.is_numeric_dtype(column) or kinds.is_bool_dtype(column):
        if kinds.is_complex_dtype(column):
            raise CommandError(f"{path}: column {name!r} holds complex numbers")
        found = column.to_numpy(dtype=np.float64, na_value=np.nan)
    else:
        objects = column.astype(object)
        found = np.array(pandas.to_numeric(objects, errors="coerce"), dtype=np.float64)
        for row in np.flatnonzero(np.isnan(found) & objects.notna().to_numpy()):
            value = objects.iloc[row]
            text = value.strip() if isinstance(value, str) else value
            if isinstance(text, str) and text in _MISSING:
                continue
            if isinstance(text, str) and text in _TRUTH:
                found[row] = _TRUTH[text]
                continue
            if isinstance(text, bytes):
                raise CommandError(f"{path}: column {name!r} is no text in UTF-8 in row {start + row + 1:,}")
            if hasattr(text, "isoformat") or (isinstance(text, str) and _DATE.match(text)):
                raise CommandError(_no_dates(path, name))
            raise CommandError(
                f"{path}: column {name!r} is to hold numbers, and row {start + row + 1:,} has {value!r}"
            )
    if np.isinf(found).any():
        first = start + int(np.isinf(found).argmax()) + 1
        raise CommandError(f"{path}: column {name!r} has an infinite value in row {first:,}")
    return found


def _no_dates(path: str, name: str) -> str:
    return f"{path}: column {name!r} holds dates, which are no numbers: make a column of days, say, of them"


def chunks(path: str, rows: int) -> Iterator[Any]:
    """The file as tables (pandas) of at most `rows` rows, columns of CSV as texts; one without rows if it has none."""
    kind = format_of(path)
    with _reading(path):
        if kind == "csv":
            import pandas

            with pandas.read_csv(
                path, dtype=str, index_col=False, keep_default_na=False, chunksize=rows
            ) as reader:
                yield from reader
            return
        from pyarrow import parquet

        with parquet.ParquetFile(path) as file:
            empty = True
            for batch in file.iter_batches(batch_size=rows):
                empty = False
                yield batch
            if empty:
                yield file.schema_arrow.empty_table()


class Writer:
    """Writes tables one after the other to a file that appears under its name when all is written.

    A chunk is a table of pandas (CSV) or of pyarrow (Parquet), with columns to append.
    """

    def __init__(self, path: str):
        self.path, self.kind = path, format_of(path)
        self._parquet: Any = None
        self._text: Any = None
        self._part = path
        if path != STREAM:
            check_output(path)
            # The same end: by it pandas packs.
            self._part = str(Path(path).with_name(f".{os.getpid()}.{Path(path).name}"))

    def write(self, chunk: Any, added: dict[str, Any]) -> None:
        """Append rows with the columns of `chunk` and those that are added."""
        if self.kind == "parquet":
            self._write_parquet(chunk, added)
            return
        table = chunk if hasattr(chunk, "iloc") else chunk.to_pandas()
        first = self._text is None
        if first:
            self._text = sys.stdout if self.path == STREAM else self._open()
        table.assign(**added).to_csv(self._text, index=False, header=first)

    def _open(self) -> Any:
        from pandas.io.common import get_handle

        self._handles = get_handle(self._part, "w", compression="infer", encoding="utf-8")
        return self._handles.handle

    def _write_parquet(self, chunk: Any, added: dict[str, Any]) -> None:
        import pyarrow
        from pyarrow import parquet

        if hasattr(chunk, "iloc"):
            table = pyarrow.Table.from_pandas(chunk, preserve_index=False).replace_schema_metadata()
        else:
            table = chunk if isinstance(chunk, pyarrow.Table) else pyarrow.Table.from_batches([chunk])
        for name, values in added.items():
            table = table.append_column(name, pyarrow.array(values, from_pandas=True))
        if self._parquet is None:
            self._parquet = parquet.ParquetWriter(self._part, table.schema)
        self._parquet.write_table(table)

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if self._parquet is not None:
            self._parquet.close()
        if self.path == STREAM:
            return
        if self._text is not None:
            self._handles.close()
        if kind is None:
            os.replace(self._part, self.path)
        else:
            with contextlib.suppress(FileNotFoundError):
                os.remove(self._part)


def check_output(path: str) -> None:
    """Refuse a name that cannot be written, before the work."""
    if os.path.isdir(path):
        raise CommandError(f"cannot write {path!r}: it is a directory")
    folder = os.path.dirname(path) or "."
    if not os.path.isdir(folder):
        raise CommandError(f"cannot write {path!r}: there is no directory {folder!r}")
    if not os.access(path if os.path.exists(path) else folder, os.W_OK):
        raise CommandError(f"cannot write {path!r}: permission denied")


@contextlib.contextmanager
def _reading(path: str) -> Iterator[None]:
    """What may be wrong with a file, as messages."""
    try:
        if not os.path.exists(path):
            raise CommandError(f"there is no file {path!r}")
        if os.path.isdir(path):
            raise CommandError(f"{path!r} is a directory")
        if not os.path.getsize(path):
            raise CommandError(f"{path} is empty")
        with warnings.catch_warnings():
            # Rows longer than the header: pandas would cut them off.
            warnings.filterwarnings("error", "Length of header or names")
            yield
    except PermissionError as error:
        raise CommandError(f"cannot read {path!r}: permission denied") from error
    except UnicodeDecodeError as error:
        raise CommandError(f"{path} is no text in UTF-8 (byte {error.start:,})") from error
    except (
        ValueError,
        OSError,
        EOFError,
        Warning,
        zipfile.BadZipFile,
        zlib.error,
        lzma.LZMAError,
    ) as error:
        # Of pandas and pyarrow, whose messages say what they tripped over, in a line or more.
        text = " ".join(str(error).split())
        raise CommandError(f"cannot read {path}: {text}") from error
