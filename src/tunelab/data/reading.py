"""Bytes of a file → JSON-like rows, each with its exact place.

Our own reader, because libraries that read in bulk hide which line was bad, or drop it. The place is the physical
1-based line in JSON Lines and CSV (of a CSV row: its first line; the header is line 1), and the 1-based element or row
number in a JSON array and in Parquet, which have no lines to speak of.

Accepted without a word: a UTF-8 byte-order mark (Windows editors write it, and it carries no data), `\\r\\n` line ends,
blank lines. Refused: every other encoding, NUL bytes, NaN and Infinity (not JSON), a key given twice in one object
(parsers disagree about which one counts), anything after the end of a gzip stream that is not gzip.
"""

from __future__ import annotations

import csv
import gzip
import json
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, BinaryIO

from tunelab.data.problems import BadRecord, Problem, describe, one_line
from tunelab.errors import DataError
from tunelab.types import Origin

Row = tuple[Origin, dict[str, Any]]

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".csv", ".csv.gz", ".parquet")
"""File names this reader accepts, in any case."""

BLOCK_BYTES = 1 << 18
BLOCK_ROWS = 512
"""What is read, and handed to another process, at a time: some hundred records."""

_UTF8_BOM = b"\xef\xbb\xbf"
_UTF16_BOMS = (b"\xff\xfe", b"\xfe\xff")


def data_suffix(name: str) -> str | None:
    """The one of SUFFIXES that `name` ends with, or None."""
    return next((suffix for suffix in SUFFIXES if name.lower().endswith(suffix)), None)


@dataclass(frozen=True)
class RawLines:
    """Whole lines of a JSON Lines file, not yet parsed: quick to cut off, and cheap to hand to another process.

    `number` is that of the first line. `done`: how much of the file has been read by the end of them, 0 to 1.
    """

    name: str
    number: int
    data: bytes
    done: float

    def rows(self) -> Iterator[Row | Problem]:
        return _read_json_lines(self.data, self.name, self.number)


@dataclass(frozen=True)
class ParsedRows:
    """Rows of a file that only one process can read. `done` as in RawLines."""

    items: tuple[Row | Problem, ...]
    done: float

    def rows(self) -> Iterator[Row | Problem]:
        return iter(self.items)


Block = RawLines | ParsedRows


def read_blocks(file: BinaryIO, name: str, suffix: str) -> Iterator[Block]:
    """The rows of one file, a few hundred at a time; a line that cannot be read is a Problem in its place.

    `name` is the file as the user named it, `suffix` one of SUFFIXES. JSON Lines, CSV and Parquet are never in memory
    as a whole; a JSON array is. Raises DataError, naming the file and where possible the line, if the file as a whole
    cannot be read or holds no record.
    """
    size = max(1, os.fstat(file.fileno()).st_size)

    def done() -> float:
        return min(1.0, file.tell() / size)

    if suffix == ".parquet":
        blocks: Iterator[Block] = _parquet_blocks(file, name)
    else:
        chunks = _without_mark(_gunzip(file, name) if suffix.endswith(".gz") else _chunks(file), name)
        kind = suffix.removesuffix(".gz")
        if kind == ".jsonl":
            blocks = _line_blocks(chunks, name, done)
        elif kind == ".csv":
            blocks = row_blocks(_read_csv(_decoded_lines(chunks, name), name), done)
        else:
            blocks = row_blocks(_read_json_array(b"".join(chunks), name), done)
    empty = True
    for block in blocks:
        empty = empty and isinstance(block, RawLines) and block.data.isspace()
        yield block
    if empty:
        raise DataError(f"{name}: empty file; expected at least one record")


def row_blocks(rows: Iterable[Row | Problem], done: Callable[[], float]) -> Iterator[ParsedRows]:
    """Rows, BLOCK_ROWS at a time. `done` is asked at the end of each block."""
    rows = iter(rows)
    while block := tuple(islice(rows, BLOCK_ROWS)):
        yield ParsedRows(block, done())


# --- bytes ---------------------------------------------------------------------------------------------------------


