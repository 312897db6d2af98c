"""Writers fill slots and note what was acknowledged; readers check every byte against what may be there at the time."""

from __future__ import annotations

from pathlib import Path

from tests.torture import manifest
from tests.torture.content import Slot, WrongBytes, fill, slots_of, versions
from tests.torture.worker import Client, Handle, Job, Worker

SYNC_EVERY = 10
MOUNT_SYNC_EVERY = 3
REOPEN_EVERY = 40
WHOLE_FILE_EVERY = 25
# A slot is read anew so often when a page of it is half old and half new.
TORN_READS_MAX = 3


class Writer(Worker):
    """Fills the slots of one file. Nobody else writes it."""

    def __init__(self, job: Job, number: int, client: Client, file: int) -> None:
        super().__init__(job, number, client)
        self.file = file
        self.slots = slots_of(file)
        known = manifest.replay(job.manifest(file))
        self.manifest = manifest.Manifest(job.manifest(file))
        for slot, record in known.items():
            for version in record.open_versions():
                self.manifest.fail(slot, version)
        # Slot -> (epoch of the power, version) of what is acknowledged, or at the mount written, and not synced.
        self.unsynced: dict[int, tuple[int, int]] = {}
        self.handle: Handle | None = None
        self.writes = 0

    def step(self) -> None:
        empty = next((s for s in self.slots if self.board.issued(self.file, s.number) == 0), None)
        self.write(empty or self.rng.choice(self.slots))
        self.writes += 1
        if self.writes % (MOUNT_SYNC_EVERY if self.client.mounted else SYNC_EVERY) == 0:
            self.sync()

    def settle(self) -> None:
        """All slots filled once, everything synced if the cluster lets us."""
        for slot in self.slots:
            while self.board.issued(self.file, slot.number) == 0:
                try:
                    self.write(slot)
                except OSError as e:
                    self.refused(e)
        if self.unsynced:
            try:
                self.sync()
            except OSError as e:
                self.refused(e)

    def opened(self) -> Handle:
        if self.handle is None:
            self.handle = self.client.open(self.file, write=True)
        return self.handle

    def drop_handle(self) -> None:
        handle, self.handle = self.handle, None
        if handle is not None:
            try:
                handle.close()
            except OSError as e:
                self.refused(e)

    def write(self, slot: Slot) -> None:
        handle = self.opened()
        version = self.board.issued(self.file, slot.number) + 1
        self.manifest.issue(slot.number, version)
        self.board.issue(self.file, slot.number, version)
        epoch = self.board.power
        try:
            handle.pwrite(fill(slot, version), slot.offset)
        except OSError:
            self.manifest.fail(slot.number, version)
            self.forget_unsynced()
            self.drop_handle()
            raise
        if not self.client.mounted:
            if not self.within(epoch):
                self.manifest.fail(slot.number, version)
                return
            self.acknowledged(slot.number, version, epoch)
        self.unsynced[slot.number] = (epoch, version)

    def within(self, epoch: int) -> bool:
        """Whether the power was on from when `epoch` was read until now."""
        return epoch % 2 == 0 and self.board.power == epoch

    def acknowledged(self, slot: int, version: int, epoch: int) -> None:
        self.manifest.acknowledge(slot, version, epoch)
        self.board.acknowledge(self.file, slot, epoch, version)
        self.done()

    def sync(self) -> None:
        epoch = self.board.power
        mine = {slot: version for slot, (then, version) in self.unsynced.items() if then == epoch}
        try:
            self.opened().sync()
        except OSError:
            self.forget_unsynced()
            self.drop_handle()
            raise
        if not self.within(epoch):
            self.forget_unsynced()
            return
        if self.client.mounted:
            for slot, version in mine.items():
                self.acknowledged(slot, version, epoch)
        self.manifest.sync(mine)
        for slot, version in mine.items():
            self.board.sync(self.file, slot, version)
        self.unsynced.clear()
        if self.rng.randrange(REOPEN_EVERY) == 0:
            self.drop_handle()

    def forget_unsynced(self) -> None:
        """A failed sync says nothing of what it was to make durable; at the mount, not even that it was written."""
        if self.client.mounted:
            for slot, (_, version) in self.unsynced.items():
                self.manifest.fail(slot, version)
            self.unsynced.clear()


class EntryWriter(Writer):
    """Puts the entries, which nothing syncs."""

    def sync(self) -> None:
        self.unsynced.clear()


