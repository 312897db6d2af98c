//! Mounting, and the end of a mount.

use std::ffi::CString;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use fs3_client::{Client, ClientId, Code, Error, FileType, Result, at_path};
use fuser::{Config, Ended, MountOption, Pauser, Session, SessionACL};
use parking_lot::{Condvar, Mutex};
use tokio::runtime::Handle;

use crate::caller::superuser;
use crate::core::{Core, ROOT};
use crate::filesystem::Fs;
use crate::handover::{Predecessor, State, WaitState};
use crate::ids::IdMaps;

/// How long the end of a mount waits for operations under way, and for files that are still open.
const END_WAIT_MAX: Duration = Duration::from_secs(30);
/// How long requests under way, and data that is not written, may hold up that a mount is handed over.
const HANDOVER_WAIT_MAX: Duration = Duration::from_secs(5);
/// How often old data and read-ahead are looked for.
const TICK: Duration = Duration::from_secs(1);

/// How to mount.
#[derive(Clone, Debug)]
pub struct MountOptions {
    /// Let other users than the one that mounts use the mount.
    pub allow_other: bool,
    /// Let the kernel check permission bits (the service checks them in any case).
    pub default_permissions: bool,
    /// Refuse every change.
    pub read_only: bool,
    /// Honour set-id bits of programs; needs the right to.
    pub suid: bool,
    /// Honour device nodes; needs the right to.
    pub dev: bool,
    /// Honour the execution of programs.
    pub exec: bool,
    /// Shown as the source in the mount table.
    pub fsname: String,
    /// Shown as `fuse.<subtype>` in the mount table.
    pub subtype: String,
    /// Threads that read requests from the kernel; 0: chosen by the number of cores.
    pub threads: usize,
    /// Memory for data on its way in both directions, in bytes.
    pub max_memory_bytes: usize,
    /// How long the kernel may use attributes without asking.
    pub attr_timeout: Duration,
    /// How long the kernel may use the inode behind a name without asking.
    pub entry_timeout: Duration,
    /// Have the helper program unmount when this process dies; needs `allow_other`.
    pub auto_unmount: bool,
    /// What the kernel reads ahead of a sequential reader, in bytes; set where this process has the right to.
    pub readahead_bytes: usize,
    /// Locks of files hold within this mount only.
    pub local_locks: bool,
    /// What is kept in memory of files.
    pub cache: Cache,
    /// Path of the directory of the cluster that is the root of the mount; empty: the cluster's root.
    pub subdir: Vec<u8>,
    /// Users and groups here and in the cluster.
    pub ids: IdMaps,
    /// Told to who asks how it is mounted.
    pub config: String,
}

/// What is kept in memory of files. Attributes and names are kept as long as the timeouts say.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Cache {
    /// Bytes, until an open finds that the file has changed.
    #[default]
    Auto,
    /// Bytes, as long as the attributes say that the file has not changed. The kernel asks for them before each read.
    Strict,
    /// Nothing: every file is opened as if with O_DIRECT, and a write is published before it returns.
    None,
}

impl Default for MountOptions {
    fn default() -> Self {
        Self {
            allow_other: false,
            default_permissions: true,
            read_only: false,
            suid: false,
            dev: false,
            exec: true,
            fsname: "fs3".to_owned(),
            subtype: "fs3".to_owned(),
            threads: 0,
            max_memory_bytes: 256 << 20,
            attr_timeout: Duration::from_secs(1),
            entry_timeout: Duration::from_secs(1),
            auto_unmount: false,
            readahead_bytes: 4 << 20,
            local_locks: false,
            cache: Cache::Auto,
            subdir: Vec::new(),
            ids: IdMaps::default(),
            config: String::new(),
        }
    }
}

/// The source as `mount(2)` takes it from root, or as an option of the helper program that ordinary users need.
fn source_option(fsname: &str, root: bool) -> String {
    if root { fsname.to_owned() } else { fsname.replace('\\', "\\\\").replace(',', "\\,") }
}

