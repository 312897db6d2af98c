use crate::cm::CmId;
use crate::device::Device;
use crate::ffi::{self, ibv_comp_channel, ibv_cq, ibv_qp, ibv_qp_attr, ibv_recv_wr, ibv_send_wr, ibv_srq, ibv_wc};
use crate::{Error, Result, Sge, failed, failed_with};
use std::os::fd::{AsRawFd, RawFd};
use std::ptr::null_mut;
use std::sync::{Arc, OnceLock};

/// Completions of queue pairs, with a descriptor that becomes readable when there are some.
pub struct CompletionQueue {
    device: Arc<Device>,
    channel: *mut ibv_comp_channel,
    cq: *mut ibv_cq,
}

// SAFETY: verbs on one queue are thread-safe; the pointers are used until Drop.
unsafe impl Send for CompletionQueue {}
// SAFETY: as above.
unsafe impl Sync for CompletionQueue {}

/// One finished work request.
#[derive(Clone, Copy, Debug)]
pub struct Completion {
    /// The id it was posted with.
    pub id: u64,
    /// What a receive brought, in bytes.
    pub bytes: u32,
    /// Whether it was a receive; meaningful when it succeeded.
    pub received: bool,
    /// Status as verbs number it; 0 is success.
    pub status: i32,
}

impl Completion {
    /// The status in words.
    pub fn reason(&self) -> &'static str {
        match self.status {
            0 => "success",
            1 => "a message was longer than its buffer",
            4 => "local protection error",
            5 => "flushed after an earlier error",
            9 => "the peer refused the request",
            10 => "the peer refused access to its memory",
            11 => "the peer failed",
            12 => "the peer does not answer (retries exhausted)",
            13 => "the peer has no receive posted (retries exhausted)",
            _ => "queue pair error",
        }
    }
}

impl CompletionQueue {
    /// A queue for at least `entries` completions.
    ///
    /// # Errors
    /// When the device refuses.
    pub fn new(device: &Arc<Device>, entries: u32) -> Result<Self> {
        let library = device.library;
        // SAFETY: the device is open.
        let channel = unsafe { (library.ibv_create_comp_channel)(device.context) };
        if channel.is_null() {
            return Err(failed("a completion channel cannot be made"));
        }
        // SAFETY: device and channel are open.
        let cq = unsafe { (library.ibv_create_cq)(device.context, entries as i32, null_mut(), channel, 0) };
        if cq.is_null() {
            let error = failed("a completion queue cannot be made");
            // SAFETY: nothing refers to the channel.
            unsafe { (library.ibv_destroy_comp_channel)(channel) };
            return Err(error);
        }
        let queue = Self { device: device.clone(), channel, cq };
        // SAFETY: plain calls on an open descriptor.
        let set = unsafe {
            let flags = libc::fcntl(queue.as_raw_fd(), libc::F_GETFL);
            libc::fcntl(queue.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK)
        };
        if set < 0 { Err(failed("the completion channel cannot be made non-blocking")) } else { Ok(queue) }
    }

    /// Take up to `into.len()` completions; returns how many.
    ///
    /// # Errors
    /// When the queue is broken.
    pub fn poll(&self, into: &mut Vec<Completion>) -> Result<usize> {
        // SAFETY: plain numbers, for which zero is a value.
        let mut taken: [ibv_wc; 32] = unsafe { std::mem::zeroed() };
        // SAFETY: the queue is open, the array has room for as many as are asked for.
        let n = unsafe { ((*(*self.cq).context).ops.poll_cq)(self.cq, taken.len() as i32, taken.as_mut_ptr()) };
        if n < 0 {
            return Err(Error("the completion queue is broken".into()));
        }
        // The opcode of a failed request is undefined.
        into.extend(taken[..n as usize].iter().map(|wc| Completion {
            id: wc.wr_id,
            bytes: wc.byte_len,
            received: wc.status == 0 && wc.opcode & (1 << 7) != 0,
            status: wc.status,
        }));
        Ok(n as usize)
    }

    /// Make the descriptor readable at the next completion, or (`received_only`) when the next message was received.
    /// Completions from before need another poll after this.
    ///
    /// # Errors
    /// When the device refuses.
    pub fn arm(&self, received_only: bool) -> Result<()> {
        // SAFETY: the queue is open.
        let errno = unsafe { ((*(*self.cq).context).ops.req_notify_cq)(self.cq, i32::from(received_only)) };
        if errno == 0 { Ok(()) } else { Err(failed_with("completions cannot be waited for", errno)) }
    }

