//! `libhf3fs_api_shared.so`: the C interface of 3FS's user-space I/O over an fs3 mount. `include/hf3fs_usrbio.h` says what
//! each function does; here are only checks of what comes from C, and the way to `fs3-ring`.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::mem::{offset_of, size_of};
use std::path::Path;

use fs3_ring::app::{Announced, Done, Io, Ring};
use fs3_ring::layout::{Config, Places};
use fs3_ring::mounts::{mountpoint_of, path_of};
use fs3_ring::names::Name;
use fs3_ring::{Errno, fds};

/// Room for the path of a mount, with its zero byte.
const MOUNT_BYTES: usize = 256;
/// Results that are fetched without asking for memory.
const DONE_AT_ONCE: usize = 256;

/// `struct hf3fs_iov`.
#[repr(C)]
pub struct Iov {
    base: *mut u8,
    iovh: *mut c_void,
    id: [u8; 16],
    mount_point: [c_char; MOUNT_BYTES],
    size: usize,
    block_size: usize,
    numa: c_int,
}

/// `struct hf3fs_ior`.
#[repr(C)]
pub struct Ior {
    iov: Iov,
    iorh: *mut c_void,
    mount_point: [c_char; MOUNT_BYTES],
    for_read: bool,
    io_depth: c_int,
    priority: c_int,
    timeout: c_int,
    flags: u64,
}

/// `struct hf3fs_cqe`.
#[repr(C)]
pub struct Cqe {
    index: i32,
    reserved: i32,
    result: i64,
    userdata: *const c_void,
}

const _: () = {
    assert!(size_of::<Iov>() == 312 && offset_of!(Iov, iovh) == 8 && offset_of!(Iov, id) == 16);
    assert!(offset_of!(Iov, mount_point) == 32 && offset_of!(Iov, size) == 288);
    assert!(offset_of!(Iov, block_size) == 296 && offset_of!(Iov, numa) == 304);
    assert!(size_of::<Ior>() == 600 && offset_of!(Ior, iorh) == 312 && offset_of!(Ior, mount_point) == 320);
    assert!(offset_of!(Ior, for_read) == 576 && offset_of!(Ior, io_depth) == 580 && offset_of!(Ior, priority) == 584);
    assert!(offset_of!(Ior, timeout) == 588 && offset_of!(Ior, flags) == 592);
    assert!(size_of::<Cqe>() == 24 && offset_of!(Cqe, result) == 8 && offset_of!(Cqe, userdata) == 16);
};

type Result<T> = fs3_ring::Result<T>;

const INVALID: Errno = Errno(libc::EINVAL);

/// 0 or a negative errno.
fn answer(result: Result<()>) -> c_int {
    result.map_or_else(|error| -error.0, |()| 0)
}

/// # Safety
/// `text` is null or a C string.
unsafe fn text<'a>(text: *const c_char) -> Result<&'a CStr> {
    if text.is_null() {
        return Err(INVALID);
    }
    // SAFETY: the caller's promise.
    Ok(unsafe { CStr::from_ptr(text) })
}

/// The mount's path, and as a structure holds it. Errors: EINVAL when it is empty or too long.
///
/// # Safety
/// `mount` is null or a C string.
unsafe fn mount_of<'a>(mount: *const c_char) -> Result<(&'a Path, [c_char; MOUNT_BYTES])> {
    // SAFETY: the caller's promise.
    let mount = unsafe { text(mount) }?;
    let bytes = mount.to_bytes();
    if bytes.is_empty() || bytes.len() >= MOUNT_BYTES {
        return Err(INVALID);
    }
    let mut field = [0; MOUNT_BYTES];
    for (place, byte) in field.iter_mut().zip(bytes) {
        *place = *byte as c_char;
    }
    Ok((path_of(mount), field))
}

/// Is the descriptor one of a mount?
#[unsafe(no_mangle)]
pub extern "C" fn hf3fs_is_hf3fs(fd: c_int) -> bool {
    fds::is_of_mount(fd)
}

/// The mount that a path is on.
///
/// # Safety
/// `out` has room for `size` bytes, `path` is a C string.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hf3fs_extract_mount_point(out: *mut c_char, size: c_int, path: *const c_char) -> c_int {
    // SAFETY: the caller's promise.
    let Ok(path) = (unsafe { text(path) }) else { return -1 };
    let Some(mount) = mountpoint_of(path_of(path)) else { return -1 };
    let bytes = mount.as_os_str().as_encoded_bytes();
    if !out.is_null() && bytes.len() < usize::try_from(size).unwrap_or(0) {
        // SAFETY: there is room for the bytes and a zero.
        unsafe {
            std::ptr::copy_nonoverlapping(bytes.as_ptr().cast(), out, bytes.len());
            *out.add(bytes.len()) = 0;
        }
    }
    c_int::try_from(bytes.len() + 1).unwrap_or(-1)
}

