"""A store of any engine made as unreliable as a remote one."""

from __future__ import annotations

from typing import Any

from fs3.kv.api import CommitUnknown, KvStore, Transaction
from fs3.kv.faults import CommitFault, KvFaults


class FaultyStore:
    """Passes everything on to `inner`; while there are ``faults``, reads and commits fail as they say."""

    def __init__(self, inner: KvStore) -> None:
        self.inner = inner
        self.faults: KvFaults | None = None

    def transaction(self) -> Transaction:
        """See KvStore."""
        transaction: Any = _FaultyTransaction(self, self.inner.transaction())
        return transaction  # type: ignore[no-any-return]

    async def close(self) -> None:
        """See KvStore."""
        await self.inner.close()


class _FaultyTransaction:
    def __init__(self, store: FaultyStore, inner: Transaction) -> None:
        self._store = store
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    async def _before_read(self) -> None:
        faults = self._store.faults
        if faults is not None:
            await faults.delay()
            faults.on_read()

    async def get(self, key: bytes, *, snapshot: bool = False) -> bytes | None:
        await self._before_read()
        return await self._inner.get(key, snapshot=snapshot)

    async def get_range(self, begin: bytes, end: bytes, **options: Any) -> list[tuple[bytes, bytes]]:
        await self._before_read()
        return await self._inner.get_range(begin, end, **options)

    async def commit(self) -> None:
        faults = self._store.faults
        fault = None if faults is None else faults.on_commit()
        if fault is CommitFault.UNKNOWN_NOT_APPLIED:
            self._inner.cancel()
            raise CommitUnknown("injected: the outcome is not known")
        await self._inner.commit()
        if fault is CommitFault.UNKNOWN_APPLIED:
            raise CommitUnknown("injected: the outcome is not known")
