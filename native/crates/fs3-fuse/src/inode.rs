//! What all handles of one inode share: data not yet written, its errors, the version that caches hold.
//!
//! Order of locks: `publishing`, then `state`, then `blocks`; the two plain locks are never held across an await.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use fs3_client::{Attr, Code, ContentVersion, Error, Region, Result};
use parking_lot::Mutex;

use crate::appends::{Appends, Batch};
use crate::attrs::{SET_ID_BITS, now_ns};
use crate::blocks::Blocks;
use crate::buffers::LARGE;
use crate::event::Event;
use crate::gather::Gather;
use crate::io::{FileIo, Io};
use crate::told::{Teller, Told};

/// Pieces up to this size leave from the thread that wants them written; checksums of larger ones would keep it busy.
const SMALL_PIECE_BYTES: usize = 64 << 10;

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
    appends: Appends,
    placing: Option<Placing>,
    /// Count bytes that were appended, and of these what needs no place any more: it has one, or failed.
    appended: u64,
    placed: u64,
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
    /// What the kernel's page cache and `blocks` hold, but for this mount's writes that the service was not told of; `None`
    /// when unknown.
    version: Option<ContentVersion>,
    unlinked: bool,
    /// Counts what makes bytes read before it stale: accepted writes and truncates.
    changes: u64,
}

/// A piece on its way.
struct Flight {
    start: u64,
    end: u64,
    /// To a place that was reserved for it.
    appended: bool,
    landed: Event,
}

/// Lands its piece when it is dropped, so that whoever waits for it goes on whatever became of the task.
struct Flying<F: FileIo> {
    inode: Arc<Inode<F>>,
    flight: Arc<Flight>,
    result: Option<Result<usize>>,
}

impl<F: FileIo> Drop for Flying<F> {
    fn drop(&mut self) {
        let broke_off = || Err(Error::new(Code::Internal, "a buffered write broke off"));
        self.inode.land(&self.flight, self.result.take().unwrap_or_else(broke_off));
    }
}

/// Places its batch when it is dropped, for the same reason.
struct Asking<F: FileIo> {
    inode: Arc<Inode<F>>,
    io: Arc<Io<F>>,
    batch: Option<Batch>,
    place: Option<Result<u64>>,
    answered: Arc<Event>,
}

impl<F: FileIo> Drop for Asking<F> {
    fn drop(&mut self) {
        let broke_off = || Err(Error::new(Code::Internal, "a buffered append broke off"));
        if let Some(batch) = self.batch.take() {
            self.inode.place_batch(&self.io, batch, self.place.take().unwrap_or_else(broke_off));
        }
        self.answered.set();
    }
}

/// The question to the service where appends go. One at a time, so that they keep their order.
struct Placing {
    /// What is kept when it is answered needs a place, too.
    again: bool,
    answered: Arc<Event>,
}

/// Where a write goes.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Place {
    /// To this position.
    At(u64),
    /// To the end of the file, wherever that is when it is written back.
    End {
        /// Where the kernel takes it to be.
        believed: u64,
    },
}

impl Place {
    /// Where what follows `bytes` bytes goes.
    pub fn behind(self, bytes: usize) -> Self {
        let bytes = bytes as u64;
        match self {
            Self::At(offset) => Self::At(offset + bytes),
            Self::End { believed } => Self::End { believed: believed + bytes },
        }
    }

    /// Memory that a write may need besides one large buffer before any of it is taken, in bytes.
    pub fn memory_besides(self) -> usize {
        match self {
            Self::At(_) => 0,
            Self::End { .. } => LARGE,
        }
    }
}

/// What became of a write.
pub(crate) enum Accepted {
    /// That many bytes were taken; fewer than given, of an append none, when memory ran out.
    Taken(usize),
    /// No file is open for writing at the moment.
    NoWriter,
    /// Nothing: quotas have to allow that the file becomes so long first, see [`Inode::require_room`].
    Full,
    /// Nothing: appends have to get their place first, see [`Inode::place`].
    Unplaced,
}