impl MountOptions {
    fn config(&self) -> Config {
        // SAFETY: it cannot fail.
        let root = unsafe { libc::geteuid() } == 0;
        let mut options = vec![
            MountOption::FSName(source_option(&self.fsname, root)),
            // As a kernel option it also takes effect without the helper program.
            MountOption::CUSTOM(format!("subtype={}", self.subtype)),
        ];
        let flags = [
            (self.default_permissions, MountOption::DefaultPermissions),
            (self.read_only, MountOption::RO),
            (self.suid, MountOption::Suid),
            (self.dev, MountOption::Dev),
            (!self.exec, MountOption::NoExec),
            (self.auto_unmount, MountOption::AutoUnmount),
        ];
        options.extend(flags.into_iter().filter_map(|(on, option)| on.then_some(option)));
        let mut config = Config::default();
        config.mount_options = options;
        config.acl = if self.allow_other { SessionACL::All } else { SessionACL::Owner };
        let cores = std::thread::available_parallelism().map_or(2, usize::from);
        config.n_threads = Some(if self.threads == 0 { cores.clamp(2, 8) } else { self.threads });
        config.clone_fd = true;
        config
    }
}

/// A mount that is being served. It is not unmounted when this is dropped: call [`MountHandle::unmount`].
pub struct MountHandle {
    core: Arc<Core>,
    mountpoint: PathBuf,
    pauser: Pauser,
    stage: Arc<Stage>,
}

/// How far the thread that serves a mount is.
#[derive(Default)]
struct Stage {
    phase: Mutex<Phase>,
    changed: Condvar,
    /// A successor is to have the mount. Once it is not, a pause ends, also one that has not begun yet.
    given: AtomicBool,
}

#[derive(Default)]
enum Phase {
    #[default]
    Serving,
    /// Nothing is received before a predecessor has left the mount.
    Ready,
    /// No requests are received. A successor may have the devices.
    Paused(std::io::Result<Vec<OwnedFd>>),
    /// A successor has the mount.
    Departing,
    Ended(Result<()>),
}

impl Stage {
    fn set(&self, phase: Phase) {
        *self.phase.lock() = phase;
        self.changed.notify_all();
    }

    /// Wait until `look` finds what it looks for, `limit` at most.
    fn wait<T>(&self, limit: Option<Duration>, mut look: impl FnMut(&mut Phase) -> Option<T>) -> Option<T> {
        let deadline = limit.map(|limit| Instant::now() + limit);
        let mut phase = self.phase.lock();
        loop {
            if let Some(found) = look(&mut phase) {
                return Some(found);
            }
            match deadline {
                None => self.changed.wait(&mut phase),
                Some(deadline) if self.changed.wait_until(&mut phase, deadline).timed_out() => return look(&mut phase),
                Some(_) => {}
            }
        }
    }
}

fn io_error(what: &str, error: &std::io::Error) -> Error {
    let code = match error.raw_os_error() {
        Some(libc::EACCES | libc::EPERM) => Code::Access,
        Some(libc::ENOENT) => Code::NotFound,
        Some(libc::ENOTDIR) => Code::NotDirectory,
        Some(libc::EBUSY) => Code::Busy,
        _ if error.kind() == std::io::ErrorKind::InvalidInput => Code::InvalidArgument,
        _ => Code::Unavailable,
    };
    Error::new(code, format!("{what}: {error}"))
}

/// The directory of the cluster that the mount shall show. Errors: NotFound, NotDirectory.
async fn find_root(client: &Client, subdir: &[u8]) -> Result<u64> {
    if subdir.is_empty() {
        return Ok(ROOT);
    }
    let shown = String::from_utf8_lossy(subdir);
    let found = client.stat(&superuser(), at_path(subdir, true)).await;
    let attr = found.map_err(|e| match e.code {
        Code::NotFound => Error::new(e.code, format!("the cluster has no directory {shown} to mount; make it first")),
        Code::NotDirectory => Error::new(e.code, format!("{shown} leads through something that is no directory")),
        _ => e,
    })?;
    match attr.r#type() {
        FileType::Directory => Ok(attr.inode),
        _ => Err(Error::new(Code::NotDirectory, format!("{shown} is no directory of the cluster"))),
    }
}

