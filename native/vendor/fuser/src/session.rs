//! Filesystem session
//!
//! A session runs a filesystem implementation while it is being mounted to a specific mount
//! point. A session begins by mounting the filesystem and ends by unmounting it. While the
//! filesystem is mounted, the session loop receives, dispatches and replies to kernel requests
//! for filesystem operations under its mount point.

use std::borrow::Cow;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use log::debug;
use log::error;
use log::info;
use log::warn;
use nix::unistd::Uid;
use nix::unistd::geteuid;
use parking_lot::{Condvar, Mutex};

use crate::Errno;
use crate::Filesystem;
use crate::KernelConfig;
use crate::MountOption;
use crate::ReplyEmpty;
use crate::Request;
use crate::channel::Channel;
use crate::dev_fuse::DevFuse;
use crate::ll;
use crate::ll::Operation;
use crate::ll::ResponseErrno;
use crate::ll::Version;
use crate::ll::flags::init_flags::InitFlags;
use crate::ll::fuse_abi as abi;
use crate::mnt::Mount;
use crate::mnt::mount_options::Config;
use crate::mnt::mount_options::check_option_conflicts;
use crate::notify::Notifier;
use crate::read_buf::FuseReadBuf;
use crate::reply::Reply;
use crate::reply::ReplyRaw;
use crate::reply::ReplySender;
use crate::request::RequestWithSender;

/// The max size of write requests from the kernel. The absolute minimum is 4k,
/// FUSE recommends at least 128k, max 16M. The FUSE default is 16M on macOS
/// and 128k on other systems.
pub(crate) const MAX_WRITE_SIZE: usize = 16 * 1024 * 1024;

#[derive(Default, Debug, Eq, PartialEq, Clone, Copy)]
/// How requests should be filtered based on the calling UID.
pub enum SessionACL {
    /// Allow requests from any user. Corresponds to the `allow_other` mount option.
    All,
    /// Allow requests from root. Corresponds to the `allow_root` mount option.
    RootAndOwner,
    /// Allow requests from the owning UID. This is FUSE's default mode of operation.
    #[default]
    Owner,
}

impl SessionACL {
    /// Returns the mount option string for kernel/fusermount/libfuse paths.
    /// Both `All` and `RootAndOwner` map to `allow_other` - the kernel only
    /// understands `allow_other`, and fuser enforces the root-only restriction internally.
    #[allow(dead_code)]
    pub(crate) fn to_mount_option(self) -> Option<&'static str> {
        match self {
            SessionACL::All | SessionACL::RootAndOwner => Some("allow_other"),
            SessionACL::Owner => None,
        }
    }
}

/// Calls `destroy` on drop.
#[derive(Debug)]
pub(crate) struct FilesystemHolder<FS: Filesystem> {
    pub(crate) fs: Option<FS>,
}

impl<FS: Filesystem> FilesystemHolder<FS> {
    fn destroy(&mut self) {
        if let Some(mut fs) = self.fs.take() {
            fs.destroy();
        }
    }
}

impl<FS: Filesystem> Drop for FilesystemHolder<FS> {
    fn drop(&mut self) {
        self.destroy();
    }
}

#[derive(Debug)]
struct UmountOnDrop {
    mount: Arc<Mutex<Option<Mount>>>,
}

impl UmountOnDrop {
    fn umount(&self) -> io::Result<()> {
        if let Some(mount) = self.mount.lock().take() {
            mount.umount()?;
        }
        Ok(())
    }
}

impl Drop for UmountOnDrop {
    fn drop(&mut self) {
        if let Err(e) = self.umount() {
            warn!("Failed to umount filesystem: {}", e);
        }
    }
}

/// The session data structure
#[derive(Debug)]
pub struct Session<FS: Filesystem> {
    /// Filesystem operation implementations. None after `destroy` called.
    pub(crate) filesystem: FilesystemHolder<FS>,
    /// Communication channel to the kernel driver
    pub(crate) ch: Channel,
    /// Channels of the threads besides the one that uses `ch`: made when requests are first served.
    clones: Vec<Channel>,
    pause: Arc<Pause>,
    /// Handle to the mount.  Dropping this unmounts.
    mount: UmountOnDrop,
    /// Whether to restrict access to owner, root + owner, or unrestricted
    /// Used to implement `allow_root` and `auto_unmount`
    pub(crate) allowed: SessionACL,
    /// User that launched the fuser process
    pub(crate) session_owner: Uid,
    /// FUSE protocol version, as reported by the kernel.
    /// The field is set to `Some` when the init message is received.
    pub(crate) proto_version: Option<Version>,
    pub(crate) config: Config,
}

