"""`fs3 ls|stat|cat|mv|rm|mkdir|ln|du`: work on a cluster without a mount."""

from __future__ import annotations

import stat as stat_module
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

import fs3
from fs3.cli.output import human_bytes, json_option, print_json, print_table
from fs3.cli.quota import own_quota
from fs3.cli.target import RemotePath, cluster_options, remote_path
from fs3.client import FileSystem
from fs3.core.errors import Fs3Error, error
from fs3.v1.frame_pb2 import Code

CAT_BYTES = 4 << 20
PROGRESS_S = 0.5
KINDS = {
    stat_module.S_IFDIR: "directory",
    stat_module.S_IFREG: "file",
    stat_module.S_IFLNK: "symlink",
    stat_module.S_IFIFO: "fifo",
    stat_module.S_IFSOCK: "socket",
    stat_module.S_IFCHR: "character device",
    stat_module.S_IFBLK: "block device",
}


@contextmanager
def connected(paths: list[RemotePath]) -> Iterator[FileSystem]:
    """A connection to the one cluster that all `paths` are on."""
    targets = {p.target for p in paths}
    if len(targets) > 1:
        raise error(Code.CODE_INVALID_ARGUMENT, "the paths are on different clusters; use `fs3 cp` between them")
    target = targets.pop()
    with fs3.connect(target.url, token=target.token) as fs:
        yield fs


def parse_paths(paths: tuple[str, ...], where: dict[str, Any]) -> list[RemotePath]:
    """Read paths as a user gives them; `where` are the values of :func:`cluster_options`."""
    return [remote_path(p, where["url"], where["cluster"], where["token_file"]) for p in paths]


def _record(path: str, st: Any) -> dict[str, Any]:
    return {
        "path": path,
        "kind": KINDS.get(stat_module.S_IFMT(st.st_mode), "unknown"),
        "inode": st.st_ino,
        "mode": f"{stat_module.S_IMODE(st.st_mode):04o}",
        "uid": st.st_uid,
        "gid": st.st_gid,
        "links": st.st_nlink,
        "bytes": st.st_size,
        "mtime_ns": st.st_mtime_ns,
        "atime_ns": st.st_atime_ns,
        "ctime_ns": st.st_ctime_ns,
    }


