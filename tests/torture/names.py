"""Files and directories that come, move and go; every acknowledged change is there for good, power cut or not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fs3.client import FileSystem
from tests.torture import manifest
from tests.torture.worker import Client, Job, Worker

ENTRIES_MAX = 60
FILE_BYTES_MAX = 9000
LIST_EVERY = 20


@dataclass
class Entry:
    """A name that is certainly there. `content` is the name a file was made under; its bytes follow from it."""

    content: str = ""
    length: int = 0
    synced: bool = False
    # Of the power when it was written; without a sync the bytes hold no longer than that.
    epoch: int = 0
    directory: bool = False


@dataclass
class Names:
    """What the directory of one worker must hold. Names in doubt may be there or not, and are not used again."""

    there: dict[str, Entry] = field(default_factory=dict)
    doubt: set[str] = field(default_factory=set)
    made: int = 0

    def apply(self, line: dict[str, Any]) -> None:
        """Take a line of the journal."""
        match line["do"]:
            case "doubt":
                self.doubt.update(line["names"])
                self.made = max(self.made, line["made"])
            case "make":
                self.sure(line["name"])
                self.there[line["name"]] = Entry(**line["entry"])
            case "move":
                self.sure(line["name"], line["to"])
                self.there[line["to"]] = self.there.pop(line["name"])
            case "gone":
                self.sure(line["name"])
                del self.there[line["name"]]

    def sure(self, *names: str) -> None:
        """The outcome of the latest operation on them is known."""
        self.doubt.difference_update(names)


def directory_of(number: int) -> str:
    """The directory of a worker."""
    return f"/n{number}"


def journal_path(directory: Path, number: int) -> Path:
    """The journal of a worker."""
    return directory / f"names-{number}"


def replay(directory: Path, number: int) -> Names:
    """What a worker's journal says."""
    names = Names()
    for line in manifest.lines(journal_path(directory, number)):
        names.apply(line)
    return names


def content(entry: Entry) -> bytes:
    """The bytes of a file."""
    return (entry.content.encode() * (entry.length // len(entry.content) + 1))[: entry.length]


def differences(fs: FileSystem, names: Names, number: int, epoch: int) -> list[str]:
    """Walk a worker's directory and compare everything."""
    home = directory_of(number)
    listed = {e.name: e.stat() for e in fs.scandir(home)}
    certain = {name for name in names.there if name not in names.doubt}
    found = [f"{home}/{name} was acknowledged and is not there" for name in sorted(certain - set(listed))]
    strange = set(listed) - certain - names.doubt
    found += [f"{home}/{name} was removed or never made, and is there" for name in sorted(strange)]
    for name in sorted(certain & set(listed)):
        entry = names.there[name]
        if entry.directory:
            continue
        size = listed[name].st_size
        if size != entry.length:
            found.append(f"{home}/{name} has {size} bytes instead of {entry.length}")
        elif entry.synced or entry.epoch == epoch:
            with fs.open(f"{home}/{name}", "rb") as file:
                if file.read() != content(entry):
                    found.append(f"{home}/{name} has other bytes than were written ({entry})")
    return found


class NameWorker(Worker):
    """Makes, moves and removes in a directory of its own."""

    def __init__(self, job: Job, number: int, client: Client) -> None:
        super().__init__(job, number, client)
        self.home = directory_of(number)
        self.path = journal_path(Path(job.directory), number)
        self.names = replay(Path(job.directory), number)
        self.journal = manifest.Journal(self.path)

    def settle(self) -> None:
        while not self.board.stop:
            try:
                self.client.filesystem().makedirs(self.home, exist_ok=True)
                return
            except OSError as e:
                self.refused(e)

    def step(self) -> None:
        fs = self.client.filesystem()
        usable = [name for name in self.names.there if name not in self.names.doubt]
        files = [name for name in usable if not self.names.there[name].directory]
        directories = [name for name in usable if self.names.there[name].directory]
        choices: list[Callable[[], None]] = []
        if len(usable) < ENTRIES_MAX:
            choices += [lambda: self.make_file(fs), lambda: self.make_file(fs), lambda: self.make_directory(fs)]
        if files:
            choices += [lambda: self.move(fs, self.rng.choice(usable)), lambda: self.remove(fs, self.rng.choice(files))]
        if len(files) > 1:
            choices.append(lambda: self.replace(fs, *self.rng.sample(files, 2)))
        if directories:
            choices.append(lambda: self.remove_directory(fs, self.rng.choice(directories)))
        self.rng.choice(choices)()
        self.done()
        if self.operations % LIST_EVERY == 0:
            self.look(fs)

    def look(self, fs: FileSystem) -> None:
        """All acknowledged changes, and no others, are visible at once."""
        listed = set(fs.listdir(self.home))
        certain = {name for name in self.names.there if name not in self.names.doubt}
        if certain - listed or listed - certain - self.names.doubt:
            self.violation(f"missing {certain - listed}, too many {listed - certain - self.names.doubt}")

    def attempt(self, work: Callable[[], None], result: dict[str, Any], *names: str) -> None:
        """Do `work`, whose outcome is in doubt until it returns, then note `result`.

        Whether these names are there is known, so NOT_FOUND or EXISTS means that something was lost or done twice.
        """
        doubt = {"do": "doubt", "names": names, "made": self.names.made}
        self.journal.add(doubt)
        self.names.apply(doubt)
        try:
            work()
        except (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError) as e:
            self.violation(f"{result}: {e}")
            raise
        self.journal.add(result)
        self.journal.sync()
        self.names.apply(result)

    def new_name(self) -> str:
        self.names.made += 1
        return f"e{self.names.made}"

    def make_file(self, fs: FileSystem) -> None:
        name = self.new_name()
        entry = Entry(name, self.rng.randrange(1, FILE_BYTES_MAX), self.rng.random() < 0.5, self.board.power)

        def work() -> None:
            with fs.open(f"{self.home}/{name}", "xb", buffering=0) as file:
                file.pwrite(content(entry), 0)
                if entry.synced:
                    file.sync()

        self.attempt_within(work, name, entry)

    def make_directory(self, fs: FileSystem) -> None:
        name = self.new_name()
        self.attempt_within(lambda: fs.mkdir(f"{self.home}/{name}"), name, Entry(directory=True))

    def attempt_within(self, work: Callable[[], None], name: str, entry: Entry) -> None:
        """As `attempt`, of a name that is new. What a file holds that was written over a power cut is not known."""

        def checked() -> None:
            work()
            if self.board.power != entry.epoch and not entry.directory:
                raise TimeoutError(f"{name} was written over a power cut")

        self.attempt(checked, {"do": "make", "name": name, "entry": vars(entry)}, name)

    def move(self, fs: FileSystem, name: str) -> None:
        to = self.new_name()
        work = lambda: fs.rename(f"{self.home}/{name}", f"{self.home}/{to}")  # noqa: E731
        self.attempt(work, {"do": "move", "name": name, "to": to}, name, to)

    def replace(self, fs: FileSystem, name: str, to: str) -> None:
        work = lambda: fs.replace(f"{self.home}/{name}", f"{self.home}/{to}")  # noqa: E731
        self.attempt(work, {"do": "move", "name": name, "to": to}, name, to)

    def remove(self, fs: FileSystem, name: str) -> None:
        self.attempt(lambda: fs.remove(f"{self.home}/{name}"), {"do": "gone", "name": name}, name)

    def remove_directory(self, fs: FileSystem, name: str) -> None:
        self.attempt(lambda: fs.rmdir(f"{self.home}/{name}"), {"do": "gone", "name": name}, name)