/// Mount the cluster of `client` on the directory `mountpoint` and serve it in the background, on threads of its
/// own and on `runtime` (the one that the client runs on). Returns when the kernel has accepted the mount.
///
/// Must not be called from a task of the runtime. Errors: Access when mounting is not permitted, NotFound and
/// NotDirectory about the mountpoint or the directory of the cluster, InvalidArgument for options that contradict each other.
pub fn mount(client: Client, runtime: Handle, mountpoint: &Path, options: MountOptions) -> Result<MountHandle> {
    let config = options.config();
    let readahead_bytes = options.readahead_bytes;
    let mountpoint =
        mountpoint.canonicalize().map_err(|e| io_error(&format!("cannot mount on {}", mountpoint.display()), &e))?;
    let root = runtime.block_on(find_root(&client, &options.subdir))?;
    let core = Arc::new(Core::new(client, runtime, &mountpoint, root, options));
    let session = Session::new(Fs { core: core.clone() }, &mountpoint, &config)
        .map_err(|e| io_error(&format!("cannot mount on {}", mountpoint.display()), &e))?;
    set_readahead(&mountpoint, readahead_bytes);
    serve(core, session, mountpoint, Vec::new(), Phase::Serving)
}

/// Get ready to go on with the mount on `mountpoint` that another process served and has handed over, as [`mount`]. Nothing
/// is received from the kernel until [`MountHandle::begin`]: until then, and when this fails, the predecessor can take the
/// mount back. Options that the kernel was told when it was mounted must be those of the predecessor. Errors: those of
/// opening its files; NotSupported when its release hands over in another form.
pub fn succeed(
    client: Client,
    runtime: Handle,
    mountpoint: &Path,
    options: MountOptions,
    predecessor: Predecessor,
) -> Result<MountHandle> {
    let state = State::decode(&predecessor.state)?;
    let (devices, memory) = state.part(predecessor.descriptors)?;
    let config = options.config();
    let core = Arc::new(Core::new(client, runtime.clone(), mountpoint, state.root(), options));
    let session = Session::succeed(Fs { core: core.clone() }, devices, &config)
        .map_err(|e| io_error("cannot go on with a mount", &e))?;
    *core.io.notifier.lock() = Some(session.notifier());
    runtime.block_on(core.import(&state))?;
    let ready = core
        .import_virtual(state.virt(), memory)
        .and_then(|()| serve(core.clone(), session, mountpoint.to_owned(), state.waits().to_vec(), Phase::Ready));
    if ready.is_err() {
        core.rings.leave_all();
    }
    ready
}

/// Serve a mount on threads of its own. `waits`: requests that a predecessor left. `phase`: Serving or Ready.
fn serve(
    core: Arc<Core>,
    mut session: Session<Fs>,
    mountpoint: PathBuf,
    mut waits: Vec<WaitState>,
    phase: Phase,
) -> Result<MountHandle> {
    *core.io.notifier.lock() = Some(session.notifier());
    let runtime = core.io.runtime.clone();
    let ticking = core.clone();
    let ticker = runtime.spawn(async move {
        loop {
            tokio::time::sleep(TICK).await;
            ticking.tick().await;
        }
    });
    let (pauser, stage) = (session.pauser(), Arc::new(Stage { phase: Mutex::new(phase), ..Stage::default() }));
    let handle = MountHandle { core: core.clone(), mountpoint, pauser, stage: stage.clone() };
    let serve = move || {
        let begins = stage.wait(None, |phase| match phase {
            Phase::Ready => None,
            phase => Some(!matches!(phase, Phase::Ended(_))),
        });
        if begins != Some(true) {
            return ticker.abort();
        }
        let result = loop {
            for wait in std::mem::take(&mut waits) {
                if let Some(reply) = session.reply_to(wait.left()) {
                    core.resume_wait(wait, reply);
                }
            }
            match session.serve() {
                Ok(Ended::Unmounted) => break Ok(()),
                Err(error) => break Err(io_error("the connection to the kernel failed", &error)),
                Ok(Ended::Paused) => {}
            }
            stage.set(Phase::Paused(session.devices()));
            let departs = stage.wait(None, |phase| match phase {
                Phase::Departing => Some(true),
                _ => (!stage.given.load(Ordering::Acquire)).then_some(false),
            });
            if departs == Some(true) {
                // Both have the device. When a successor dies, who waits for it hears so once nobody has it any more.
                session.give_away();
                *core.io.notifier.lock() = None;
                ticker.abort();
                runtime.block_on(core.retire());
                return stage.set(Phase::Ended(Ok(())));
            }
            waits = core.locks.take_left();
            stage.set(Phase::Serving);
        };
        ticker.abort();
        runtime.block_on(finish(&core));
        stage.set(Phase::Ended(result));
    };
    std::thread::Builder::new()
        .name("fs3-fuse".to_owned())
        .spawn(serve)
        .map_err(|e| io_error("cannot start a thread", &e))?;
    Ok(handle)
}

