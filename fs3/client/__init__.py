"""The client: a cluster as a file system, synchronous and for asyncio."""

from fs3.client.aio import AsyncFile, AsyncFileSystem, connect_async
from fs3.client.file import RawFile
from fs3.client.filesystem import FileSystem, connect
from fs3.client.records import DirEntry
from fs3.core.config import RdmaOptions
from fs3.native import RegisteredMemory

__all__ = [
    "AsyncFile",
    "AsyncFileSystem",
    "DirEntry",
    "FileSystem",
    "RawFile",
    "RdmaOptions",
    "RegisteredMemory",
    "connect",
    "connect_async",
]