impl<F: FileIo> Inode<F> {
    pub fn new(id: u64) -> Self {
        let state = State {
            gather: Gather::default(),
            appends: Appends::default(),
            placing: None,
            appended: 0,
            placed: 0,
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
        let bytes = match place {
            Place::At(_) if state.unplaced() > 0 => return Accepted::Unplaced,
            Place::At(_) => self.gather(&mut state, io, offset, data),
            Place::End { believed } => self.append(&mut state, io, offset, believed, data),
        };
        if bytes > 0 {
            state.unpublished = true;
            state.written_ns = now_ns();
            state.changes += 1;
            if state.dirty_since.is_none() {
                state.dirty_since = Some(Instant::now());
                drop(state);
                io.list_dirty(self);
            }
        }
        Accepted::Taken(bytes)
    }

    fn gather(self: &Arc<Self>, state: &mut State<F>, io: &Arc<Io<F>>, offset: u64, data: &[u8]) -> usize {
        let mut out = Vec::new();
        let bytes = state.gather.write(offset, data, |n| io.write_pool.try_take(n, 0), &mut out);
        for piece in out {
            self.launch(state, io, piece.offset(), piece.into_region(), false);
        }
        self.blocks.drop_range(offset, offset + bytes as u64);
        bytes
    }

    fn append(
        self: &Arc<Self>,
        state: &mut State<F>,
        io: &Arc<Io<F>>,
        likely: u64,
        believed: u64,
        data: &[u8],
    ) -> usize {
        if !state.appends.push(likely, believed, data, |n| io.write_pool.try_take(n, 0)) {
            return 0;
        }
        state.appended += data.len() as u64;
        if state.appends.is_full() && state.placing.is_none() {
            self.place_kept(state, io);
        }
        data.len()
    }

    /// Ask where the appends that are kept go, behind what was written before them; later if it is being asked already.
    fn place_kept(self: &Arc<Self>, state: &mut State<F>, io: &Arc<Io<F>>) {
        if let Some(placing) = &mut state.placing {
            placing.again = true;
            return;
        }
        if state.appends.is_empty() {
            return;
        }
        self.send_gathered(state, io);
        let earlier: Vec<_> = state.flights.iter().filter(|f| !f.appended).cloned().collect();
        let batch = state.appends.take();
        let bytes = batch.bytes;
        let answered = Arc::new(Event::new());
        state.placing = Some(Placing { again: false, answered: answered.clone() });
        let asking = Asking { inode: self.clone(), io: io.clone(), batch: Some(batch), place: None, answered };
        io.runtime.spawn(async move {
            // All of it, not its fields.
            let mut asking = asking;
            for flight in earlier {
                flight.landed.wait().await;
            }
            asking.place = Some(match asking.inode.writer() {
                Some(file) => file.reserve(bytes).await,
                None => Err(Error::new(Code::StaleHandle, "no file is open for writing")),
            });
        });
    }

    /// Write appends to where they belong.
    fn place_batch(self: &Arc<Self>, io: &Arc<Io<F>>, batch: Batch, place: Result<u64>) {
        let mut state = self.state.lock();
        let again = state.placing.take().is_some_and(|placing| placing.again);
        state.placed += batch.bytes;
        if place.as_ref().ok() != batch.believed.as_ref() {
            // Pages of other handles may be cut off, or end, where the kernel believes the appended bytes to be. It forgets them
            // some time later: who opens the file before that must not keep them.
            state.version = None;
            io.forget_pages(self.id);
        }
        match place {
            Ok(mut offset) => {
                state.changes += 1;
                self.blocks.drop_range(offset, offset + batch.bytes);
                for region in batch.regions {
                    let bytes = region.len() as u64;
                    self.launch(&mut state, io, offset, region, true);
                    offset += bytes;
                }
            }
            Err(error) => {
                tracing::warn!(inode = self.id, bytes = batch.bytes, %error, "appended data found no place");
                state.fail(error);
            }
        }
        if again || state.appends.is_full() {
            self.place_kept(&mut state, io);
        }
    }

    /// Return once everything that was appended before is on its way to its place, or failed.
    pub async fn place(self: &Arc<Self>, io: &Arc<Io<F>>) {
        let appended = self.state.lock().appended;
        loop {
            let answered = {
                let mut state = self.state.lock();
                if state.placed >= appended {
                    return;
                }
                self.place_kept(&mut state, io);
                state.placing.as_ref().expect("something has no place").answered.clone()
            };
            answered.wait().await;
        }
    }

    /// Make sure that quotas allow a write of `bytes` bytes. Errors: QuotaExceeded.
    ///
    /// What was accepted before is written first: only then does the service count it, also against other writers.
    pub async fn require_room(self: &Arc<Self>, io: &Arc<Io<F>>, place: Place, bytes: usize) -> Result<()> {
        self.flush(io).await;
        let (writer, end) = {
            let state = self.state.lock();
            let Some(writer) = state.writers.last().cloned() else { return Ok(()) };
            let end = state.position(&writer, place).saturating_add(bytes as u64);
            (writer, end)
        };
        writer.require_room(end).await
    }

    /// Start writing a piece, after the earlier ones that it overlaps.
    fn launch(self: &Arc<Self>, state: &mut State<F>, io: &Arc<Io<F>>, start: u64, data: Region, appended: bool) {
        let end = start + data.len() as u64;
        let earlier: Vec<_> = state.flights.iter().filter(|f| f.start < end && start < f.end).cloned().collect();
        let flight = Arc::new(Flight { start, end, appended, landed: Event::new() });
        state.flights.push(flight.clone());
        let writer = state.writers.last().cloned();
        let inode = self.clone();
        let is_small = data.len() <= SMALL_PIECE_BYTES;
        let flying = Flying { inode, flight, result: None };
        let flying = async move {
            // All of it, not its fields.
            let mut flying = flying;
            for flight in earlier {
                flight.landed.wait().await;
            }
            flying.result = Some(match writer {
                Some(file) => file.write(start, data).await,
                None => Err(Error::new(Code::StaleHandle, "no file is open for writing")),
            });
        };
        match is_small {
            true => fs3_rt::begin_behind(&io.runtime, flying),
            false => drop(io.runtime.spawn(flying)),
        }
    }

    fn land(&self, flight: &Arc<Flight>, result: Result<usize>) {
        let mut state = self.state.lock();
        state.flights.retain(|f| !Arc::ptr_eq(f, flight));
        // A publish may have gone out while the piece was on its way.
        state.unpublished = true;
        let failure = result.err();
        failure.iter().for_each(|error| state.fail(error.clone()));
        drop(state);
        flight.landed.set();
        if let Some(error) = failure {
            tracing::warn!(inode = self.id, start = flight.start, end = flight.end, %error, "a buffered write failed");
        }
    }

    /// Remember a failure that no caller was there to be told.
    pub fn fail(&self, error: Error) {
        self.state.lock().fail(error);
    }

    /// Send everything that is kept, without waiting.
    pub fn send_all(self: &Arc<Self>, io: &Arc<Io<F>>) {
        let mut state = self.state.lock();
        self.place_kept(&mut state, io);
        self.send_gathered(&mut state, io);
    }

    fn send_gathered(self: &Arc<Self>, state: &mut State<F>, io: &Arc<Io<F>>) {
        for piece in state.gather.take_all() {
            self.launch(state, io, piece.offset(), piece.into_region(), false);
        }
    }

    /// Write everything accepted so far and wait for it. Failures are told by [`Inode::new_error`].
    pub async fn flush(self: &Arc<Self>, io: &Arc<Io<F>>) {
        self.place(io).await;
        let flights = {
            let mut state = self.state.lock();
            self.send_gathered(&mut state, io);
            state.flights.clone()
        };
        for flight in flights {
            flight.landed.wait().await;
        }
    }

    /// Wait until a read of `start..end` from storage sees every write accepted before it.
    pub async fn settle(self: &Arc<Self>, io: &Arc<Io<F>>, start: u64, end: u64) {
        if self.may_reach_unplaced(end) {
            self.place(io).await;
        }
        let flights: Vec<_> = {
            let mut state = self.state.lock();
            if state.pending_end() == 0 {
                return;
            }
            // Beyond what storage knows of, the end of the file depends on writes anywhere behind.
            let beyond = state.writers.last().is_some_and(|w| end > w.length());
            if beyond || state.gather.overlaps(start, end) {
                self.send_gathered(&mut state, io);
            }
            state.flights.iter().filter(|f| beyond || (f.start < end && start < f.end)).cloned().collect()
        };
        for flight in flights {
            flight.landed.wait().await;
        }
    }

    /// Whether appends without a place may come to lie before `end`: they go behind all that storage knows of.
    fn may_reach_unplaced(&self, end: u64) -> bool {
        let state = self.state.lock();
        state.unplaced() > 0 && state.writers.last().is_none_or(|w| end > w.length())
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
        self.written_through(io, 0, 0);
    }

    /// `start..end` was written, or may have been in part, through a file that is open here, without being kept: what was
    /// read before is stale, and the service has to be told.
    pub fn written_through(self: &Arc<Self>, io: &Arc<Io<F>>, start: u64, end: u64) {
        let mut state = self.state.lock();
        state.changes += 1;
        state.version = None;
        self.blocks.drop_range(start, end);
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
        let park = alone && !state.unlinked && !state.is_pending();
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
        let steps = writer.take_steps();
        let mut state = self.state.lock();
        state.follow(&steps);
        if result.is_err() {
            state.unpublished = true;
        } else if !state.unpublished {
            state.written_ns = 0;
            if !state.is_pending() {
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

    /// A failure that a handle was not told of by any call.
    pub fn untold_error(&self, told: &Told) -> Option<Error> {
        let state = self.state.lock();
        if told.is_behind(state.errors) { state.error.clone() } else { None }
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
        attr.length += state.unplaced();
    }

    /// The file's length in bytes as this mount knows it, `file` being one of its open files; without what was appended and
    /// has no place yet.
    pub fn length(&self, file: &F) -> u64 {
        file.length().max(self.state.lock().pending_end())
    }

    pub fn keeps_data(&self) -> bool {
        let state = self.state.lock();
        !state.gather.is_empty() || !state.appends.is_empty()
    }

    /// Whether something that was appended has no place yet.
    pub fn keeps_appends(&self) -> bool {
        self.state.lock().unplaced() > 0
    }

    pub fn is_dirty(&self) -> bool {
        let state = self.state.lock();
        state.unpublished || state.is_pending()
    }

    /// Since when there has been something to write or publish.
    pub fn dirty_since(&self) -> Option<Instant> {
        self.state.lock().dirty_since
    }

    /// Whether caches may be kept by an open that found `now`; remembers it as what they hold from here on.
    pub fn keep_cache(&self, now: ContentVersion) -> bool {
        let mut state = self.state.lock();
        if state.unpublished || state.is_pending() {
            // What the caches hold cannot be told from what others may have written.
            state.version = None;
            return false;
        }
        let keep = state.version == Some(now);
        state.version = Some(now);
        keep
    }

    pub fn version(&self) -> Option<ContentVersion> {
        self.state.lock().version
    }

    pub fn set_version(&self, version: Option<ContentVersion>) {
        self.state.lock().version = version;
    }

    /// It has no name any more: closing its last file would end it.
    pub fn set_unlinked(&self) {
        self.state.lock().unlinked = true;
    }
}

impl<F: FileIo> State<F> {
    /// First byte of a write; of an append where it is if nobody else appends.
    fn position(&self, writer: &F, place: Place) -> u64 {
        match place {
            Place::At(offset) => offset,
            Place::End { .. } => writer.length().max(self.pending_end()) + self.unplaced(),
        }
    }
}

impl<F> State<F> {
    fn fail(&mut self, error: Error) {
        self.error = Some(error);
        self.errors += 1;
        // The kernel may have bytes that storage has not.
        self.version = None;
    }

    /// Reports changed the version of the content, nobody else did in between: caches hold it.
    fn follow(&mut self, steps: &[(ContentVersion, ContentVersion)]) {
        for (before, after) in steps {
            if self.version == Some(*before) {
                self.version = Some(*after);
            }
        }
    }

    /// Bytes that were appended and have no place yet.
    fn unplaced(&self) -> u64 {
        self.appended - self.placed
    }

    /// Whether something is not written yet.
    fn is_pending(&self) -> bool {
        self.unplaced() > 0 || self.pending_end() > 0
    }

    /// Position behind the last byte that has a place and is not written yet, 0 when all is.
    fn pending_end(&self) -> u64 {
        self.flights.iter().map(|f| f.end).max().unwrap_or(0).max(self.gather.end())
    }
}