/// Nothing more comes from the kernel: let what runs end, write what is left.
async fn finish(core: &Arc<Core>) {
    core.locks.interrupt_all();
    core.rings.close_all();
    if !core.drain(END_WAIT_MAX).await {
        tracing::warn!("operations were still under way when the mount ended");
    }
    let rest = async {
        core.flush_all().await;
        core.release_all().await;
    };
    if tokio::time::timeout(END_WAIT_MAX, rest).await.is_err() {
        tracing::warn!("not everything could be written before the mount ended");
    }
}

fn busy(what: &str) -> Error {
    Error::new(Code::Busy, format!("{what} within {} s", HANDOVER_WAIT_MAX.as_secs()))
}

fn ended(phase: &mut Phase) -> Option<Result<()>> {
    match phase {
        Phase::Ended(result) => Some(result.clone()),
        _ => None,
    }
}

impl MountHandle {
    /// The predecessor has left the mount: serve it.
    pub fn begin(&self) {
        self.stage.set(Phase::Serving);
        self.core.begin_rings();
    }

    /// The predecessor keeps the mount, of which nothing was served here.
    pub fn abandon(&self) {
        self.core.rings.leave_all();
        self.stage.set(Phase::Ended(Ok(())));
    }

    /// What it did since it began, as a JSON object: what `3fs-virt/stats` shows.
    pub fn stats(&self) -> String {
        self.core.snapshot().to_string()
    }

    /// Where it is mounted.
    pub fn mountpoint(&self) -> &Path {
        &self.mountpoint
    }

    /// Wait until the mount has ended (unmounted by whomever, or the kernel's side died) and everything
    /// accepted is written. Must not be called from a task of the runtime.
    pub fn wait(&self) -> Result<()> {
        self.stage.wait(None, ended).expect("it waits until it has ended")
    }

    /// As [`MountHandle::wait`], `limit` at most; `None` when the mount is still there.
    pub fn wait_for(&self, limit: Duration) -> Option<Result<()>> {
        self.stage.wait(Some(limit), ended)
    }

    /// Stop serving and hand the mount over to another process, which is the client `successor`. Whoever uses the mount
    /// waits. When [`succeed`] has returned there, [`MountHandle::depart`] is called here and then [`MountHandle::begin`] there;
    /// or else [`MountHandle::take_back`] here. Errors: Busy when requests do not end, or another successor is there, and it is
    /// served on; Unavailable when it has ended. Must not be called from a task of the runtime.
    pub fn hand_over(&self, successor: ClientId) -> Result<Predecessor> {
        {
            // Under the lock: a pause that is about to end must not find that the mount is to be given away again.
            let phase = self.stage.phase.lock();
            if !matches!(&*phase, Phase::Serving) || self.stage.given.swap(true, Ordering::AcqRel) {
                return Err(Error::new(Code::Busy, "the mount is being handed over, or has ended"));
            }
        }
        let handed = self.rest_rings().and_then(|()| self.rest());
        if handed.is_err() {
            self.take_back(successor);
        }
        handed
    }