fn fill(announced: Announced, mount_point: [c_char; MOUNT_BYTES], block_size: usize, numa: c_int) -> Iov {
    let (base, size, id) = (announced.memory().start(), announced.memory().bytes(), announced.id());
    Iov { base, iovh: Box::into_raw(Box::new(announced)).cast(), id, mount_point, size, block_size, numa }
}

/// Make shared memory and announce it.
///
/// # Safety
/// `iov` is valid for writing, `mount` a C string.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hf3fs_iovcreate(
    iov: *mut Iov,
    mount: *const c_char,
    size: usize,
    block_size: usize,
    numa: c_int,
) -> c_int {
    let made = || {
        // SAFETY: the caller's promise.
        let (path, field) = unsafe { mount_of(mount) }?;
        if iov.is_null() || size == 0 {
            return Err(INVALID);
        }
        let announced = Announced::create(path, size, numa, |id| Name::iov(id, block_size as u64))?;
        // SAFETY: the caller's promise.
        unsafe { iov.write(fill(announced, field, block_size, numa)) };
        Ok(())
    };
    answer(made())
}

/// Map memory that another process announced.
///
/// # Safety
/// As of [`hf3fs_iovcreate`]; `id` is valid for 16 bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hf3fs_iovopen(
    iov: *mut Iov,
    id: *const u8,
    mount: *const c_char,
    size: usize,
    block_size: usize,
    numa: c_int,
) -> c_int {
    let opened = || {
        // SAFETY: the caller's promise.
        let (path, field) = unsafe { mount_of(mount) }?;
        if iov.is_null() || id.is_null() || size == 0 {
            return Err(INVALID);
        }
        // SAFETY: the caller's promise.
        let id = unsafe { id.cast::<[u8; 16]>().read() };
        let announced = Announced::open(path, id, size, block_size as u64)?;
        // SAFETY: the caller's promise.
        unsafe { iov.write(fill(announced, field, block_size, numa)) };
        Ok(())
    };
    answer(opened())
}

/// Use memory that is mapped and announced already.
///
/// # Safety
/// As of [`hf3fs_iovopen`]; `base` is the memory that was announced as `id`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hf3fs_iovwrap(
    iov: *mut Iov,
    base: *mut c_void,
    id: *const u8,
    mount: *const c_char,
    size: usize,
    block_size: usize,
    numa: c_int,
) -> c_int {
    let wrapped = || {
        // SAFETY: the caller's promise.
        let (_, mount_point) = unsafe { mount_of(mount) }?;
        if iov.is_null() || id.is_null() || base.is_null() {
            return Err(INVALID);
        }
        // SAFETY: the caller's promise.
        let id = unsafe { id.cast::<[u8; 16]>().read() };
        let value = Iov { base: base.cast(), iovh: std::ptr::null_mut(), id, mount_point, size, block_size, numa };
        // SAFETY: the caller's promise.
        unsafe { iov.write(value) };
        Ok(())
    };
    answer(wrapped())
}

/// Remove the file of the memory; it stays mapped and announced.
///
/// # Safety
/// `iov` is null or one that a function of this library filled.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hf3fs_iovunlink(iov: *mut Iov) {
    // SAFETY: the caller's promise; a handle is a box of ours.
    if let Some(announced) = unsafe { iov.as_ref().and_then(|iov| iov.iovh.cast::<Announced>().as_ref()) } {
        announced.unlink();
    }
}

/// Withdraw and unmap memory.
///
/// # Safety
/// As of [`hf3fs_iovunlink`]; nobody uses the memory any more.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hf3fs_iovdestroy(iov: *mut Iov) {
    // SAFETY: the caller's promise.
    let Some(iov) = (unsafe { iov.as_mut() }) else { return };
    let handle = std::mem::replace(&mut iov.iovh, std::ptr::null_mut()).cast::<Announced>();
    if !handle.is_null() {
        iov.base = std::ptr::null_mut();
        // SAFETY: made by `fill`, and taken out of the structure, so this happens once.
        drop(unsafe { Box::from_raw(handle) });
    }
}

/// Bytes of a ring.
#[unsafe(no_mangle)]
pub extern "C" fn hf3fs_ior_size(entries: c_int) -> usize {
    u32::try_from(entries).ok().and_then(Places::new).map_or(0, Places::bytes)
}

