use crate::ffi::{self, Library, ibv_context, ibv_mr, ibv_pd};
use crate::{Error, Result, failed, failed_with};
use std::ffi::CStr;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;

/// What registered memory may be used for.
const ACCESS: i32 = ffi::ACCESS_LOCAL_WRITE | ffi::ACCESS_REMOTE_READ | ffi::ACCESS_REMOTE_WRITE;

/// An opened device with one protection domain. Thread-safe.
pub struct Device {
    pub(crate) library: &'static Library,
    pub(crate) context: *mut ibv_context,
    pub(crate) pd: *mut ibv_pd,
    limits: Limits,
}

/// What a device can do, as far as it matters here.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Work requests of one queue.
    pub work_requests_max: u32,
    /// Pieces of memory of one work request.
    pub sges_max: u32,
    /// Pieces of memory of one RDMA READ.
    pub read_sges_max: u32,
    /// Entries of one completion queue.
    pub completions_max: u32,
    /// RDMA READs that may be under way towards this side at a time.
    pub reads_answered_max: u8,
    /// RDMA READs that this side may have under way at a time.
    pub reads_asked_max: u8,
    /// Receives of one shared receive queue; 0 where there are none.
    pub shared_receives_max: u32,
}

/// State of a port of an opened device.
#[derive(Clone, Copy, Debug)]
pub struct Port {
    /// Whether the link is up.
    pub active: bool,
    /// Path MTU in use, as verbs number it (1: 256 bytes, 5: 4096 bytes).
    pub mtu: u8,
    /// Local identifier; 0 on Ethernet.
    pub lid: u16,
    /// Longest message in bytes.
    pub message_bytes_max: u32,
}

// SAFETY: verbs are thread-safe on one context; the pointers are used until Drop.
unsafe impl Send for Device {}
// SAFETY: as above.
unsafe impl Sync for Device {}

impl Device {
    /// Open a device by name and make its protection domain.
    ///
    /// # Errors
    /// Without libibverbs, without the device or its provider library, or without the right to open it.
    pub fn open(name: &str) -> Result<Arc<Self>> {
        let library = ffi::Library::get().map_err(Error)?;
        let context = open_context(library, name)?;
        // SAFETY: the context was just opened.
        let pd = unsafe { (library.ibv_alloc_pd)(context) };
        if pd.is_null() {
            let error = failed("a protection domain cannot be made");
            // SAFETY: nothing refers to the context.
            unsafe { (library.ibv_close_device)(context) };
            return Err(error);
        }
        let limits = Limits {
            work_requests_max: 0,
            sges_max: 0,
            read_sges_max: 0,
            completions_max: 0,
            reads_answered_max: 0,
            reads_asked_max: 0,
            shared_receives_max: 0,
        };
        let mut device = Self { library, context, pd, limits };
        device.limits = device.query_limits()?;
        Ok(Arc::new(device))
    }

    fn query_limits(&self) -> Result<Limits> {
        // SAFETY: plain numbers, for which zero is a value.
        let mut attr: ffi::ibv_device_attr = unsafe { std::mem::zeroed() };
        // SAFETY: the context is open, the structure is as long as the library expects, or longer.
        let errno = unsafe { (self.library.ibv_query_device)(self.context, &raw mut attr) };
        if errno != 0 {
            return Err(failed_with("the device does not tell its limits", errno));
        }
        let small = |n: i32| u8::try_from(n.clamp(0, 128)).unwrap_or(0);
        Ok(Limits {
            work_requests_max: attr.max_qp_wr.max(0) as u32,
            sges_max: attr.max_sge.max(0) as u32,
            read_sges_max: if attr.max_sge_rd > 0 { attr.max_sge_rd } else { attr.max_sge.max(0) } as u32,
            completions_max: attr.max_cqe.max(0) as u32,
            reads_answered_max: small(attr.max_qp_rd_atom),
            reads_asked_max: small(attr.max_qp_init_rd_atom),
            shared_receives_max: if attr.max_srq > 0 { attr.max_srq_wr.max(0) as u32 } else { 0 },
        })
    }

    /// What the device can do.
    pub fn limits(&self) -> Limits {
        self.limits
    }

    /// State of a port now.
    ///
    /// # Errors
    /// When there is no such port, or the device is gone.
    pub fn port(&self, number: u8) -> Result<Port> {
        // SAFETY: plain numbers, for which zero is a value.
        let mut attr: ffi::ibv_port_attr = unsafe { std::mem::zeroed() };
        // SAFETY: the context is open, the structure is as long as the library expects, or longer.
        let errno = unsafe { (self.library.ibv_query_port)(self.context, number, &raw mut attr) };
        if errno != 0 {
            return Err(failed_with(&format!("port {number} cannot be asked for its state"), errno));
        }
        Ok(Port {
            active: attr.state == ffi::PORT_ACTIVE,
            mtu: attr.active_mtu as u8,
            lid: attr.lid,
            message_bytes_max: attr.max_msg_sz,
        })
    }

