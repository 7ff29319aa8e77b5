"""Files and datasets into raw records: one dict per row with the place it came from."""

from __future__ import annotations

import csv
import difflib
import gzip
import io
import json
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

from configs.errors import UserError

if TYPE_CHECKING:
    from configs.schema.common import Source

TEXT_SUFFIXES = (".jsonl", ".json", ".csv", ".txt")
HUB_NAME = re.compile(r"(?:[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*")  # no path: the library would read whatever lies there
SUFFIXES = (*TEXT_SUFFIXES, ".parquet")


class Record(NamedTuple):
    """One raw row; `where` is "file:line" for .jsonl, .csv and .txt, "file:index" (from 0) for .json, .parquet and hf."""

    fields: dict[str, Any]
    where: str


def read_records(source: Source, problems: list[str]) -> Iterator[Record]:
    """Yield at most `source.limit` records with columns renamed to ours; lines that do not parse go to `problems`.

    Raises UserError for a file that is missing, of unknown type, not UTF-8, or broken as a whole.
    """
    records = _read_hub(source) if source.path.startswith("hf:") else _read_path(Path(source.path), problems)
    for number, record in enumerate(islice(records, source.limit)):
        if not isinstance(record.fields, dict):
            found = type(record.fields).__name__
            problems.append(f"{record.where}: a row must be an object with named fields, found a {found}")
            continue
        yield _rename(record, source.columns, first=number == 0)


def suffix_of(path: Path) -> str:
    """The suffix that says how to read, without .gz."""
    return Path(path.stem).suffix.lower() if path.suffix.lower() == ".gz" else path.suffix.lower()


def _rename(record: Record, columns: dict[str, str], first: bool) -> Record:
    if not columns:
        return record
    missing = [theirs for theirs in columns.values() if theirs not in record.fields]
    if first and missing:
        raise UserError(
            f"{record.where}: `columns` maps from {', '.join(map(repr, missing))}, which the row does not have; "
            f"its columns are {', '.join(map(repr, record.fields))}"
        )
    taken = set(columns.values())
    fields = {name: value for name, value in record.fields.items() if name not in taken}
    fields.update({ours: record.fields.get(theirs) for ours, theirs in columns.items()})
    return Record(fields, record.where)


def _read_path(path: Path, problems: list[str]) -> Iterator[Record]:
    suffix = suffix_of(path)
    if not path.is_file():
        raise UserError(_missing(path))
    if suffix not in SUFFIXES or (suffix == ".parquet" and path.suffix.lower() == ".gz"):
        raise UserError(f"{path}: cannot tell how to read {suffix or 'a file without suffix'!r}; expected {', '.join(SUFFIXES)}")
    if suffix == ".parquet":
        yield from _read_parquet(path)
        return
    try:
        with _open_text(path) as stream:
            if suffix == ".jsonl":
                yield from _read_jsonl(path, stream, problems)
            elif suffix == ".json":
                yield from _read_json(path, stream)
            elif suffix == ".csv":
                yield from _read_csv(path, stream)
            else:
                yield from _read_text(path, stream)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text (byte {error.start}: {error.reason}); convert it to UTF-8") from None
    except (gzip.BadGzipFile, EOFError) as error:
        raise UserError(f"{path}: is not a whole gzip file ({error})") from None


def _missing(path: Path) -> str:
    if path.is_dir():
        return f"{path}: is a folder; expected a file ({', '.join(SUFFIXES)})"
    siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, siblings, n=3)
    hint = f"; did you mean {', '.join(close)}?" if close else ""
    if not path.parent.is_dir():
        hint = f"; its folder {path.parent} does not exist either"
    return f"{path}: no such file{hint} (a Hugging Face dataset is written hf:OWNER/NAME)"


def _open_text(path: Path) -> TextIO:
    if path.suffix.lower() == ".gz":
        return io.TextIOWrapper(io.BufferedReader(_Unpacked(path), 2**16), encoding="utf-8-sig", newline="")
    return path.open(encoding="utf-8-sig", newline="")


