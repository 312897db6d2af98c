//! `3fs-virt/rm-rf`: a symlink made there removes the tree that it points to, in one atomic step; so does moving a tree there.

use std::sync::Arc;

use fs3_client::{Code, Error, FileType, PathAt, Result, at_child, at_inode, at_path};
use fuser::{Errno, INodeNo};

use crate::caller::{Who, superuser};
use crate::core::{Core, ROOT, errno};
use crate::virt::NAME;

/// Components from the root of the mount to the directory of the links: `3fs-virt/rm-rf`.
const DEPTH: usize = 2;

/// The path from the mount's root that a link points to, without dots and doubled slashes.
///
/// An absolute target has to begin with the mountpoint. A relative one that begins with `..` is meant from where the link
/// is, as with any symlink; another one from the mount's root. Errors: EXDEV when it lies outside of the mount, EINVAL
/// when it names the root or the virtual directory.
fn path_in_mount(mountpoint: &[u8], target: &[u8]) -> std::result::Result<Vec<u8>, Errno> {
    let absolute = target.starts_with(b"/");
    let mut parts: Vec<&[u8]> = Vec::new();
    let from_link = !absolute && target.split(|b| *b == b'/').find(|part| *part != b".") == Some(b"..");
    if from_link {
        parts.resize(DEPTH, NAME);
    }
    for part in target.split(|b| *b == b'/') {
        match part {
            b"" | b"." => {}
            b".." => drop(parts.pop().ok_or(Errno::EXDEV)?),
            name => parts.push(name),
        }
    }
    if absolute {
        let above: Vec<_> = mountpoint.split(|b| *b == b'/').filter(|part| !part.is_empty()).collect();
        parts = parts.strip_prefix(&above[..]).ok_or(Errno::EXDEV)?.to_vec();
    }
    match parts.first() {
        None => Err(Errno::EINVAL),
        Some(first) if *first == NAME => Err(Errno::EINVAL),
        Some(_) => Ok(parts.join(&b'/')),
    }
}

/// Remove the tree at `target` as `who`, with whom's permissions. Nobody sees a part of it gone.
pub(crate) async fn remove(core: &Arc<Core>, who: Who, target: &[u8]) -> std::result::Result<(), Errno> {
    let path = path_in_mount(&core.mountpoint, target)?;
    // Files that were closed early are opened again, so that those which are still in use live on.
    core.unpark(None).await.map_err(|e| errno(&e))?;
    let (parent, name) = match path.iter().rposition(|b| *b == b'/') {
        Some(at) => (&path[..at], &path[at + 1..]),
        None => (&b""[..], &path[..]),
    };
    let directory = find_directory(core, who, parent).await;
    let at = &match (core.root, &directory) {
        (ROOT, _) => at_path(&path, false),
        (_, Ok(directory)) => at_child(*directory, name),
        (_, Err(error)) => return Err(errno(error)),
    };
    let done = who.run(|c| async move { core.client.remove_all(&c, at.clone(), false).await }).await;
    core.dir_attrs.forget_all();
    if let Ok(directory) = directory {
        core.forget_name(directory, name);
        forget_in_kernel(core, directory, name).await;
    }
    done.map_err(|e| errno(&e))
}

/// The directory at a path from the mount's root. Where that is a directory of the cluster, symlinks on the way are
/// refused (NotDirectory): services know only the cluster's root, so they could lead out of the mount.
async fn find_directory(core: &Core, who: Who, path: &[u8]) -> Result<u64> {
    if core.root == ROOT {
        let at: PathAt = if path.is_empty() { at_inode(ROOT) } else { at_path(path, true) };
        return Ok(core.client.stat(&superuser(), at).await?.inode);
    }
    let mut directory = core.root;
    for name in path.split(|b| *b == b'/').filter(|name| !name.is_empty()) {
        let attr = who.run(|c| async move { core.client.lookup(&c, directory, name).await }).await?;
        if attr.r#type() != FileType::Directory {
            return Err(Error::new(Code::NotDirectory, "the path leads through something that is no directory"));
        }
        directory = attr.inode;
    }
    Ok(directory)
}

/// Remove the tree that is moved here from `name` of the directory `parent`. The kernel takes the name from where it was.
pub(crate) async fn remove_moved(core: &Arc<Core>, who: Who, parent: u64, name: &[u8]) -> Result<(), Errno> {
    core.unpark(None).await.map_err(|e| errno(&e))?;
    let at = &at_child(parent, name);
    let done = who.run(|c| async move { core.client.remove_all(&c, at.clone(), false).await }).await;
    core.dir_attrs.forget_all();
    core.forget_name(parent, name);
    done.map_err(|e| errno(&e))
}

/// Make the kernel ask for a name again, and for all below it.
pub(crate) async fn forget_in_kernel(core: &Core, directory: u64, name: &[u8]) {
    let Some(notifier) = core.io.notifier() else { return };
    let name = std::os::unix::ffi::OsStringExt::from_vec(name.to_vec());
    let name: std::ffi::OsString = name;
    // It waits for operations on the directory, so it must not hold up this thread.
    let directory = INodeNo(core.shown(directory));
    let forget = move || drop(notifier.inval_entry(directory, &name));
    let _ = core.io.runtime.spawn_blocking(forget).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(target: &str) -> std::result::Result<String, i32> {
        let found = path_in_mount(b"/mnt/fs", target.as_bytes());
        found.map(|p| String::from_utf8(p).unwrap()).map_err(|e| e.code())
    }

    #[test]
    fn targets_are_taken_from_the_mountpoint_the_link_or_the_root() {
        for target in ["/mnt/fs/a/b", "//mnt/./fs/a//b/", "../../a/b", "./../../a/b", "a/b", "a/x/../b/."] {
            assert_eq!(path(target), Ok("a/b".to_owned()), "{target}");
        }
    }

    #[test]
    fn targets_outside_and_the_mount_itself_are_refused() {
        for target in ["/mnt/fsx/a", "/mnt", "/etc/passwd", "../../../a", "/mnt/fs/../a", "a/../../b", "/"] {
            assert_eq!(path(target), Err(libc::EXDEV), "{target}");
        }
        for target in ["/mnt/fs", "/mnt/fs/", "../..", "..", ".", "", "../x", "3fs-virt/iovs", "/mnt/fs/3fs-virt"] {
            assert_eq!(path(target), Err(libc::EINVAL), "{target}");
        }
    }
}
