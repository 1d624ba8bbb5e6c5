"""A large table that any number of processes write together, in parts that are complete or absent.

A part is a Parquet file of a fixed number of rows. A process claims it with a lock, writes it aside, and
renames it, so a process that is killed leaves nothing half-written, and the same command continues. Names
that start with a dot or an underscore are not data, by the convention of pyarrow, Spark and others.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import parquet

from hf_cifar.errors import UserError
from hf_cifar.platform import flush_to_disk, lock_file, remove_open_file
from hf_cifar.runs.folder import write_json
from hf_cifar.text import one_line

logger = logging.getLogger(__name__)
PART_ROWS = 1000
METADATA = b"hf_cifar"  # the key in a part's schema
WAIT_SECONDS = 0.2  # between two looks at a lock


class Parts:
    """The parts of a table of `num_rows` rows in a folder, with columns row_id and error.

    settings: plain values that determine the content; every part records them.
    """

    def __init__(self, folder: Path, num_rows: int, settings: dict[str, Any]) -> None:
        self.folder, self.num_rows = folder, num_rows
        self.settings = settings | {"num_rows": num_rows, "part_rows": PART_ROWS}
        self.settings_path = folder / "_settings.json"  # written first
        self.manifest_path = folder / "_manifest.json"  # written last
        self.unfinished = folder / ".unfinished"  # locks, and parts that are being written
        self.count = -(-num_rows // PART_ROWS)
        self._claims: dict[int, contextlib.ExitStack] = {}
        self._warned = False  # that nothing can be locked

    def rows(self, number: int) -> range:
        """Return the rows of a part."""
        return range(number * PART_ROWS, min((number + 1) * PART_ROWS, self.num_rows))

    def path(self, number: int) -> Path:
        """Return the file of a part."""
        return self.folder / f"part-{number:05}-of-{self.count:05}.parquet"

    def missing(self, index: int = 0, num_shards: int = 1) -> list[int]:
        """List the parts of a shard that are not there yet: every `num_shards`-th one from `index` on."""
        return [n for n in range(index, self.count, num_shards) if not self.path(n).exists()]

    def begin(self) -> None:
        """Create the folder, or continue in it.

        Raises: UserError if it holds anything else, parts with other settings, or cannot be written.
        """
        try:
            if self.folder.exists() and not self.folder.is_dir():
                raise UserError(f"--output {self.folder} is a file; pass a folder")
            if _has_files(self.folder) and not self.settings_path.exists():
                raise UserError(f"--output {self.folder} holds other files; pass a new folder")
            self.unfinished.mkdir(parents=True, exist_ok=True)
            with self._alone():
                if not self.settings_path.exists():
                    write_json(self.settings_path, self.settings)
        except OSError as error:
            raise UserError(
                f"cannot write {self.folder}: {one_line(error)}; pass another --output"
            ) from None
        self._require_same(_read(self.settings_path), self.settings_path)

    def claim(self, numbers: list[int]) -> Iterator[int]:
        """Yield the parts that are not there, and that no other process is working on.

        They are this process's until it writes or releases them, or ends.
        """
        for number in numbers:
            if self.path(number).exists():
                continue
            claim = contextlib.ExitStack()
            try:
                lock = claim.enter_context(
                    lock_file(self.unfinished / f"{number:05}.lock", create=True)
                )
            except FileNotFoundError:  # another process has just finished the table
                continue
            except NotImplementedError as error:
                if not self._warned:
                    logger.warning(
                        "cannot lock %s (%s): pass --shard, or processes may predict the same parts",
                        self.folder, error,
                    )  # fmt: skip
                self._warned = True
            else:
                if lock is None or self.path(number).exists():
                    claim.close()
                    continue
            self._claims[number] = claim
            yield number

    def write(self, number: int, table: pyarrow.Table) -> None:
        """Write a part that this process has claimed, and release it."""
        record = json.dumps({"part": number, **self.settings}, sort_keys=True)
        aside = self.unfinished / f"{number:05}.{socket.gethostname()}-{os.getpid()}.parquet"
        table = table.replace_schema_metadata({METADATA: record})
        try:
            parquet.write_table(table, aside, compression="zstd")
            flush_to_disk(aside)
            os.replace(aside, self.path(number))
        except FileNotFoundError:  # without locks, another process may have finished the table
            if not self.path(number).exists():
                raise
        self._claims.pop(number).close()

    def release(self) -> None:
        """Release the parts that this process has claimed and not written."""
        while self._claims:
            self._claims.popitem()[1].close()

    def finish(self, facts: dict[str, Any]) -> dict[str, Any]:
        """Check all parts, write the manifest and return it. facts: further values for it.

        Raises: UserError for a part that is damaged, or was made with other settings.
        """
        with self._alone():
            num_errors = sum(map(self._checked_errors, range(self.count)))
            manifest = {**facts, **self.settings, "parts": self.count, "num_errors": num_errors}
            if not self.manifest_path.exists() or _read(self.manifest_path) != manifest:
                write_json(self.manifest_path, manifest)
            flush_to_disk(self.folder)
            shutil.rmtree(self.unfinished, ignore_errors=True)
        return manifest

    def _checked_errors(self, number: int) -> int:
        """Count the errors in a part. Raises: UserError unless it holds each of its rows once."""
        path, rows = self.path(number), self.rows(number)
        try:
            with parquet.ParquetFile(path) as file:
                record = json.loads(file.schema_arrow.metadata[METADATA])
                table = file.read(["row_id", "error"])
                found = table["row_id"].to_pylist()
        except (OSError, ValueError, TypeError, LookupError, pyarrow.ArrowException) as error:
            raise UserError(
                f"{path} is damaged ({one_line(error, 200)}); remove it, and run the same command again"
            ) from None
        self._require_same(record, path)
        if record["part"] != number or found != list(rows):
            raise UserError(
                f"{path} does not hold the rows {rows.start} to {rows.stop - 1}, each once; remove it, and "
                "run the same command again"
            )
        return len(table) - table["error"].null_count

    def _require_same(self, record: dict[str, Any], path: Path) -> None:
        """Raises: UserError that names the first setting that differs from those of this process."""
        for name, value in self.settings.items():
            if record.get(name) != value:
                raise UserError(
                    f"{path} has a different {name.replace('_', ' ')} ({_short(record.get(name))} there, "
                    f"{_short(value)} now); use the same, or pass another --output"
                )

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Wait until no other process is in this block. Without locks, it does not wait."""
        path = self.folder / ".lock"
        while True:
            with contextlib.ExitStack() as stack:
                try:
                    lock = stack.enter_context(lock_file(path, create=True))
                except NotImplementedError:
                    yield
                    return
                if lock is not None:
                    try:
                        yield
                    finally:
                        remove_open_file(path, lock)
                    return
            time.sleep(WAIT_SECONDS)


def _has_files(folder: Path) -> bool:
    return folder.is_dir() and any(not each.name.startswith(".") for each in folder.iterdir())


def _short(value: Any) -> str:
    """Shorten a hash."""
    return value[:12] if isinstance(value, str) and len(value) == 64 else str(value)


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return content if isinstance(content, dict) else {}
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} is damaged ({one_line(error, 200)}); pass another --output"
        ) from None
