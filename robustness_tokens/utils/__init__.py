"""Files, strict readers of values and tensors, processes, the version."""

from .files import (
    LEFTOVERS,
    MAX_JSON_BYTES,
    check_own_file,
    flush_to_disk,
    has_cache_hash,
    in_use,
    json_values,
    local_path,
    naming,
    read_bytes,
    read_json,
    replacing,
    write_bytes,
    write_text,
    write_together,
)
from .processes import PROCESS_GROUP, process_state, share_from_main
from .strict import (
    MAX_NAME,
    MAX_TEXT,
    check_bool,
    check_choice,
    check_dict,
    check_fields,
    check_fingerprint,
    check_finite,
    check_int,
    check_keys,
    check_list,
    check_number,
    check_numbers,
    check_parameters,
    check_pattern,
    check_schema,
    check_text,
    check_type,
    digest,
    digest_json,
    read_tensors,
)
from .strict_yaml import add_scalars, read_yaml
from .version import __version__
