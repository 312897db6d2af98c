//! What all handles of one inode share: data not yet written, its errors, the version that caches hold.
//!
//! Order of locks: `publishing`, then `state`, then `blocks`; the two plain locks are never held across an await.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use fs3_client::{Attr, Code, Error, Result};
use parking_lot::Mutex;

use crate::attrs::{SET_ID_BITS, Version, now_ns};
use crate::blocks::Blocks;
use crate::event::Event;
use crate::gather::{Gather, Piece};
use crate::io::{FileIo, Io};
use crate::told::{Teller, Told};

/// An inode with open handles.
pub(crate) struct Inode<F> {
    pub id: u64,
    state: Mutex<State<F>>,
    /// Held while a length is being published, so that a flush returns only after it.
    publishing: tokio::sync::Mutex<()>,
    pub blocks: Blocks,
    /// The mode had set-id bits when this mount last heard of it.
    set_id: AtomicBool,
}

struct State<F> {
    gather: Gather,
    /// Pieces that are being written.
    flights: Vec<Arc<Flight>>,
    /// Files open for writing; data goes through the last one.
    writers: Vec<Arc<F>>,
    /// Data was accepted whose length and time the service has not been told.
    unpublished: bool,
    /// When data was last accepted, in wall-clock nanoseconds; 0 when everything is published.
    written_ns: i64,
    dirty_since: Option<Instant>,
    /// The last failure of a background write and how many there were.
    error: Option<Error>,
    errors: u64,
    /// What the kernel's page cache and `blocks` hold; `None` when unknown.
    version: Option<Version>,
    unlinked: bool,
    /// Counts what makes bytes read before it stale: accepted writes and truncates.
    changes: u64,
}

/// A piece on its way.
struct Flight {
    start: u64,
    end: u64,
    landed: Event,
}

/// Where a write goes.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Place {
    /// To this position.
    At(u64),
    /// To the end of the file.
    End,
}

/// What became of a write.
pub(crate) enum Accepted {
    /// That many bytes from `offset` were taken; fewer than given when memory ran out.
    Taken { offset: u64, bytes: usize },
    /// No file is open for writing at the moment.
    NoWriter,
    /// Nothing: quotas have to allow that the file becomes so long first, see [`Inode::require_room`].
    Full,
}

impl<F: FileIo> Inode<F> {
    pub fn new(id: u64) -> Self {
        let state = State {
            gather: Gather::default(),
            flights: Vec::new(),
            writers: Vec::new(),
            unpublished: false,
            written_ns: 0,
            dirty_since: None,
            error: None,
            errors: 0,
            version: None,
            unlinked: false,
            changes: 0,
        };
        Self {
            id,
            state: Mutex::new(state),
            publishing: tokio::sync::Mutex::new(()),
            blocks: Blocks::default(),
            set_id: AtomicBool::new(false),
        }
    }

    /// The service told this mode.
    pub fn note_mode(&self, mode: u32) {
        self.set_id.store(mode & SET_ID_BITS != 0, Ordering::Relaxed);
    }

    /// Whether a write may have to take set-id bits away.
    pub fn has_set_id(&self) -> bool {
        self.set_id.load(Ordering::Relaxed)
    }

    pub fn add_writer(&self, file: Arc<F>) {
        self.state.lock().writers.push(file);
    }

    pub fn remove_writer(&self, file: &Arc<F>) {
        self.state.lock().writers.retain(|w| !Arc::ptr_eq(w, file));
    }

    /// Accept data for writing in the background. Never waits.
    pub fn write(self: &Arc<Self>, io: &Arc<Io<F>>, place: Place, data: &[u8]) -> Accepted {
        let mut state = self.state.lock();
        let Some(writer) = state.writers.last() else { return Accepted::NoWriter };
        let offset = state.position(writer, place);
        if offset.saturating_add(data.len() as u64) > writer.length_limit() {
            return Accepted::Full;
        }
        let mut out = Vec::new();
        let bytes = state.gather.write(offset, data, |n| io.write_pool.try_take(n, 0), &mut out);
        for piece in out {
            self.launch(&mut state, io, piece);
        }
        if bytes > 0 {
            state.unpublished = true;
            state.written_ns = now_ns();
            state.version = None;
            state.changes += 1;
            self.blocks.drop_range(offset, offset + bytes as u64);
            if state.dirty_since.is_none() {
                state.dirty_since = Some(Instant::now());
                drop(state);
                io.list_dirty(self);
            }
        }
        Accepted::Taken { offset, bytes }
    }

