"""FoundationDB's error codes in the terms of :mod:`fs3.kv.api`.

Source of the codes: https://apple.github.io/foundationdb/api-error-codes.html and ``flow/error_definitions.h``.
"""

from __future__ import annotations

from typing import Any

from fs3.kv.api import (
    CommitUnknown,
    Conflict,
    KvError,
    LimitExceeded,
    TooOld,
    Unavailable,
    UsedAfterCommit,
)

TRANSACTION_CANCELLED = 1025
TRANSACTION_TIMED_OUT = 1031

_MEANING: dict[int, type[KvError]] = {
    1004: Unavailable,  # timed_out
    1007: TooOld,  # transaction_too_old
    1009: Unavailable,  # future_version: this storage server lags behind the snapshot
    1020: Conflict,  # not_committed
    1021: CommitUnknown,  # commit_unknown_result
    1022: CommitUnknown,  # commit_unknown_result_fatal
    TRANSACTION_CANCELLED: UsedAfterCommit,
    1026: Unavailable,  # connection_failed
    TRANSACTION_TIMED_OUT: Unavailable,
    1037: Unavailable,  # process_behind
    1038: Unavailable,  # database_locked: by an operator or a restore; it ends
    1039: CommitUnknown,  # cluster_version_changed
    1042: Unavailable,  # commit_proxy_memory_limit_exceeded: refused before it was queued
    1051: Unavailable,  # batch_transaction_throttled
    1078: Unavailable,  # grv_proxy_memory_limit_exceeded
    1213: Unavailable,  # tag_throttled
    1223: Unavailable,  # proxy_tag_throttled
    1235: Unavailable,  # transaction_throttled_hot_shard
    2017: UsedAfterCommit,  # used_during_commit
    2101: LimitExceeded,  # transaction_too_large
    2102: LimitExceeded,  # key_too_large
    2103: LimitExceeded,  # value_too_large
}

# These end the wait for a commit that may be under way: FoundationDB itself does not say whether it took effect.
_UNKNOWN_IN_COMMIT = frozenset({1004, TRANSACTION_CANCELLED, 1026, 1030, TRANSACTION_TIMED_OUT, 1100, 1101})
# 2000 .. 2999: the client asked for something illegal, so nothing was sent.
_REFUSED = range(2000, 3000)


def describe(failure: Any) -> str:
    """Return FoundationDB's own text and code of an ``FDBError``."""
    text = failure.description
    return f"FoundationDB: {text.decode() if isinstance(text, bytes) else text} ({failure.code})"


def read_error(failure: Any) -> KvError:
    """Translate the ``FDBError`` of a read. What is not known is not retried."""
    return _MEANING.get(failure.code, KvError)(describe(failure))


def commit_error(failure: Any) -> KvError:
    """Translate the ``FDBError`` of a commit. What is not known to have left the data alone may have been committed."""
    code = failure.code
    if code in _UNKNOWN_IN_COMMIT or (code not in _MEANING and code not in _REFUSED):
        return CommitUnknown(describe(failure))
    return read_error(failure)