def _chunks(file: BinaryIO) -> Iterator[bytes]:
    while chunk := file.read(BLOCK_BYTES):
        yield chunk


def _gunzip(file: BinaryIO, name: str) -> Iterator[bytes]:
    line = 1
    head = file.read(2)
    file.seek(0)
    if not head:
        raise DataError(f"{name}: empty file; expected gzip data")
    try:
        with gzip.GzipFile(fileobj=file) as stream:
            while chunk := stream.read1(BLOCK_BYTES):
                yield chunk
                line += chunk.count(b"\n")
    except EOFError:
        raise DataError(f"{name}:{line}: the gzip data is cut short here; download or copy the file again") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        if head != b"\x1f\x8b":
            raise DataError(f"{name}: named .gz but not gzip data; rename it, or compress it") from None
        raise DataError(f"{name}: damaged gzip data ({error}); download or copy the file again") from None


def _without_mark(chunks: Iterator[bytes], name: str) -> Iterator[bytes]:
    """The chunks less a UTF-8 byte-order mark."""
    head = b""
    while len(head) < len(_UTF8_BOM) and (chunk := next(chunks, b"")):
        head += chunk
    if head.startswith(_UTF16_BOMS):
        raise DataError(f"{name}: encoded as UTF-16; save it as UTF-8")
    yield head.removeprefix(_UTF8_BOM)
    yield from chunks


def _whole_lines(chunks: Iterator[bytes], size: int) -> Iterator[bytes]:
    """The same bytes, cut behind line ends only, at least `size` of them at a time."""
    kept: list[bytes] = []
    length = 0
    for chunk in chunks:
        cut = chunk.rfind(b"\n") + 1
        if cut and length + cut >= size:
            yield b"".join((*kept, chunk[:cut]))
            kept, length, chunk = [], 0, chunk[cut:]
        kept.append(chunk)
        length += len(chunk)
    if length:
        yield b"".join(kept)


# --- JSON ----------------------------------------------------------------------------------------------------------


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise BadRecord("json", f"key '{twice}' appears twice in one object; keep one")
    return found


def _refuse_constant(name: str) -> None:
    raise BadRecord("json", f"{name} is not JSON; use null or a number")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)


def _line_blocks(chunks: Iterator[bytes], name: str, done: Callable[[], float]) -> Iterator[RawLines]:
    number = 1
    for data in _whole_lines(chunks, BLOCK_BYTES):
        yield RawLines(name, number, data, done())
        number += data.count(b"\n")


def _read_json_lines(data: bytes, name: str, first: int) -> Iterator[Row | Problem]:
    for number, line in enumerate(data.split(b"\n"), start=first):
        if not line.strip():
            continue
        origin = Origin(name, number)
        try:
            yield origin, _object(_parse_line(line))
        except BadRecord as bad:
            yield bad.at(origin)