class Reader(Worker):
    """Reads slots and whole files of all writers and checks what it sees."""

    def __init__(self, job: Job, number: int, client: Client) -> None:
        super().__init__(job, number, client)
        self.handles: dict[int, Handle] = {}
        self.late = 0

    def step(self) -> None:
        file, slots = self.choose()
        power, chains = self.board.power, self.board.chains
        exact = self.is_exact(file)
        fresh = not self.client.mounted
        floors = [self.floors(s, power if fresh else -1) for s in slots]
        seen = [[self.board.seen(file, s.number, p, chains) for p in range(len(s.pieces))] for s in slots]
        try:
            data = self.read(file, slots)
        except OSError:
            self.close(file)
            raise
        if not fresh or self.rng.randrange(REOPEN_EVERY) == 0:
            self.close(file)
        same_power = power % 2 == 0 and self.board.power == power
        same_chains = exact and chains % 2 == 0 and self.board.chains == chains
        for slot, (floor, synced), before in zip(slots, floors, seen, strict=True):
            begin = slot.offset - slots[0].offset
            found = self.found(slot, data[begin : begin + slot.length], exact=exact)
            issued = self.board.issued(file, slot.number)
            for piece, version in enumerate(found):
                least = floor if same_power else synced
                self.check(slot, piece, version, least, issued, "was acknowledged")
                if same_chains:
                    self.check(slot, piece, version, before[piece], issued, "was read before")
                    if version > before[piece]:
                        self.board.see(self.number, file, slot.number, piece, chains, version)
        self.done()

    def choose(self) -> tuple[int, list[Slot]]:
        """A slot to read, or a whole file."""
        file = self.rng.randrange(self.job.slotted)
        slots = slots_of(file)
        return file, [self.rng.choice(slots)] if self.rng.randrange(WHOLE_FILE_EVERY) else slots

    def is_exact(self, file: int) -> bool:
        """Whether its pieces are whole, and what was read once is never older later.

        A mount writes and reads page by page; its own writes may reach the chunk in parts.
        """
        return not self.client.mounted and file not in self.job.mount_files

    def found(self, slot: Slot, data: bytes, *, exact: bool) -> list[int]:
        """The versions of the pieces of a slot. Raises WrongBytes."""
        for _ in range(TORN_READS_MAX if self.client.mounted else 0):
            try:
                return versions(slot, data, slot.pages)
            except WrongBytes:
                # The kernel copies from a page of its cache while it copies what is written there: a read may see half
                # of it, once. Whatever else is wrong is still there.
                data = self.read(slot.file, [slot])
                self.close(slot.file)
        return versions(slot, data, slot.pieces if exact else slot.pages)

    def floors(self, slot: Slot, power: int) -> tuple[int, int]:
        """The oldest version that may be read as long as the power stays on, and if it does not."""
        synced = self.board.synced(slot.file, slot.number)
        return max(synced, self.board.floor(slot.file, slot.number, power)), synced

    def read(self, file: int, slots: list[Slot]) -> bytes:
        if file not in self.handles:
            self.handles[file] = self.client.open(file, write=False)
        begin, end = slots[0].offset, slots[-1].offset + slots[-1].length
        return self.handles[file].pread(end - begin, begin)

    def close(self, file: int) -> None:
        handle = self.handles.pop(file, None)
        if handle is not None:
            try:
                handle.close()
            except OSError as e:
                self.refused(e)

    def check(self, slot: Slot, piece: int, version: int, least: int, most: int, why: str) -> None:
        if least <= version <= most:
            return
        record = manifest.replay(self.job.manifest(slot.file)).get(slot.number, manifest.SlotRecord())
        if version < least and version in record.failed:
            # A write that failed took effect after a later one. Permitted, and counted.
            self.late += 1
            (Path(self.job.directory) / f"late-{self.number}").write_text(str(self.late))
            return
        raise WrongBytes(
            f"{slot}, piece {piece}: version {version} was read, but {least} {why} and {most} was the newest written; "
            f"power epoch {self.board.power}, chain epoch {self.board.chains}"
        )


class EntryReader(Reader):
    """Gets entries, which are of one version each."""

    def choose(self) -> tuple[int, list[Slot]]:
        file = self.job.own_files[0]
        return file, [self.rng.choice(slots_of(file))]

    def is_exact(self, file: int) -> bool:
        # In memory, a put that was not acknowledged may be on one replica and not on another.
        return self.job.kind == "durable-entries"

    def found(self, slot: Slot, data: bytes, *, exact: bool) -> list[int]:
        return versions(slot, data, slot.whole)