    /// Take one event off the descriptor. There is at most one for each time the queue was armed. False: none.
    pub fn take_event(&self) -> bool {
        let (mut cq, mut context) = (null_mut(), null_mut());
        let library = self.device.library;
        // SAFETY: the channel is open and non-blocking.
        let taken = unsafe { (library.ibv_get_cq_event)(self.channel, &raw mut cq, &raw mut context) } == 0;
        if taken {
            // SAFETY: the event was just taken.
            unsafe { (library.ibv_ack_cq_events)(cq, 1) };
        }
        taken
    }
}

impl AsRawFd for CompletionQueue {
    fn as_raw_fd(&self) -> RawFd {
        // SAFETY: the channel lives as long as self.
        unsafe { (*self.channel).fd }
    }
}

impl Drop for CompletionQueue {
    fn drop(&mut self) {
        // SAFETY: queue pairs hold the queue, so that none is left.
        unsafe {
            (self.device.library.ibv_destroy_cq)(self.cq);
            (self.device.library.ibv_destroy_comp_channel)(self.channel);
        }
    }
}

/// Receives that the queue pairs of a device share.
pub struct SharedReceiveQueue {
    device: Arc<Device>,
    srq: *mut ibv_srq,
}

// SAFETY: posting is thread-safe; the pointer is used until Drop.
unsafe impl Send for SharedReceiveQueue {}
// SAFETY: as above.
unsafe impl Sync for SharedReceiveQueue {}

impl SharedReceiveQueue {
    /// A queue of up to `receives` receives of one piece each.
    ///
    /// # Errors
    /// When the device refuses.
    pub fn new(device: &Arc<Device>, receives: u32) -> Result<Self> {
        let attr = ffi::ibv_srq_attr { max_wr: receives, max_sge: 1, srq_limit: 0 };
        let mut init = ffi::ibv_srq_init_attr { srq_context: null_mut(), attr };
        // SAFETY: the device is open.
        let srq = unsafe { (device.library.ibv_create_srq)(device.pd, &raw mut init) };
        if srq.is_null() {
            return Err(failed("a shared receive queue cannot be made"));
        }
        Ok(Self { device: device.clone(), srq })
    }

    /// Offer memory for one incoming message.
    ///
    /// # Safety
    /// The memory must stay mapped, registered and untouched until the receive completes or the queue is dropped.
    ///
    /// # Errors
    /// When the queue is full.
    pub unsafe fn post(&self, id: u64, mut memory: Sge) -> Result<()> {
        let mut request = ibv_recv_wr { wr_id: id, next: null_mut(), sg_list: &raw mut memory, num_sge: 1 };
        let mut bad = null_mut();
        // SAFETY: the queue is open; the caller keeps the memory.
        let errno = unsafe { ((*(*self.srq).context).ops.post_srq_recv)(self.srq, &raw mut request, &raw mut bad) };
        if errno == 0 { Ok(()) } else { Err(failed_with("a receive cannot be posted", errno)) }
    }
}

impl Drop for SharedReceiveQueue {
    fn drop(&mut self) {
        // SAFETY: queue pairs hold the queue, so that none is left.
        unsafe { (self.device.library.ibv_destroy_srq)(self.srq) };
    }
}

/// What a queue pair is made with.
#[derive(Clone, Copy, Debug)]
pub struct QueuePairSettings {
    /// Work requests that may be under way.
    pub work_requests: u32,
    /// Pieces of memory per work request.
    pub sges: u32,
    /// Bytes that a work request may carry itself.
    pub inline_bytes: u32,
    /// Port of the device.
    pub port: u8,
    /// Index in the port's table of partition keys.
    pub pkey_index: u16,
}

/// How packets find the peer.
#[derive(Clone, Copy, Debug)]
pub struct PathSettings {
    /// Index of the own GID.
    pub gid_index: u8,
    /// Whether packets carry GIDs: always on Ethernet.
    pub global: bool,
    /// Path MTU as verbs number it.
    pub mtu: u8,
    /// InfiniBand service level, or Ethernet priority.
    pub service_level: u8,
    /// Traffic class, of which RoCE v2 takes DSCP and ECN.
    pub traffic_class: u8,
    /// A packet not acknowledged within 4.096 µs × 2^timeout is sent again.
    pub timeout: u8,
    /// How often, at most 7.
    pub retries: u8,
    /// RDMA READs that this side may have under way.
    pub reads_asked: u8,
    /// RDMA READs that the peer may have under way.
    pub reads_answered: u8,
}

/// Where a queue pair can be reached.
#[derive(Clone, Copy, Debug)]
pub struct Address {
    /// Queue pair number.
    pub number: u32,
    /// First packet sequence number.
    pub psn: u32,
    /// Local identifier of the port; 0 on Ethernet.
    pub lid: u16,
    /// GID in network order.
    pub gid: [u8; 16],
}

/// A peer's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Remote {
    /// Address at the peer.
    pub address: u64,
    /// Its key.
    pub key: u32,
}