def _parse_line(line: bytes) -> Any:
    if (at := line.find(b"\0")) >= 0:
        raise BadRecord("encoding", f"NUL byte at column {at + 1}; the file is damaged, or not text")
    try:
        return _DECODER.decode(line.decode("utf-8").strip())
    except UnicodeDecodeError as error:
        message = f"not UTF-8 (byte 0x{line[error.start]:02x} at column {error.start + 1}); save the file as UTF-8"
        raise BadRecord("encoding", message) from None
    except json.JSONDecodeError as error:
        raise BadRecord("json", f"not JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise BadRecord("json", "not readable as JSON: nested too deeply") from None
    except ValueError as error:  # an integer of more digits than Python converts
        raise BadRecord("json", f"not readable as JSON: {error}") from None


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BadRecord("json", f"expected a JSON object {{…}}, got {describe(value)}")
    return value


def _read_json_array(data: bytes, name: str) -> Iterator[Row | Problem]:
    if not data.strip():
        return
    text = _decode(data, name)
    try:
        value = _DECODER.decode(text.strip())
    except json.JSONDecodeError as error:
        hint = "; one object a line? then name it .jsonl" if error.msg == "Extra data" else ""
        line = text[: len(text) - len(text.lstrip())].count("\n") + error.lineno
        raise DataError(f"{name}:{line}: not JSON: {error.msg} at column {error.colno}{hint}") from None
    except RecursionError:
        raise DataError(f"{name}: not readable as JSON: nested too deeply") from None
    except (BadRecord, ValueError) as error:
        raise DataError(f"{name}: {one_line(str(error))}") from None
    if not isinstance(value, list):
        raise DataError(f"{name}: expected a JSON list of records [{{…}}, …], got {describe(value)}")
    for number, element in enumerate(value, start=1):
        origin = Origin(name, number)
        try:
            yield origin, _object(element)
        except BadRecord as bad:
            yield bad.at(origin)


# --- CSV -----------------------------------------------------------------------------------------------------------


def _read_csv(lines: Iterator[str], name: str) -> Iterator[Row | Problem]:
    # The csv module's limit on a cell (131,072 characters) is process-wide and shorter than a long document.
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(lines, strict=True)
    header: list[str] | None = None
    line = 1
    try:
        for cells in reader:
            first, line = line, reader.line_num + 1
            if not cells:
                continue  # a blank line
            if header is None:
                header = _csv_header(cells, name, first)
            elif len(cells) != len(header):
                message = f"{len(cells)} cells, and the header has {len(header)} columns; quote cells that hold commas"
                yield Problem(Origin(name, first), message, "row")
            else:
                yield Origin(name, first), {key: _cell(key, cell) for key, cell in zip(header, cells, strict=True)}
    except csv.Error as error:
        raise DataError(f"{name}:{line}: not CSV from here on: {error}") from None


def _csv_header(cells: list[str], name: str, line: int) -> list[str]:
    for index, cell in enumerate(cells):
        if not cell.strip():
            raise DataError(f"{name}:{line}: column {index + 1} has no name in the header")
        if cell in cells[:index]:
            raise DataError(f"{name}:{line}: column '{one_line(cell)}' appears twice in the header")
    return cells


def _cell(column: str, text: str) -> str | bool:
    """CSV knows text only; `label` is the one field of any shape that is not text."""
    if column == "label" and text.lower() in ("true", "false"):
        return text.lower() == "true"
    return text


def _decoded_lines(chunks: Iterator[bytes], name: str) -> Iterator[str]:
    """Text as the csv module wants it: a line at a time with its end, which may be that of an old Macintosh."""
    number = 0
    for data in _whole_lines(chunks, BLOCK_BYTES):
        for line in data.splitlines(keepends=True):
            number += 1
            yield _decode(line, name, number)


def _decode(data: bytes, name: str, first: int = 1) -> str:
    """`data` as text; it begins with line `first` of the file. Raises DataError with line and column."""

    def place(at: int) -> tuple[int, int]:
        return first + data.count(b"\n", 0, at), at - data.rfind(b"\n", 0, at)

    if (at := data.find(b"\0")) >= 0:
        line, column = place(at)
        raise DataError(f"{name}:{line}: NUL byte at column {column}; the file is damaged, or not text")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line, column = place(error.start)
        raise DataError(
            f"{name}:{line}: not UTF-8 (byte 0x{data[error.start]:02x} at column {column}); save the file as UTF-8"
        ) from None


# --- Parquet -------------------------------------------------------------------------------------------------------


def _parquet_blocks(file: BinaryIO, name: str) -> Iterator[ParsedRows]:
    # Imported here: pyarrow costs a quarter of a second, and most data is JSON Lines.
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not file.read(1):
        return
    file.seek(0)
    try:
        table = pq.ParquetFile(file)
        names: list[str] = table.schema_arrow.names
        if len(set(names)) < len(names):
            twice = next(column for column, count in Counter(names).items() if count > 1)
            raise DataError(f"{name}: column '{twice}' appears twice")
        number = 0
        for batch in table.iter_batches(BLOCK_ROWS):
            rows = tuple((Origin(name, at), values) for at, values in enumerate(batch.to_pylist(), start=number + 1))
            number += len(rows)
            yield ParsedRows(rows, number / table.metadata.num_rows)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{name}: not readable as Parquet: {reason}; download or write the file again") from None