impl<FS: Filesystem> AsFd for Session<FS> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.ch.as_fd()
    }
}

impl<FS: Filesystem> Session<FS> {
    /// Create a new session by mounting the given filesystem to the given mountpoint
    /// # Errors
    /// Returns an error if the options are incorrect, or if the fuse device can't be mounted.
    pub fn new<P: AsRef<Path>>(
        filesystem: FS,
        mountpoint: P,
        options: &Config,
    ) -> io::Result<Session<FS>> {
        check_option_conflicts(options)?;

        let mountpoint = mountpoint.as_ref();
        info!("Mounting {}", mountpoint.display());
        // If AutoUnmount is requested, but not AllowRoot or AllowOther, return an error
        // because fusermount needs allow_root or allow_other to handle the auto_unmount option
        if options.mount_options.contains(&MountOption::AutoUnmount)
            && options.acl == SessionACL::Owner
        {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("auto_unmount requires acl != Owner, got: {:?}", options.acl),
            ));
        }
        let (file, mount) = Mount::new(mountpoint, &options.mount_options, options.acl)?;

        let ch = Channel::new(file);

        let mut session = Session {
            filesystem: FilesystemHolder {
                fs: Some(filesystem),
            },
            ch,
            clones: Vec::new(),
            pause: Arc::default(),
            mount: UmountOnDrop {
                mount: Arc::new(Mutex::new(Some(mount))),
            },
            allowed: options.acl,
            session_owner: geteuid(),
            proto_version: None,
            config: options.clone(),
        };

        session.handshake()?;

        Ok(session)
    }

    /// Go on with the mount of a process that served it before. `devices`: what its [`Session::devices`] gave. The kernel
    /// is not asked anything: what it was told in the first place holds.
    /// # Errors
    /// Returns an error if there is no device.
    pub fn succeed(filesystem: FS, devices: Vec<OwnedFd>, config: &Config) -> io::Result<Self> {
        let devices = devices.into_iter().map(|fd| Channel::new(Arc::new(DevFuse(File::from(fd)))));
        let mut channels = devices.enumerate().map(|(i, ch)| ch.numbered(i));
        let ch = channels.next().ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        Ok(Session {
            filesystem: FilesystemHolder { fs: Some(filesystem) },
            ch,
            clones: channels.collect(),
            pause: Arc::default(),
            mount: UmountOnDrop { mount: Arc::default() },
            allowed: config.acl,
            session_owner: geteuid(),
            proto_version: None,
            config: config.clone(),
        })
    }

    /// The device, and its clones: what a successor needs to go on.
    /// # Errors
    /// Returns an error if there are too many open files.
    pub fn devices(&self) -> io::Result<Vec<OwnedFd>> {
        let channels = std::iter::once(&self.ch).chain(&self.clones);
        channels.map(|ch| ch.as_fd().try_clone_to_owned()).collect()
    }

    /// Answer a request that a predecessor left unanswered ([`ReplyEmpty::leave`]).
    pub fn reply_to(&self, left: LeftRequest) -> Option<ReplyEmpty> {
        let ch = std::iter::once(&self.ch).chain(&self.clones).nth(left.device)?;
        Some(Reply::new(crate::ll::RequestId(left.request), ReplySender::Channel(ch.sender())))
    }

    /// Another process serves the mount from here on: it is not unmounted, and the device is closed here.
    pub fn give_away(self) {
        if let Some(mount) = self.mount.mount.lock().take() {
            mount.give_away();
        }
    }

    /// Makes [`Session::serve`] return.
    pub fn pauser(&self) -> Pauser {
        Pauser(self.pause.clone())
    }

    /// Receive requests of the kernel and hand them to the filesystem, on as many threads as the configuration
    /// says, until the filesystem is unmounted or a [`Pauser`] says so. May be called again after a pause.
    /// # Errors
    /// Returns any final error when the session comes to an end.
    pub fn serve(&mut self) -> io::Result<Ended> {
        let wanted = self.config.n_threads.unwrap_or(1).max(1) - 1;
        while self.clones.len() < wanted {
            let clone = if self.config.clone_fd { self.ch.clone_fd()? } else { self.ch.clone() };
            self.clones.push(clone.numbered(self.clones.len() + 1));
        }
        install_wake_up()?;
        let filesystem = &self.filesystem;
        let (pause, allowed, session_owner) = (&*self.pause, self.allowed, self.session_owner);
        let ended: Vec<io::Result<Ended>> = thread::scope(|scope| {
            let mut threads = Vec::new();
            let mut failed = None;
            for (i, ch) in std::iter::once(&self.ch).chain(&self.clones).enumerate() {
                let thread_name = format!("fuser-{i}");
                let event_loop = SessionEventLoop {
                    thread_name: thread_name.clone(),
                    filesystem,
                    ch: ch.clone(),
                    allowed,
                    session_owner,
                };
                let run = move || pause.counted(|| event_loop.event_loop(pause));
                match thread::Builder::new().name(thread_name).spawn_scoped(scope, run) {
                    Ok(thread) => threads.push(thread),
                    Err(error) => {
                        failed = Some(Err(error));
                        Pauser(self.pause.clone()).pause();
                        break;
                    }
                }
            }
            pause.wait_for_the_end(threads.len());
            let joined = threads.into_iter().map(|thread| thread.join());
            joined
                .map(|ended| ended.unwrap_or_else(|_| Err(io::Error::other("event loop thread panicked"))))
                .chain(failed)
                .collect()
        });
        let ended = ended.into_iter().collect::<io::Result<Vec<_>>>();
        if let Ok(ended) = &ended
            && ended.iter().all(|ended| *ended == Ended::Paused)
        {
            return Ok(Ended::Paused);
        }
        self.filesystem.destroy();
        ended.map(|_| Ended::Unmounted)
    }

    fn handshake(&mut self) -> io::Result<()> {
        let mut buf = FuseReadBuf::new();
        let buf = buf.as_mut();

        loop {
            // Read the init request from the kernel
            let size = match self.ch.receive_retrying(buf) {
                Ok(size) => size,
                Err(nix::errno::Errno::ENODEV) => {
                    return Err(io::Error::new(
                        io::ErrorKind::NotConnected,
                        "FUSE device disconnected during handshake",
                    ));
                }
                Err(err) => return Err(err.into()),
            };

            // Parse the request
            let request = match ll::AnyRequest::try_from(&buf[..size]) {
                Ok(request) => request,
                Err(err) => {
                    error!("{err}");
                    return Err(io::Error::new(io::ErrorKind::InvalidData, err.to_string()));
                }
            };

            // Extract the init operation
            let op = match request.operation() {
                Ok(op) => op,
                Err(_) => {
                    return Err(io::Error::new(
                        io::ErrorKind::InvalidData,
                        "Failed to parse FUSE operation",
                    ));
                }
            };

            let init = match op {
                ll::Operation::Init(init) => init,
                _ => {
                    error!("Received non-init FUSE operation before init: {}", request);
                    // Send error response and return error - non-init during handshake is invalid
                    <ReplyRaw as Reply>::new(
                        request.unique(),
                        ReplySender::Channel(self.ch.sender()),
                    )
                    .send_ll(&ResponseErrno(ll::Errno::EIO));
                    return Err(io::Error::new(
                        io::ErrorKind::InvalidData,
                        "Received non-init FUSE operation during handshake",
                    ));
                }
            };

            let v = init.version();
            if v.0 > abi::FUSE_KERNEL_VERSION {
                // Kernel has a newer major version than we support.
                // Send our version and wait for a second INIT request with a compatible version.
                debug!(
                    "INIT: Kernel version {} > our version {}, sending our version and waiting for next init",
                    v.0,
                    abi::FUSE_KERNEL_VERSION
                );
                let response = init.reply_version_only();
                <ReplyRaw as Reply>::new(request.unique(), ReplySender::Channel(self.ch.sender()))
                    .send_ll(&response);
                continue;
            }

            // We don't support ABI versions before 7.6
            if v < Version(7, 6) {
                error!("Unsupported FUSE ABI version {v}");
                <ReplyRaw as Reply>::new(request.unique(), ReplySender::Channel(self.ch.sender()))
                    .send_ll(&ResponseErrno(ll::Errno::EPROTO));
                return Err(io::Error::new(
                    io::ErrorKind::Unsupported,
                    format!("Unsupported FUSE ABI version {v}"),
                ));
            }

            let mut config = KernelConfig::new(init.capabilities(), init.max_readahead(), v);

            // Call filesystem init method and give it a chance to return an error
            let Some(filesystem) = &mut self.filesystem.fs else {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidInput,
                    "Bug: filesystem must be initialized during handshake",
                ));
            };
            let res = filesystem.init(Request::ref_cast(request.header()), &mut config);
            if let Err(error) = res {
                let errno = Errno::from_i32(error.raw_os_error().unwrap_or(0));
                <ReplyRaw as Reply>::new(request.unique(), ReplySender::Channel(self.ch.sender()))
                    .send_ll(&ResponseErrno(errno));
                return Err(error);
            }

            // Remember the ABI version supported by kernel and mark the session initialized.
            self.proto_version = Some(v);

            // Log capability status for debugging
            for bit in 0..64 {
                let bitflags = InitFlags::from_bits_retain(1 << bit);
                if bitflags == InitFlags::FUSE_INIT_EXT {
                    continue;
                }
                let bitflag_is_known = InitFlags::all().contains(bitflags);
                let kernel_supports = init.capabilities().contains(bitflags);
                let we_requested = config.requested.contains(bitflags);
                // On macOS, there's a clash between linux and macOS constants,
                // so we pick macOS ones (last).
                let name = if let Some((name, _)) = bitflags.iter_names().last() {
                    Cow::Borrowed(name)
                } else {
                    Cow::Owned(format!("(1 << {bit})"))
                };
                if we_requested && kernel_supports {
                    debug!("capability {name} enabled")
                } else if we_requested {
                    debug!("capability {name} not supported by kernel")
                } else if kernel_supports {
                    debug!("capability {name} not requested by client")
                } else if bitflag_is_known {
                    debug!("capability {name} not supported nor requested")
                }
            }

            // Reply with our desired version and settings.
            debug!(
                "INIT response: ABI {}.{}, flags {:#x}, max readahead {}, max write {}",
                abi::FUSE_KERNEL_VERSION,
                abi::FUSE_KERNEL_MINOR_VERSION,
                init.capabilities() & config.requested,
                config.max_readahead,
                config.max_write
            );

            let response = init.reply(&config);
            <ReplyRaw as Reply>::new(request.unique(), ReplySender::Channel(self.ch.sender()))
                .send_ll(&response);

            return Ok(());
        }
    }

    /// Returns an object that can be used to send notifications to the kernel
    pub fn notifier(&self) -> Notifier {
        Notifier::new(self.ch.sender())
    }
}