    /// Make sure that quotas allow a write of `bytes` bytes. Errors: QuotaExceeded.
    pub async fn require_room(&self, place: Place, bytes: usize) -> Result<()> {
        let (writer, end) = {
            let state = self.state.lock();
            let Some(writer) = state.writers.last().cloned() else { return Ok(()) };
            let end = state.position(&writer, place).saturating_add(bytes as u64);
            (writer, end)
        };
        writer.require_room(end).await
    }

    /// Start writing a piece, after the earlier ones that it overlaps.
    fn launch(self: &Arc<Self>, state: &mut State<F>, io: &Arc<Io<F>>, piece: Piece) {
        let (start, end) = (piece.offset(), piece.end());
        let earlier: Vec<_> = state.flights.iter().filter(|f| f.start < end && start < f.end).cloned().collect();
        let flight = Arc::new(Flight { start, end, landed: Event::new() });
        state.flights.push(flight.clone());
        let writer = state.writers.last().cloned();
        let inode = self.clone();
        io.runtime.spawn(async move {
            for flight in earlier {
                flight.landed.wait().await;
            }
            let result = match writer {
                Some(file) => file.write(start, piece.into_region()).await,
                None => Err(Error::new(Code::StaleHandle, "no file is open for writing")),
            };
            inode.land(&flight, result);
        });
    }

    fn land(&self, flight: &Arc<Flight>, result: Result<usize>) {
        let mut state = self.state.lock();
        state.flights.retain(|f| !Arc::ptr_eq(f, flight));
        // A publish may have gone out while the piece was on its way.
        state.unpublished = true;
        if let Err(error) = result {
            tracing::warn!(inode = self.id, start = flight.start, end = flight.end, %error, "a buffered write failed");
            state.fail(error);
        }
        drop(state);
        flight.landed.set();
    }

    /// Remember a failure that no caller was there to be told.
    pub fn fail(&self, error: Error) {
        self.state.lock().fail(error);
    }

    /// Send everything that is kept, without waiting.
    pub fn send_all(self: &Arc<Self>, io: &Arc<Io<F>>) {
        let mut state = self.state.lock();
        for piece in state.gather.take_all() {
            self.launch(&mut state, io, piece);
        }
    }

    /// Write everything accepted so far and wait for it. Failures are told by [`Inode::new_error`].
    pub async fn flush(self: &Arc<Self>, io: &Arc<Io<F>>) {
        self.send_all(io);
        let flights = self.state.lock().flights.clone();
        for flight in flights {
            flight.landed.wait().await;
        }
    }

    /// Wait until a read of `start..end` from storage sees every write accepted before it.
    pub async fn settle(self: &Arc<Self>, io: &Arc<Io<F>>, start: u64, end: u64) {
        let flights: Vec<_> = {
            let mut state = self.state.lock();
            if state.pending_end() == 0 {
                return;
            }
            // Beyond what storage knows of, the end of the file depends on writes anywhere behind.
            let beyond = state.writers.last().is_some_and(|w| end > w.length());
            if beyond || state.gather.overlaps(start, end) {
                for piece in state.gather.take_all() {
                    self.launch(&mut state, io, piece);
                }
            }
            state.flights.iter().filter(|f| beyond || (f.start < end && start < f.end)).cloned().collect()
        };
        for flight in flights {
            flight.landed.wait().await;
        }
    }

    /// The count of changes, if storage has every byte of `start..end` that was accepted.
    ///
    /// A block read between two calls that return the same number is not older than any write before them.
    pub fn settled(&self, start: u64, end: u64) -> Option<u64> {
        let state = self.state.lock();
        let pending = state.gather.overlaps(start, end) || state.flights.iter().any(|f| f.start < end && start < f.end);
        (!pending).then_some(state.changes)
    }

    /// Holes were made, or the file was made longer, through a file that is open here: what was read before is stale,
    /// and the service has to be told of it.
    pub fn reshaped(self: &Arc<Self>, io: &Arc<Io<F>>) {
        self.truncated();
        let mut state = self.state.lock();
        state.unpublished = true;
        state.written_ns = now_ns();
        if state.dirty_since.is_none() {
            state.dirty_since = Some(Instant::now());
            drop(state);
            io.list_dirty(self);
        }
    }

    /// The file was cut or extended: what was read before is stale.
    pub fn truncated(&self) {
        let mut state = self.state.lock();
        state.changes += 1;
        state.version = None;
        self.blocks.clear();
    }

    /// Withdraw `file`, if it is the only writer and everything accepted is written: from here on writes find
    /// no writer. Says whether it was withdrawn.
    pub fn park(&self, file: &Arc<F>) -> bool {
        let mut state = self.state.lock();
        let alone = state.writers.len() == 1 && Arc::ptr_eq(&state.writers[0], file);
        let park = alone && !state.unlinked && state.pending_end() == 0;
        if park {
            state.writers.clear();
        }
        park
    }

