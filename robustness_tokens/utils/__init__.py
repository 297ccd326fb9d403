"""Files, strict values, processes, the version."""

from .files import (
    MAX_JSON_BYTES,
    flush_to_disk,
    has_cache_hash,
    json_values,
    read_json,
    replacing,
    write_bytes,
    write_text,
)
from .processes import PROCESS_GROUP, process_state, share_from_main
from .strict import (
    MAX_INT,
    MAX_NAME,
    MAX_TEXT,
    check_choice,
    check_int,
    check_keys,
    check_number,
    check_parameters,
    check_text,
)
from .version import __version__


__all__ = [
    "MAX_INT",
    "MAX_JSON_BYTES",
    "MAX_NAME",
    "MAX_TEXT",
    "PROCESS_GROUP",
    "__version__",
    "check_choice",
    "check_int",
    "check_keys",
    "check_number",
    "check_parameters",
    "check_text",
    "flush_to_disk",
    "has_cache_hash",
    "json_values",
    "process_state",
    "read_json",
    "replacing",
    "share_from_main",
    "write_bytes",
    "write_text",
]