/// What a work request does.
#[derive(Clone, Copy, Debug)]
pub enum Work {
    /// Bring a message to a receive of the peer.
    Send,
    /// Write the pieces to a peer's memory.
    Write(Remote),
    /// Fill the pieces from a peer's memory.
    Read(Remote),
}

/// One request to a queue pair.
#[derive(Clone, Copy, Debug)]
pub struct WorkRequest<'a> {
    /// Comes back with the completion.
    pub id: u64,
    /// What to do.
    pub work: Work,
    /// Local memory.
    pub sges: &'a [Sge],
    /// Whether it completes visibly when it succeeds; failures always do.
    pub signalled: bool,
    /// Whether the bytes are taken at once, so that the memory is free again.
    pub inline: bool,
}

/// One end of a reliable connection. Posting is thread-safe. Dropping it ends every operation in both directions:
/// afterwards neither side touches memory through it.
pub struct QueuePair {
    completions: Arc<CompletionQueue>,
    receives: Arc<SharedReceiveQueue>,
    qp: *mut ibv_qp,
    settings: QueuePairSettings,
    /// What the connection manager knows of it; goes after the pair itself.
    connection: OnceLock<CmId>,
}

// SAFETY: posting is thread-safe; the pointer is used until Drop.
unsafe impl Send for QueuePair {}
// SAFETY: as above.
unsafe impl Sync for QueuePair {}

impl QueuePair {
    /// Requests that one call posts at most.
    const POST_MAX: usize = 64;

    /// A queue pair that is ready for [`QueuePair::connect`]. `settings` are lowered to what the device gives.
    ///
    /// # Errors
    /// When the device refuses.
    pub fn new(
        completions: &Arc<CompletionQueue>,
        receives: &Arc<SharedReceiveQueue>,
        settings: QueuePairSettings,
    ) -> Result<Self> {
        let device = &completions.device;
        let cap = ffi::ibv_qp_cap {
            max_send_wr: settings.work_requests,
            max_recv_wr: 0,
            max_send_sge: settings.sges,
            max_recv_sge: 0,
            max_inline_data: settings.inline_bytes,
        };
        let mut init = ffi::ibv_qp_init_attr {
            qp_context: null_mut(),
            send_cq: completions.cq,
            recv_cq: completions.cq,
            srq: receives.srq,
            cap,
            qp_type: ffi::QPT_RC,
            sq_sig_all: 0,
        };
        // SAFETY: device and queues are open and outlive the pair.
        let mut qp = unsafe { (device.library.ibv_create_qp)(device.pd, &raw mut init) };
        if qp.is_null() && settings.inline_bytes > 0 {
            init.cap = ffi::ibv_qp_cap { max_inline_data: 0, ..cap };
            // SAFETY: as above.
            qp = unsafe { (device.library.ibv_create_qp)(device.pd, &raw mut init) };
        }
        if qp.is_null() {
            return Err(failed("a queue pair cannot be made"));
        }
        let settings = QueuePairSettings { inline_bytes: init.cap.max_inline_data, ..settings };
        let pair = Self {
            completions: completions.clone(),
            receives: receives.clone(),
            qp,
            settings,
            connection: OnceLock::new(),
        };
        let mut attr = ibv_qp_attr {
            qp_state: ffi::QPS_INIT,
            pkey_index: settings.pkey_index,
            port_num: settings.port,
            qp_access_flags: (ffi::ACCESS_REMOTE_READ | ffi::ACCESS_REMOTE_WRITE) as u32,
            ..ibv_qp_attr::default()
        };
        pair.modify(&mut attr, ffi::QP_STATE | ffi::QP_PKEY_INDEX | ffi::QP_PORT | ffi::QP_ACCESS_FLAGS)?;
        Ok(pair)
    }

    /// Its number, part of its [`Address`].
    pub fn number(&self) -> u32 {
        // SAFETY: the pair lives as long as self.
        unsafe { (*self.qp).qp_num }
    }

    /// What it was made with, as the device gave it.
    pub fn settings(&self) -> QueuePairSettings {
        self.settings
    }