def format_date(ns: int) -> str:
    """A time in nanoseconds since 1970, in local time."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(ns / 1e9))


@click.command("ls")
@click.argument("paths", nargs=-1, metavar="[PATH]...")
@click.option("-l", "--long", "long_format", is_flag=True, help="Mode, owner, size and time as well.")
@cluster_options
@json_option
def ls_command(paths: tuple[str, ...], long_format: bool, as_json: bool, **where: Any) -> None:
    """List directories (default: the root)."""
    parsed = parse_paths(paths or ("/",), where)
    listed: list[dict[str, Any]] = []
    with connected(parsed) as fs:
        for remote in parsed:
            st = fs.stat(remote.path)
            if stat_module.S_ISDIR(st.st_mode):
                entries = sorted(fs.scandir(remote.path), key=lambda e: e.name)
                listed += [{"name": e.name, **_record(e.path, e.stat(follow_symlinks=False))} for e in entries]
            else:
                listed.append({"name": remote.path, **_record(remote.path, st)})
    if as_json:
        print_json(listed)
    elif long_format:
        rows = [
            [r["mode"], r["uid"], r["gid"], r["bytes"], format_date(r["mtime_ns"]), r["kind"], r["name"]]
            for r in listed
        ]
        print_table(["MODE", "UID", "GID", "BYTES", "MODIFIED", "KIND", "NAME"], rows)
    else:
        for record in listed:
            click.echo(record["name"] + ("/" if record["kind"] == "directory" else ""))


@click.command("stat")
@click.argument("paths", nargs=-1, required=True, metavar="PATH...")
@click.option("-L", "--follow", is_flag=True, help="Of what a symbolic link points to.")
@cluster_options
@json_option
def stat_command(paths: tuple[str, ...], follow: bool, as_json: bool, **where: Any) -> None:
    """Show everything known of files or directories."""
    parsed = parse_paths(paths, where)
    records = []
    with connected(parsed) as fs:
        for remote in parsed:
            st = fs.stat(remote.path) if follow else fs.lstat(remote.path)
            record = _record(remote.path, st)
            if record["kind"] == "symlink":
                record["target"] = fs.readlink(remote.path)
            records.append(record)
    if as_json:
        print_json(records)
        return
    for record in records:
        for key, value in record.items():
            click.echo(f"{key:>10}: {format_date(value) + f' ({value} ns)' if key.endswith('_ns') else value}")


@click.command("cat")
@click.argument("paths", nargs=-1, required=True, metavar="PATH...")
@cluster_options
def cat_command(paths: tuple[str, ...], **where: Any) -> None:
    """Write files to standard output."""
    parsed = parse_paths(paths, where)
    buffer = memoryview(bytearray(CAT_BYTES))
    out = sys.stdout.buffer
    with connected(parsed) as fs:
        for remote in parsed:
            with fs.open(remote.path, "rb", buffering=0) as file:
                while count := file.readinto(buffer):
                    out.write(buffer[:count])
    out.flush()


@click.command("mv")
@click.argument("source", metavar="FROM")
@click.argument("destination", metavar="TO")
@click.option("-n", "--no-clobber", is_flag=True, help="Fail when TO exists.")
@cluster_options
def mv_command(source: str, destination: str, no_clobber: bool, **where: Any) -> None:
    """Rename a file or directory on one cluster, or move it into a directory."""
    parsed = parse_paths((source, destination), where)
    with connected(parsed) as fs:
        origin, target = parsed[0].path, parsed[1].path
        if fs.isdir(target):
            target = target.rstrip("/") + "/" + origin.rstrip("/").rpartition("/")[2]
        if no_clobber:
            fs.rename(origin, target)
        else:
            fs.replace(origin, target)


@click.command("rm")
@click.argument("paths", nargs=-1, required=True, metavar="PATH...")
@click.option("-r", "--recursive", is_flag=True, help="Directories and everything below them, in one atomic step.")
@click.option("-f", "--force", is_flag=True, help="What does not exist is no error.")
@click.option("--skip-trash", is_flag=True, help="For good, also where directories keep what is removed.")
@cluster_options
def rm_command(paths: tuple[str, ...], recursive: bool, force: bool, skip_trash: bool, **where: Any) -> int:
    """Remove files. Goes on after an error; the exit status is then 1."""
    parsed = parse_paths(paths, where)
    failed = False
    with connected(parsed) as fs:
        for remote in parsed:
            try:
                directory = fs.isdir(remote.path) and not fs.islink(remote.path)
                if directory and recursive:
                    fs.rmtree(remote.path, skip_trash=skip_trash)
                elif skip_trash and not directory:
                    fs.rmtree(remote.path, skip_trash=True)
                else:
                    fs.remove(remote.path)
            except FileNotFoundError as e:
                if not force:
                    failed = True
                    click.echo(f"fs3: {e.strerror or e}", err=True)
            except Fs3Error as e:
                failed = True
                hint = " (use -r for directories)" if isinstance(e, IsADirectoryError) else ""
                click.echo(f"fs3: {e.message}{hint}", err=True)
    return int(failed)


@click.command("mkdir")
@click.argument("paths", nargs=-1, required=True, metavar="PATH...")
@click.option("-p", "--parents", is_flag=True, help="Make missing parents; an existing directory is no error.")
@click.option("-m", "--mode", default="0755", show_default=True, help="Permission bits, octal.")
@cluster_options
def mkdir_command(paths: tuple[str, ...], parents: bool, mode: str, **where: Any) -> None:
    """Make directories."""
    try:
        bits = int(mode, 8)
    except ValueError:
        raise error(Code.CODE_INVALID_ARGUMENT, f"--mode {mode} is not octal; write for example 0755") from None
    parsed = parse_paths(paths, where)
    with connected(parsed) as fs:
        for remote in parsed:
            if parents:
                fs.makedirs(remote.path, mode=bits, exist_ok=True)
            else:
                fs.mkdir(remote.path, mode=bits)


@click.command("ln")
@click.argument("target")
@click.argument("link")
@click.option("-s", "--symbolic", is_flag=True, help="A symbolic link with TARGET as it is written.")
@cluster_options
def ln_command(target: str, link: str, symbolic: bool, **where: Any) -> None:
    """Make LINK another name of the file TARGET."""
    if symbolic:
        parsed = parse_paths((link,), where)
        with connected(parsed) as fs:
            fs.symlink(target, parsed[0].path)
        return
    parsed = parse_paths((target, link), where)
    with connected(parsed) as fs:
        fs.link(parsed[0].path, parsed[1].path)


def _usage(fs: FileSystem, remote: RemotePath) -> dict[str, Any]:
    """What is at and below a path: as its quota counts it, or by looking at everything."""
    quota = own_quota(remote)
    if quota is not None:
        return {"bytes": quota.bytes, "files": None, "directories": None, "inodes": quota.inodes}
    total, files, directories = _walk(fs, remote.path)
    return {"bytes": total, "files": files, "directories": directories, "inodes": files + directories}


def _walk(fs: FileSystem, path: str) -> tuple[int, int, int]:
    """Bytes, files and directories at and below `path`; a file with several names counts once."""
    terminal = sys.stderr.isatty()
    shown_s = time.monotonic()
    seen: set[int] = set()
    total = files = directories = 0
    pending = [path]
    st = fs.lstat(path)
    if not stat_module.S_ISDIR(st.st_mode):
        return st.st_size, 1, 0
    while pending:
        directories += 1
        if terminal and time.monotonic() - shown_s > PROGRESS_S:
            click.echo(f"\r\x1b[K{files} files, {human_bytes(total)} so far", nl=False, err=True)
            shown_s = time.monotonic()
        for entry in fs.scandir(pending.pop()):
            st = entry.stat(follow_symlinks=False)
            if stat_module.S_ISDIR(st.st_mode):
                pending.append(entry.path)
                continue
            files += 1
            if st.st_nlink == 1 or st.st_ino not in seen:
                seen.add(st.st_ino)
                total += st.st_size
    if terminal:
        click.echo("\r\x1b[K", nl=False, err=True)
    return total, files, directories


@click.command("du")
@click.argument("paths", nargs=-1, metavar="[PATH]...")
@click.option("-b", "--bytes", "exact", is_flag=True, help="Exact numbers.")
@cluster_options
@json_option
def du_command(paths: tuple[str, ...], exact: bool, as_json: bool, **where: Any) -> None:
    """Sum up the lengths of files at and below paths.

    A directory with a quota knows them; otherwise everything is looked at.
    """
    parsed = parse_paths(paths or ("/",), where)
    rows: list[dict[str, Any]] = []
    with connected(parsed) as fs:
        for remote in parsed:
            rows.append({"path": remote.path, **_usage(fs, remote)})
    if as_json:
        print_json(rows)
        return
    print_table(
        ["SIZE", "INODES", "PATH"],
        [[r["bytes"] if exact else human_bytes(r["bytes"]), r["inodes"], r["path"]] for r in rows],
    )
