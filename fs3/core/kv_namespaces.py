"""What a namespace of the KV cache is to the metadata service: a directory whose entries may be chunks."""

from __future__ import annotations

import json
from typing import Final

from fs3.v1.meta_pb2 import Layout

ATTRIBUTE: Final = b"user.fs3.kvcache"
# The space of chunk ids that entries have; their inode is the namespace's directory.
SPACE: Final = 1
# Formats of the attribute: entries in the memory of the nodes, and entries that are chunks.
FORMAT_MEMORY: Final = 1
FORMAT_DURABLE: Final = 2
# More than any table has.
CHAINS_MAX: Final = 1 << 16


def durable_layout(attribute: bytes) -> Layout | None:
    """The chains of a namespace whose entries are chunks; None for any other value of the attribute. Pure.

    Users write the attribute, so it may be anything.
    """
    try:
        fields = json.loads(attribute)
        if fields["format"] != FORMAT_DURABLE or not 0 < fields["chains"] <= CHAINS_MAX:
            return None
        table_id, table_version = fields["table"]
        return Layout(
            table_id=table_id,
            table_version=table_version,
            chunk_bytes=fields["chunk_bytes"],
            stripe=fields["chains"],
            first=fields["first"],
        )
    except (ValueError, KeyError, TypeError):
        return None