    /// Register memory for local use and for RDMA READ and WRITE by peers of this device's queue pairs that know
    /// its key. The pages stay in memory as long as the registration lives.
    ///
    /// # Safety
    /// The memory must stay mapped while the registration lives.
    ///
    /// # Errors
    /// When the system refuses, mostly for want of locked memory.
    pub unsafe fn register(self: &Arc<Self>, start: *mut u8, bytes: usize) -> Result<MemoryRegion> {
        // SAFETY: the caller keeps the memory mapped.
        let mr = unsafe { (self.library.ibv_reg_mr)(self.pd, start.cast(), bytes, ACCESS) };
        self.region(mr, bytes)
    }

    /// As [`Device::register`], for memory of another device (a GPU's) that this process has mapped at `start`: the
    /// bytes from `offset` on of the dma-buf `fd`. They stay where they are as long as the registration lives.
    ///
    /// # Errors
    /// When the device, its driver or libibverbs cannot do that, as [`Device::takes_dmabufs`] tells, or not with this
    /// buffer.
    pub fn register_dmabuf(
        self: &Arc<Self>,
        fd: BorrowedFd<'_>,
        offset: u64,
        start: *mut u8,
        bytes: usize,
    ) -> Result<MemoryRegion> {
        let Some(register) = self.library.register_dmabuf() else {
            return Err(Error("libibverbs is too old for dma-bufs: it has no ibv_reg_dmabuf_mr".into()));
        };
        // SAFETY: the kernel keeps the buffer while it is registered; `start` is only a number to the device.
        let mr = unsafe { register(self.pd, offset, bytes, start as u64, fd.as_raw_fd(), ACCESS) };
        self.region(mr, bytes)
    }

    /// Whether dma-bufs, and so memory of GPUs, can be registered.
    pub fn takes_dmabufs(&self) -> bool {
        let Some(register) = self.library.register_dmabuf() else { return false };
        // A descriptor that is none: whoever could take a dma-buf says so. As NCCL asks.
        // SAFETY: nothing can be registered by that.
        let mr = unsafe { register(self.pd, 0, 1, 0, -1, 0) };
        let why = std::io::Error::last_os_error().raw_os_error();
        mr.is_null() && !matches!(why, Some(libc::EOPNOTSUPP | libc::EPROTONOSUPPORT | libc::ENOSYS))
    }

    fn region(self: &Arc<Self>, mr: *mut ibv_mr, bytes: usize) -> Result<MemoryRegion> {
        if mr.is_null() {
            let why = std::io::Error::last_os_error();
            let advice = match why.raw_os_error() {
                Some(libc::ENOMEM | libc::EAGAIN | libc::EPERM) => "; raise the limit of locked memory (ulimit -l)",
                _ => "",
            };
            return Err(Error(format!("{bytes} bytes cannot be registered: {why}{advice}")));
        }
        // SAFETY: a registration that succeeded is readable.
        let (lkey, rkey) = unsafe { ((*mr).lkey, (*mr).rkey) };
        Ok(MemoryRegion { device: self.clone(), mr, lkey, rkey })
    }
}

fn open_context(library: &Library, name: &str) -> Result<*mut ibv_context> {
    let mut count = 0;
    // SAFETY: returns null or a list of `count` devices that lives until it is freed.
    let list = unsafe { (library.ibv_get_device_list)(&raw mut count) };
    if list.is_null() {
        return Err(failed("the RDMA devices cannot be listed"));
    }
    // SAFETY: the list has `count` entries.
    let devices = unsafe { std::slice::from_raw_parts(list, count.max(0) as usize) };
    // SAFETY: names are strings that end with a zero within their array.
    let found = devices.iter().find(|d| unsafe { CStr::from_ptr((***d).name.as_ptr()) }.to_bytes() == name.as_bytes());
    let opened = match found {
        // SAFETY: the device is from the list, which still lives.
        Some(device) => match unsafe { (library.ibv_open_device)(*device) } {
            context if context.is_null() => Err(failed(&format!("device {name} cannot be opened"))),
            context => Ok(context),
        },
        None => Err(Error(format!(
            "libibverbs knows no device {name}: is its provider library (package ibverbs-providers) installed?"
        ))),
    };
    // SAFETY: opened devices outlive the list.
    unsafe { (library.ibv_free_device_list)(list) };
    opened
}

impl Drop for Device {
    fn drop(&mut self) {
        // SAFETY: everything made on the device holds it, so that nothing is left.
        unsafe {
            (self.library.ibv_dealloc_pd)(self.pd);
            (self.library.ibv_close_device)(self.context);
        }
    }
}

/// Registered memory. Dropping it ends every access by peers.
pub struct MemoryRegion {
    device: Arc<Device>,
    mr: *mut ibv_mr,
    lkey: u32,
    rkey: u32,
}

// SAFETY: the pointer is used only by Drop.
unsafe impl Send for MemoryRegion {}
// SAFETY: as above.
unsafe impl Sync for MemoryRegion {}

impl MemoryRegion {
    /// Key for work requests of this side.
    pub fn lkey(&self) -> u32 {
        self.lkey
    }

    /// Key for work requests of peers.
    pub fn rkey(&self) -> u32 {
        self.rkey
    }
}

impl Drop for MemoryRegion {
    fn drop(&mut self) {
        // SAFETY: registered on this device and not deregistered before.
        unsafe { (self.device.library.ibv_dereg_mr)(self.mr) };
    }
}