/// Why [`Session::serve`] returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// The filesystem is unmounted.
    Unmounted,
    /// No request is being received. Those that were may still be at work.
    Paused,
}

/// A request that its receiver left to a successor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LeftRequest {
    /// Which of [`Session::devices`] it came by.
    pub device: usize,
    /// Its number, as [`Request::unique`] gives it.
    pub request: u64,
}

/// Makes [`Session::serve`] return.
#[derive(Clone, Debug)]
pub struct Pauser(Arc<Pause>);

impl Pauser {
    /// No request is received any more once `serve` has returned. Does not wait.
    pub fn pause(&self) {
        let mut state = self.0.state.lock();
        state.requested = true;
        self.0.requested.store(true, Ordering::SeqCst);
        self.0.changed.notify_all();
    }
}

/// How often threads that wait for a request are woken until they have seen that there is a pause: a signal that
/// comes right before the wait is lost.
const WAKE_UP_EVERY: Duration = Duration::from_millis(2);

#[derive(Debug, Default)]
struct Pause {
    requested: AtomicBool,
    state: Mutex<PauseState>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct PauseState {
    requested: bool,
    /// Threads that receive requests.
    threads: Vec<libc::pthread_t>,
    ended: usize,
}

impl Pause {
    /// Note the thread while it runs `receive`, so that it can be woken.
    fn counted(&self, receive: impl FnOnce() -> io::Result<Ended>) -> io::Result<Ended> {
        struct Counted<'a>(&'a Pause, libc::pthread_t);
        impl Drop for Counted<'_> {
            fn drop(&mut self) {
                let mut state = self.0.state.lock();
                state.threads.retain(|thread| *thread != self.1);
                state.ended += 1;
                self.0.changed.notify_all();
            }
        }
        // SAFETY: has no preconditions.
        let own = unsafe { libc::pthread_self() };
        self.state.lock().threads.push(own);
        let _counted = Counted(self, own);
        receive()
    }

    /// Wait until `count` threads have ended; wake those that wait for requests when there is to be a pause.
    fn wait_for_the_end(&self, count: usize) {
        let mut state = self.state.lock();
        while state.ended < count {
            if state.requested {
                for thread in &state.threads {
                    // SAFETY: it is in the list, so it runs; the signal does nothing but to interrupt its wait.
                    unsafe { libc::pthread_kill(*thread, wake_up_signal()) };
                }
                self.changed.wait_for(&mut state, WAKE_UP_EVERY);
            } else {
                self.changed.wait(&mut state);
            }
        }
        *state = PauseState::default();
        self.requested.store(false, Ordering::SeqCst);
    }
}