    /// Be ready to receive from and to send to the peer.
    ///
    /// # Errors
    /// When the device refuses, mostly because the peer's address cannot be reached.
    pub fn connect(&self, own_psn: u32, peer: &Address, path: &PathSettings) -> Result<()> {
        let mut grh = ffi::ibv_global_route { sgid_index: path.gid_index, hop_limit: 64, ..Default::default() };
        grh.traffic_class = path.traffic_class;
        let (high, low) = peer.gid.split_at(8);
        let half = |bytes: &[u8]| u64::from_ne_bytes(bytes.try_into().expect("eight bytes"));
        grh.dgid = [half(high), half(low)];
        let address = ffi::ibv_ah_attr {
            grh: if path.global { grh } else { ffi::ibv_global_route::default() },
            dlid: peer.lid,
            sl: path.service_level,
            is_global: u8::from(path.global),
            port_num: self.settings.port,
            ..ffi::ibv_ah_attr::default()
        };
        let mut receive = ibv_qp_attr {
            qp_state: ffi::QPS_RTR,
            path_mtu: i32::from(path.mtu),
            dest_qp_num: peer.number,
            rq_psn: peer.psn,
            max_dest_rd_atomic: path.reads_answered,
            // 0.64 ms: how soon a peer tries again that found no receive.
            min_rnr_timer: 12,
            ah_attr: address,
            ..ibv_qp_attr::default()
        };
        let mask = ffi::QP_STATE
            | ffi::QP_AV
            | ffi::QP_PATH_MTU
            | ffi::QP_DEST_QPN
            | ffi::QP_RQ_PSN
            | ffi::QP_MAX_DEST_RD_ATOMIC
            | ffi::QP_MIN_RNR_TIMER;
        self.modify(&mut receive, mask)?;
        let mut send = ibv_qp_attr {
            qp_state: ffi::QPS_RTS,
            sq_psn: own_psn,
            timeout: path.timeout,
            retry_cnt: path.retries,
            rnr_retry: 6,
            max_rd_atomic: path.reads_asked,
            ..ibv_qp_attr::default()
        };
        let mask = ffi::QP_STATE
            | ffi::QP_TIMEOUT
            | ffi::QP_RETRY_CNT
            | ffi::QP_RNR_RETRY
            | ffi::QP_SQ_PSN
            | ffi::QP_MAX_QP_RD_ATOMIC;
        self.modify(&mut send, mask)
    }

    /// Keep the connection that the connection manager made of it.
    pub fn connected_by(&self, connection: CmId) {
        drop(self.connection.set(connection));
    }

    fn modify(&self, attr: &mut ibv_qp_attr, mask: i32) -> Result<()> {
        // SAFETY: the pair lives, the structure is the one the library expects.
        let errno = unsafe { (self.completions.device.library.ibv_modify_qp)(self.qp, attr, mask) };
        if errno == 0 { Ok(()) } else { Err(failed_with("the queue pair cannot be connected", errno)) }
    }

    /// Post requests, in order. After an error it is unknown which were posted: drop the pair.
    ///
    /// # Safety
    /// The pieces' memory must stay mapped and registered, and must not be written to (or, for reads, touched), until
    /// the request or a later one of this pair completes, or the pair is dropped.
    ///
    /// # Errors
    /// When the queue is full, a request has too many pieces or the pair is broken.
    pub unsafe fn post(&self, requests: &[WorkRequest<'_>]) -> Result<()> {
        for batch in requests.chunks(Self::POST_MAX) {
            let mut chain: Vec<ibv_send_wr> = batch.iter().map(to_c).collect();
            for i in 1..chain.len() {
                chain[i - 1].next = &raw mut chain[i];
            }
            let mut bad = null_mut();
            // SAFETY: the pair lives; the chain and its lists outlive the call; the caller keeps the memory.
            let errno = unsafe { ((*(*self.qp).context).ops.post_send)(self.qp, chain.as_mut_ptr(), &raw mut bad) };
            if errno != 0 {
                return Err(failed_with("work cannot be posted", errno));
            }
        }
        Ok(())
    }
}

fn to_c(request: &WorkRequest<'_>) -> ibv_send_wr {
    // SAFETY: plain numbers and pointers, for which zero is a value.
    let mut wr: ibv_send_wr = unsafe { std::mem::zeroed() };
    wr.wr_id = request.id;
    wr.sg_list = request.sges.as_ptr().cast_mut();
    wr.num_sge = request.sges.len() as i32;
    wr.send_flags = if request.signalled { ffi::SEND_SIGNALED } else { 0 };
    wr.send_flags |= if request.inline { ffi::SEND_INLINE } else { 0 };
    // A message is an event at its receiver, also when that waits for messages only.
    wr.send_flags |= if matches!(request.work, Work::Send) { ffi::SEND_SOLICITED } else { 0 };
    let (opcode, remote) = match request.work {
        Work::Send => (ffi::WR_SEND, None),
        Work::Write(remote) => (ffi::WR_RDMA_WRITE, Some(remote)),
        Work::Read(remote) => (ffi::WR_RDMA_READ, Some(remote)),
    };
    wr.opcode = opcode;
    if let Some(remote) = remote {
        (wr.remote_addr, wr.rkey) = (remote.address, remote.key);
    }
    wr
}

impl Drop for QueuePair {
    fn drop(&mut self) {
        // SAFETY: made in `new` and not destroyed before. `receives` outlives it.
        unsafe { (self.completions.device.library.ibv_destroy_qp)(self.qp) };
        let _ = &self.receives;
    }
}