class _Unpacked(io.RawIOBase):
    """The content of a gzip file, up to 256 MiB or a hundred times its size: text that people write packs to a tenth, rarely to a fiftieth."""

    def __init__(self, path: Path) -> None:
        self._path, self._count = path, 0
        self._stream = gzip.GzipFile(path, "rb")  # closed with this
        self._limit = max(2**28, 100 * path.stat().st_size)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._stream.readinto(buffer)
        self._count += count
        if self._count > self._limit:
            raise UserError(f"{self._path}: unpacks to more than {self._limit / 2**20:.0f} MiB, over a hundred times its size; if that is meant, unpack it (gunzip) and give the file")
        return count

    def close(self) -> None:
        self._stream.close()
        super().close()


def _read_jsonl(path: Path, stream: TextIO, problems: list[str]) -> Iterator[Record]:
    for number, line in enumerate(stream, start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            yield Record(json.loads(line), where)
        except json.JSONDecodeError as error:
            problems.append(f"{where}: broken JSON: {error.msg} at column {error.colno}")
        except (ValueError, RecursionError) as error:  # an integer of thousands of digits, brackets without end
            problems.append(f"{where}: unusable JSON: {str(error).partition(';')[0]}")


def _read_json(path: Path, stream: TextIO) -> Iterator[Record]:
    try:
        content = json.load(stream)
    except json.JSONDecodeError as error:
        hint = "; one object per line needs the suffix .jsonl" if error.msg == "Extra data" else ""
        raise UserError(f"{path}:{error.lineno}: broken JSON: {error.msg} at column {error.colno}{hint}") from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, UnicodeDecodeError):
            raise
        raise UserError(f"{path}: unusable JSON: {str(error).partition(';')[0]}") from None
    if isinstance(content, dict):
        content = [content]
    if not isinstance(content, list):
        raise UserError(f"{path}:1: expected a list of objects or one object, found {type(content).__name__}")
    for index, fields in enumerate(content):
        yield Record(fields, f"{path}:{index}")


def _read_csv(path: Path, stream: TextIO) -> Iterator[Record]:
    csv.field_size_limit(2**27)
    reader = csv.DictReader(stream, strict=True)
    start = 2
    try:
        for fields in reader:
            where, start = f"{path}:{start}", reader.line_num + 1
            if None in fields or any(value is None for value in fields.values()):
                raise UserError(f"{where}: the number of cells differs from the header's {len(reader.fieldnames or [])}")
            yield Record({name: _parse_cell(value) for name, value in fields.items()}, where)
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}: broken CSV: {error}") from None


def _parse_cell(value: str) -> Any:
    """Message lists travel through CSV as JSON; every other cell is text."""
    if value.startswith(("[{", '{"')):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _read_text(path: Path, stream: TextIO) -> Iterator[Record]:
    for number, line in enumerate(stream, start=1):
        if line.strip():
            yield Record({"text": line.rstrip("\r\n")}, f"{path}:{number}")


def _read_parquet(path: Path) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            index = 0
            for batch in file.iter_batches(batch_size=1024):
                for fields in batch.to_pylist():
                    yield Record(_as_written(fields), f"{path}:{index}")
                    index += 1
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise UserError(f"{path}: is not a readable parquet file: {error}") from None


def _as_written(fields: dict[str, Any]) -> dict[str, Any]:
    """A row of a columnar file without the nulls in its turns and tools: there every object has the keys of all, so a call of one tool the arguments of others."""
    return {name: _without_nulls(value) if name in ("messages", "tools") else value for name, value in fields.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_nulls(one) for one in value]
    return {key: _without_nulls(one) for key, one in value.items() if one is not None} if isinstance(value, dict) else value


def _read_hub(source: Source) -> Iterator[Record]:
    name = source.path.removeprefix("hf:")
    if not HUB_NAME.fullmatch(name):
        raise UserError(f"{source.path}: expected hf:OWNER/NAME, a data set of the hub; a file on disk is given by its path alone")
    try:
        import datasets

        dataset = datasets.load_dataset(name, split=source.hf_split, revision=source.revision)
    except Exception as error:  # the hub client raises many unrelated types
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"{source.path}: split {source.hf_split!r} could not be loaded: {reason[0]}. Check the name and the split; without "
            "network (or with HF_HUB_OFFLINE=1) load it once on a machine that has it, or save it as .jsonl or .parquet and give that file"
        ) from None
    for index, fields in enumerate(dataset):
        yield Record(_as_written(dict(fields)), f"{source.path}:{index}")