    /// Let I/Os of rings end, and begin none. The kernel is served meanwhile: writes of rings may wait for its pages.
    fn rest_rings(&self) -> Result<()> {
        self.core.rings.pause();
        let rests = self.core.rings.wait_for_rest(Instant::now() + HANDOVER_WAIT_MAX);
        if rests { Ok(()) } else { Err(busy("I/Os of rings did not end")) }
    }

    /// Stop serving the kernel; what a successor gets.
    fn rest(&self) -> Result<Predecessor> {
        self.core.locks.leave_all();
        self.pauser.pause();
        let devices = self.stage.wait(Some(HANDOVER_WAIT_MAX), |phase| match phase {
            Phase::Paused(devices) => Some(std::mem::replace(devices, Ok(Vec::new()))),
            Phase::Ended(_) => Some(Err(std::io::Error::from_raw_os_error(libc::ENODEV))),
            _ => None,
        });
        let mut descriptors = match devices {
            Some(Ok(devices)) => devices,
            Some(Err(error)) => return Err(io_error("the mount cannot be handed over", &error)),
            None => return Err(Error::new(Code::Busy, "the kernel's requests could not be stopped")),
        };
        let waits = self.settle()?;
        let (virt, memory) = self.core.export_virtual(Instant::now() + HANDOVER_WAIT_MAX)?;
        let state = self.core.export(waits, descriptors.len(), virt);
        descriptors.extend(memory);
        Ok(Predecessor { state, descriptors })
    }

    /// End what is at work, and write everything; the requests that are left.
    fn settle(&self) -> Result<Vec<WaitState>> {
        self.core.io.runtime.block_on(async {
            if !self.core.drain(HANDOVER_WAIT_MAX).await {
                return Err(busy("requests of the kernel did not end"));
            }
            let written = tokio::time::timeout(HANDOVER_WAIT_MAX, self.core.flush_all()).await;
            written.map_err(|_| busy("data could not be written"))?;
            Ok(self.core.locks.left())
        })
    }

    /// The successor failed: serve again.
    pub fn take_back(&self, successor: ClientId) {
        let took = async { tokio::time::timeout(HANDOVER_WAIT_MAX, self.core.take_back(successor)).await };
        if self.core.io.runtime.block_on(took).is_err() {
            tracing::warn!("locks could not be taken back from a successor that failed");
        }
        self.core.rings.resume();
        let _phase = self.stage.phase.lock();
        self.stage.given.store(false, Ordering::Release);
        self.stage.changed.notify_all();
    }

    /// The successor has the mount: close the files here, and end without unmounting.
    pub fn depart(&self) {
        let mut phase = self.stage.phase.lock();
        if matches!(&*phase, Phase::Paused(_)) {
            *phase = Phase::Departing;
            self.stage.changed.notify_all();
        }
    }

    /// Write everything, unmount, and wait for the end. Files that programs still hold open keep the mount
    /// alive, out of sight, for half a minute. Must not be called from a task of the runtime.
    /// Errors: Busy when they are still open then (they fail when this process ends; their data is written).
    pub fn unmount(&self) -> Result<()> {
        let runtime = self.core.io.runtime.clone();
        let flush = || runtime.block_on(async { tokio::time::timeout(END_WAIT_MAX, self.core.flush_all()).await });
        let departing = matches!(&*self.stage.phase.lock(), Phase::Departing);
        if !departing && self.wait_for(Duration::ZERO).is_none() {
            let _ = flush();
            detach(&self.mountpoint)?;
            // Their files keep the mount alive; who waits for them is told now.
            self.core.rings.close_all();
        }
        if let Some(result) = self.wait_for(END_WAIT_MAX) {
            return result;
        }
        let _ = flush();
        Err(Error::new(Code::Busy, format!("{}: files are still open", self.mountpoint.display())))
    }
}