/// # Safety
/// `ior` is valid for writing, `mount` a C string.
unsafe fn create_ring(ior: *mut Ior, mount: *const c_char, entries: c_int, config: Config, numa: c_int) -> c_int {
    let made = || {
        // SAFETY: the caller's promise.
        let (path, mount_point) = unsafe { mount_of(mount) }?;
        if ior.is_null() {
            return Err(INVALID);
        }
        let ring = Ring::create(path, entries, config, numa)?;
        let memory = ring.announced().memory();
        let iov = Iov {
            base: memory.start(),
            iovh: std::ptr::null_mut(),
            id: ring.announced().id(),
            mount_point,
            size: memory.bytes(),
            block_size: 0,
            numa,
        };
        let value = Ior {
            iov,
            iorh: Box::into_raw(Box::new(ring)).cast(),
            mount_point,
            for_read: config.for_read,
            io_depth: config.io_depth,
            priority: config.priority,
            timeout: config.timeout_ms as c_int,
            flags: config.flags,
        };
        // SAFETY: the caller's promise.
        unsafe { ior.write(value) };
        Ok(())
    };
    answer(made())
}

/// Make a ring.
///
/// # Safety
/// `ior` is valid for writing, `mount` a C string.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hf3fs_iorcreate(
    ior: *mut Ior,
    mount: *const c_char,
    entries: c_int,
    for_read: bool,
    io_depth: c_int,
    numa: c_int,
) -> c_int {
    // SAFETY: the caller's promise.
    unsafe { hf3fs_iorcreate3(ior, mount, entries, for_read, io_depth, 0, 0, numa) }
}

/// Make a ring.
///
/// # Safety
/// As of [`hf3fs_iorcreate`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hf3fs_iorcreate2(
    ior: *mut Ior,
    mount: *const c_char,
    entries: c_int,
    for_read: bool,
    io_depth: c_int,
    priority: c_int,
    numa: c_int,
) -> c_int {
    // SAFETY: the caller's promise.
    unsafe { hf3fs_iorcreate3(ior, mount, entries, for_read, io_depth, priority, 0, numa) }
}

/// Make a ring.
///
/// # Safety
/// As of [`hf3fs_iorcreate`].
#[unsafe(no_mangle)]
#[allow(clippy::too_many_arguments)]
pub unsafe extern "C" fn hf3fs_iorcreate3(
    ior: *mut Ior,
    mount: *const c_char,
    entries: c_int,
    for_read: bool,
    io_depth: c_int,
    priority: c_int,
    timeout: c_int,
    numa: c_int,
) -> c_int {
    let Ok(timeout_ms) = u32::try_from(timeout) else { return -libc::EINVAL };
    let config = Config { for_read, io_depth, priority, timeout_ms, flags: 0 };
    // SAFETY: the caller's promise.
    unsafe { create_ring(ior, mount, entries, config, numa) }
}

/// Make a ring.
///
/// # Safety
/// As of [`hf3fs_iorcreate`].
#[unsafe(no_mangle)]
#[allow(clippy::too_many_arguments)]
pub unsafe extern "C" fn hf3fs_iorcreate4(
    ior: *mut Ior,
    mount: *const c_char,
    entries: c_int,
    for_read: bool,
    io_depth: c_int,
    timeout: c_int,
    numa: c_int,
    flags: u64,
) -> c_int {
    let Ok(timeout_ms) = u32::try_from(timeout) else { return -libc::EINVAL };
    let config = Config { for_read, io_depth, priority: 0, timeout_ms, flags };
    // SAFETY: the caller's promise.
    unsafe { create_ring(ior, mount, entries, config, numa) }
}

/// End a ring.
///
/// # Safety
/// `ior` is null or one that a function of this library filled; nobody uses it any more.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hf3fs_iordestroy(ior: *mut Ior) {
    // SAFETY: the caller's promise.
    let Some(ior) = (unsafe { ior.as_mut() }) else { return };
    let handle = std::mem::replace(&mut ior.iorh, std::ptr::null_mut()).cast::<Ring>();
    if !handle.is_null() {
        ior.iov.base = std::ptr::null_mut();
        // SAFETY: made by `create_ring`, and taken out of the structure, so this happens once.
        drop(unsafe { Box::from_raw(handle) });
    }
}

/// Register an open file.
#[unsafe(no_mangle)]
pub extern "C" fn hf3fs_reg_fd(fd: c_int, _flags: u64) -> c_int {
    fds::register(fd).map_or_else(|error| error.0, |copy| -copy)
}

/// Withdraw a registered file.
#[unsafe(no_mangle)]
pub extern "C" fn hf3fs_dereg_fd(fd: c_int) {
    fds::withdraw(fd);
}

/// # Safety
/// `ior` is null or one that a function of this library filled.
unsafe fn ring_of<'a>(ior: *const Ior) -> Option<&'a Ring> {
    // SAFETY: the caller's promise; a handle is a box of ours.
    unsafe { ior.as_ref().and_then(|ior| ior.iorh.cast::<Ring>().as_ref()) }
}