    /// The last handle is gone: nothing is left to do for this inode.
    pub fn abandon(&self) {
        self.state.lock().dirty_since = None;
        self.blocks.clear();
    }

    pub fn writer(&self) -> Option<Arc<F>> {
        self.state.lock().writers.last().cloned()
    }

    /// Give `use_bytes` the bytes `offset..offset+len` if they are all kept in one piece; says whether they were.
    pub fn read_kept(&self, offset: u64, len: usize, use_bytes: impl FnOnce(&[u8])) -> bool {
        let state = self.state.lock();
        let Some(bytes) = state.gather.read(offset, len) else { return false };
        use_bytes(bytes);
        true
    }

    /// Tell the service the length and time of what was written, if it does not know, through `file` or the
    /// last writer. With `close` the file is closed by the same call. Returns after the service answered.
    pub async fn publish(&self, file: Option<&Arc<F>>, close: bool) -> Result<Option<Attr>> {
        let _order = self.publishing.lock().await;
        let writer = {
            let mut state = self.state.lock();
            if !state.unpublished && !close {
                return Ok(None);
            }
            let Some(writer) = file.cloned().or_else(|| state.writers.last().cloned()) else { return Ok(None) };
            state.unpublished = false;
            writer
        };
        let result = if close { writer.close().await } else { writer.publish().await };
        let mut state = self.state.lock();
        if result.is_err() {
            state.unpublished = true;
        } else if !state.unpublished {
            state.written_ns = 0;
            if state.pending_end() == 0 {
                state.dirty_since = None;
            }
        }
        result.map(Some)
    }

    /// The failure of a background write that `teller` has not told through the handle of `told`, if any.
    pub fn new_error(&self, told: &Told, teller: Teller) -> Option<Error> {
        let state = self.state.lock();
        if told.tell(teller, state.errors) { state.error.clone() } else { None }
    }

    /// What a new handle has been told: earlier failures have nothing to do with it.
    pub fn told(&self) -> Told {
        Told::new(self.state.lock().errors)
    }

    /// Attributes of the service, with what this mount has accepted but not published put on top.
    pub fn merge(&self, attr: &mut Attr) {
        let state = self.state.lock();
        attr.length = attr.length.max(state.pending_end());
        if state.unpublished {
            attr.length = attr.length.max(state.writers.last().map_or(0, |w| w.length()));
            attr.mtime_ns = attr.mtime_ns.max(state.written_ns);
            attr.ctime_ns = attr.ctime_ns.max(state.written_ns);
        }
    }

    /// The file's length in bytes as this mount knows it, `file` being one of its open files.
    pub fn length(&self, file: &F) -> u64 {
        file.length().max(self.state.lock().pending_end())
    }

    pub fn keeps_data(&self) -> bool {
        !self.state.lock().gather.is_empty()
    }

    pub fn is_dirty(&self) -> bool {
        let state = self.state.lock();
        state.unpublished || state.pending_end() > 0
    }

    /// Since when there has been something to write or publish.
    pub fn dirty_since(&self) -> Option<Instant> {
        self.state.lock().dirty_since
    }

    /// Whether caches may be kept by an open that found `now`; remembers it as what they hold from here on.
    pub fn keep_cache(&self, now: Version) -> bool {
        let mut state = self.state.lock();
        if state.unpublished || state.pending_end() > 0 {
            // What the caches hold cannot be told from what others may have written.
            state.version = None;
            return false;
        }
        let keep = state.version == Some(now);
        state.version = Some(now);
        keep
    }

    pub fn version(&self) -> Option<Version> {
        self.state.lock().version
    }

    pub fn set_version(&self, version: Option<Version>) {
        self.state.lock().version = version;
    }

    /// It has no name any more: closing its last file would end it.
    pub fn set_unlinked(&self) {
        self.state.lock().unlinked = true;
    }
}

impl<F: FileIo> State<F> {
    /// First byte of a write.
    fn position(&self, writer: &F, place: Place) -> u64 {
        match place {
            Place::At(offset) => offset,
            Place::End => writer.length().max(self.pending_end()),
        }
    }
}

impl<F> State<F> {
    fn fail(&mut self, error: Error) {
        self.error = Some(error);
        self.errors += 1;
    }

    /// Position behind the last byte that is not written yet, 0 when all is.
    fn pending_end(&self) -> u64 {
        self.flights.iter().map(|f| f.end).max().unwrap_or(0).max(self.gather.end())
    }
}