/// Take the mount out of the name space; at once if it is not in use, else as soon as it no longer is.
fn detach(mountpoint: &Path) -> Result<()> {
    let failed = |e: &std::io::Error| io_error(&format!("cannot unmount {}", mountpoint.display()), e);
    let path = CString::new(mountpoint.as_os_str().as_bytes()).map_err(|e| failed(&e.into()))?;
    for flags in [libc::UMOUNT_NOFOLLOW, libc::UMOUNT_NOFOLLOW | libc::MNT_DETACH] {
        // SAFETY: `path` is a valid C string.
        if unsafe { libc::umount2(path.as_ptr(), flags) } == 0 {
            return Ok(());
        }
        let error = std::io::Error::last_os_error();
        match error.raw_os_error() {
            // Not mounted any more.
            Some(libc::EINVAL | libc::ENOENT) => return Ok(()),
            Some(libc::EBUSY) => {}
            Some(libc::EPERM) => return detach_by_helper(mountpoint),
            _ => return Err(failed(&error)),
        }
    }
    Err(Error::new(Code::Busy, format!("cannot unmount {}: it is in use", mountpoint.display())))
}

/// Ordinary users unmount through the set-user-id helper of FUSE.
fn detach_by_helper(mountpoint: &Path) -> Result<()> {
    for helper in ["fusermount3", "fusermount"] {
        let mut command = Command::new(helper);
        command.args(["-u", "-z", "--"]).arg(mountpoint).stdin(Stdio::null()).stdout(Stdio::null());
        match command.stderr(Stdio::null()).status() {
            Ok(status) if status.success() => return Ok(()),
            _ => {}
        }
    }
    Err(Error::new(Code::Access, format!("cannot unmount {}: fusermount3 -u failed", mountpoint.display())))
}

/// Best effort: only the superuser may, and where it fails the daemon's own read-ahead remains.
fn set_readahead(mountpoint: &Path, bytes: usize) {
    let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    if let Some(device) = device_of(&table, mountpoint) {
        let file = format!("/sys/class/bdi/{device}/read_ahead_kb");
        if let Err(error) = std::fs::write(&file, (bytes / 1024).to_string()) {
            tracing::debug!(%error, file, "the kernel's read-ahead stays as it is");
        }
    }
}

/// `major:minor` of the last mount on `mountpoint` in a `mountinfo` table.
fn device_of(mountinfo: &str, mountpoint: &Path) -> Option<String> {
    let escaped = mountpoint.to_str()?.replace('\\', "\\134").replace(' ', "\\040");
    let escaped = escaped.replace('\t', "\\011").replace('\n', "\\012");
    let mut lines = mountinfo.lines().rev();
    lines.find_map(|line| {
        let fields: Vec<_> = line.split(' ').collect();
        (fields.len() > 4 && fields[4] == escaped).then(|| fields[2].to_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_device_of_a_mountpoint_is_found_in_the_table() {
        let table = "25 30 0:23 / /sys rw - sysfs sysfs rw\n\
                     90 30 0:51 / /mnt/a\\040b rw - fuse.fs3 fs3 rw\n\
                     91 30 0:52 / /mnt/a\\040b rw - fuse.fs3 fs3 rw\n";
        assert_eq!(device_of(table, Path::new("/mnt/a b")).as_deref(), Some("0:52"));
        assert_eq!(device_of(table, Path::new("/mnt")), None);
    }

    #[test]
    fn commas_in_the_source_do_not_end_the_option_of_the_helper_program() {
        assert_eq!(source_option("fs3://a:1,b:2/x\\y", true), "fs3://a:1,b:2/x\\y");
        assert_eq!(source_option("fs3://a:1,b:2/x\\y", false), "fs3://a:1\\,b:2/x\\\\y");
    }

    #[test]
    fn options_reach_the_session() {
        let options = MountOptions { allow_other: true, read_only: true, threads: 3, ..Default::default() };
        let config = options.config();
        assert_eq!((config.n_threads, config.acl), (Some(3), SessionACL::All));
        assert!(config.mount_options.contains(&MountOption::RO));
        assert!(config.mount_options.contains(&MountOption::DefaultPermissions));
        assert!(config.mount_options.contains(&MountOption::CUSTOM("subtype=fs3".to_owned())));
    }
}