/// I/Os that may be outstanding.
///
/// # Safety
/// `ior` is null or one that a function of this library filled.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hf3fs_io_entries(ior: *const Ior) -> c_int {
    // SAFETY: the caller's promise.
    unsafe { ring_of(ior) }.map_or(-libc::EINVAL, |ring| ring.entries() as c_int)
}

/// Prepare an I/O.
///
/// # Safety
/// `ior` and `iov` are null or filled by functions of this library.
#[unsafe(no_mangle)]
#[allow(clippy::too_many_arguments)]
pub unsafe extern "C" fn hf3fs_prep_io(
    ior: *const Ior,
    iov: *const Iov,
    read: bool,
    ptr: *mut c_void,
    fd: c_int,
    off: usize,
    len: u64,
    userdata: *const c_void,
) -> c_int {
    let prepared = || {
        // SAFETY: the caller's promise.
        let (ring, iov) = unsafe { (ring_of(ior).ok_or(INVALID)?, iov.as_ref().ok_or(INVALID)?) };
        let iov_offset = (ptr as usize).checked_sub(iov.base as usize).ok_or(INVALID)?;
        let end = (iov_offset as u64).checked_add(len).ok_or(INVALID)?;
        if read != ring.config().for_read || iov.base.is_null() || end > iov.size as u64 {
            return Err(INVALID);
        }
        let iov_offset = iov_offset as u64;
        if iov.block_size > 0 && len > 0 && iov_offset / iov.block_size as u64 != (end - 1) / iov.block_size as u64 {
            return Err(INVALID);
        }
        let io = Io { fd, offset: off as u64, length: len, iov: iov.id, iov_offset, userdata: userdata as usize };
        ring.prepare(&io)
    };
    prepared().map_or_else(|error| -error.0, |index| index as c_int)
}

/// Tell the daemon of what was prepared.
///
/// # Safety
/// `ior` is null or one that a function of this library filled.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hf3fs_submit_ios(ior: *const Ior) -> c_int {
    // SAFETY: the caller's promise.
    let ring = unsafe { ring_of(ior) };
    answer(ring.map(Ring::submit).ok_or(INVALID))
}

/// Fetch results.
///
/// # Safety
/// `ior` as above, `cqes` has room for `cqec` results, `abs_timeout` is null or valid.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hf3fs_wait_for_ios(
    ior: *const Ior,
    cqes: *mut Cqe,
    cqec: c_int,
    min_results: c_int,
    abs_timeout: *const libc::timespec,
) -> c_int {
    // SAFETY: the caller's promise.
    let (ring, deadline) = unsafe { (ring_of(ior), abs_timeout.as_ref()) };
    let (Some(ring), Ok(room @ 1..)) = (ring, usize::try_from(cqec)) else { return -libc::EINVAL };
    if cqes.is_null() {
        return -libc::EINVAL;
    }
    let mut few = [Done::default(); DONE_AT_ONCE];
    let mut many = Vec::new();
    let done = if room <= DONE_AT_ONCE {
        &mut few[..room]
    } else {
        many.resize(room.min(ring.entries() as usize), Done::default());
        &mut many[..]
    };
    match ring.wait(done, usize::try_from(min_results).unwrap_or(0), deadline) {
        Err(error) => -error.0,
        Ok(count) => {
            for (at, done) in done[..count].iter().enumerate() {
                let userdata = done.userdata as *const c_void;
                let cqe = Cqe { index: done.index as i32, reserved: 0, result: done.result, userdata };
                // SAFETY: `at` is below `cqec`.
                unsafe { cqes.add(at).write(cqe) };
            }
            count as c_int
        }
    }
}

/// Give a file another name.
///
/// # Safety
/// Both are null or C strings.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hf3fs_hardlink(target: *const c_char, link_name: *const c_char) -> c_int {
    if target.is_null() || link_name.is_null() {
        return libc::EINVAL;
    }
    // SAFETY: the caller's promise.
    if unsafe { libc::link(target, link_name) } == 0 { 0 } else { Errno::last().0 }
}

/// Make holes in a file.
///
/// # Safety
/// `start` and `end` are valid for `n` numbers.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hf3fs_punchhole(
    fd: c_int,
    n: c_int,
    start: *const usize,
    end: *const usize,
    _flags: usize,
) -> c_int {
    let Ok(count) = usize::try_from(n) else { return libc::EINVAL };
    if count > 0 && (start.is_null() || end.is_null()) {
        return libc::EINVAL;
    }
    for at in 0..count {
        // SAFETY: the caller's promise.
        let (start, end) = unsafe { (*start.add(at), *end.add(at)) };
        if let Err(error) = fs3_ring::fds::punch(fd, start as u64, end as u64) {
            return error.0;
        }
    }
    0
}