fn wake_up_signal() -> libc::c_int {
    libc::SIGRTMIN() + 7
}

/// Have the signal interrupt system calls and do nothing else.
fn install_wake_up() -> io::Result<()> {
    extern "C" fn nothing(_: libc::c_int) {}
    // SAFETY: all of it is initialised; the handler does nothing, which is safe at any time.
    let done = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = nothing as *const () as libc::sighandler_t;
        libc::sigemptyset(&mut action.sa_mask);
        libc::sigaction(wake_up_signal(), &action, std::ptr::null_mut())
    };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

pub(crate) struct SessionEventLoop<'a, FS: Filesystem> {
    /// Cache thread name for faster `debug!`.
    pub(crate) thread_name: String,
    pub(crate) ch: Channel,
    pub(crate) filesystem: &'a FilesystemHolder<FS>,
    pub(crate) allowed: SessionACL,
    pub(crate) session_owner: Uid,
}

impl<FS: Filesystem> SessionEventLoop<'_, FS> {
    fn event_loop(&self, pause: &Pause) -> io::Result<Ended> {
        // Buffer for receiving requests from the kernel. Only one is allocated and
        // it is reused immediately after dispatching to conserve memory and allocations.
        let mut buf = FuseReadBuf::new();
        let buf = buf.as_mut();
        loop {
            if pause.requested.load(Ordering::SeqCst) {
                return Ok(Ended::Paused);
            }
            // Read the next request from the given channel to kernel driver
            // The kernel driver makes sure that we get exactly one request per read
            match self.ch.receive(buf) {
                Err(nix::errno::Errno::ENOENT | nix::errno::Errno::EINTR | nix::errno::Errno::EAGAIN) => {}
                Ok(size) => match RequestWithSender::new(self.ch.sender(), &buf[..size]) {
                    // Dispatch request
                    Some(req) => {
                        if let Ok(Operation::Destroy(_)) = req.request.operation() {
                            req.reply::<ReplyEmpty>().ok();
                            return Ok(Ended::Unmounted);
                        } else {
                            req.dispatch(self)
                        }
                    }
                    // Quit loop on illegal request
                    None => {
                        return Err(io::Error::new(
                            io::ErrorKind::InvalidData,
                            "Invalid request",
                        ));
                    }
                },
                // The second comes to a thread that was taking a request when the mount ended.
                Err(nix::errno::Errno::ENODEV | nix::errno::Errno::ECONNABORTED) => return Ok(Ended::Unmounted),
                Err(err) => return Err(err.into()),
            }
        }
    }
}
