"""A client process of a campaign: `python -m tests.torture.process JSON` runs a worker per thread until told to end."""

from __future__ import annotations

import json
import sys
import threading

from tests.torture.names import NameWorker
from tests.torture.slots import EntryReader, EntryWriter, Reader, Writer
from tests.torture.worker import Client, Job, Worker


def workers(job: Job) -> list[Worker]:
    """The workers of a process."""
    client = Client(job)
    if job.kind == "names":
        return [NameWorker(job, number, client) for number in job.numbers]
    if job.kind.endswith("entries"):
        writer, reader = job.numbers
        return [EntryWriter(job, writer, client, job.own_files[0]), EntryReader(job, reader, client)]
    if job.kind.endswith("writer"):
        pairs = zip(job.numbers, job.own_files, strict=True)
        return [Writer(job, number, client, file) for number, file in pairs]
    return [Reader(job, number, client) for number in job.numbers]


def main() -> int:
    """Run a process' workers."""
    job = Job(**json.loads(sys.argv[1]))
    threads = [threading.Thread(target=worker.run, name=f"worker-{job.kind}") for worker in workers(job)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return 0


if __name__ == "__main__":
    sys.exit(main())
