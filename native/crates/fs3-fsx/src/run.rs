//! Does operations on the file and on the model, compares, reports.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use crate::draw::fill;
use crate::file::Side;
use crate::mapping::PAGE;
use crate::model::Model;
use crate::operation::{Kind, NAMES, Operation, Reopen};
use crate::options::{Options, added};
use crate::plan::{Bounds, Plan};
use crate::shrink::shrink;

/// Operations shown after a failure.
const TAIL: usize = 20;
/// Operations after which a line says that it goes on.
const PROGRESS: u64 = 50_000;

/// For the signal handler: the seed and the operation under way.
static SEED: AtomicU64 = AtomicU64::new(0);
static NUMBER: AtomicU64 = AtomicU64::new(0);

/// Kinds that need a file to oneself. The last two, because they have Linux drop clean pages of the file: pages that another
/// process is writing (FUSE: they are clean) may then be read from below before its write gets there, and stay old.
const ALONE: [Kind; 5] = [Kind::Append, Kind::Truncate, Kind::Seek, Kind::Reopen, Kind::Forget];

/// One file, through one mount or two, and its model.
pub(crate) struct Trial {
    sides: Vec<Side>,
    active: usize,
    model: Model,
    /// With others: the length of the whole file, which nobody changes.
    fixed: Option<u64>,
    pub done: Vec<Operation>,
}

impl Trial {
    /// Make the file and open it. `part`: position and length of the part to use of a file of `fixed` bytes that exists.
    pub fn new(path: &Path, second: Option<&Path>, part: Option<(u64, u64, u64)>) -> io::Result<Self> {
        let mut sides = vec![Side::new(path)];
        sides.extend(second.map(Side::new));
        let (model, fixed) = match part {
            Some((base, len, whole)) => (Model { base, bytes: vec![0; len as usize] }, Some(whole)),
            None => (Model::default(), None),
        };
        if fixed.is_none() {
            sides[0].make(0)?;
        }
        match fixed {
            Some(whole) => sides[0].open(Reopen::DIRECT | Reopen::MAP, whole)?,
            None => sides[0].open(0, 0)?,
        }
        Ok(Self { sides, active: 0, model, fixed, done: Vec::new() })
    }

    /// Bytes of the whole file.
    fn length(&self) -> u64 {
        self.fixed.unwrap_or(self.model.end())
    }

    /// Position behind the last byte that this process uses.
    pub fn end(&self) -> u64 {
        self.model.end()
    }

    /// Do one operation and compare. The error says what differs.
    pub fn step(&mut self, operation: Operation) -> Result<(), String> {
        NUMBER.store(self.done.len() as u64, Ordering::Relaxed);
        self.done.push(operation);
        self.apply(operation).map_err(|e| e.to_string())?;
        let length = self.sides[self.active].length().map_err(|e| e.to_string())?;
        if length != self.length() {
            return Err(format!("fstat says {length} bytes, the file is {}", self.length()));
        }
        Ok(())
    }

    fn compare(&self, what: &str, at: u64, found: &[u8], wanted: &[u8]) -> io::Result<()> {
        self.model.compare(what, at, found, wanted, &self.done).map_err(io::Error::other)
    }

    fn apply(&mut self, o: Operation) -> io::Result<()> {
        let len = o.len as usize;
        match o.kind {
            Kind::Read => {
                let found = self.sides[self.active].read(o.at, len)?;
                self.compare("pread", o.at, &found, self.model.slice(o.at, o.len))
            }
            Kind::DirectRead => {
                let found = self.sides[self.active].direct_read(o.at, len)?;
                self.compare("pread with O_DIRECT", o.at, &found, self.model.slice(o.at, o.len))
            }
            Kind::MapRead => self.map_read(o.at, o.len),
            Kind::Write | Kind::DirectWrite | Kind::Append | Kind::MapWrite | Kind::MapSync => self.write(o),
            Kind::Truncate | Kind::Allocate | Kind::Punch | Kind::Zero | Kind::Copy => self.reshape(o),
            Kind::Seek => self.seek(o.at),
            Kind::Sync if o.arg == 2 => self.sides[self.active].sync_mapping(self.length()),
            Kind::Sync => self.sides[self.active].sync(o.arg == 1),
            Kind::Forget => self.sides[self.active].forget(),
            Kind::Reopen => self.reopen(o.arg),
            Kind::Switch => self.switch(o.arg),
            Kind::Whole => self.whole(),
        }
    }

    /// Behind the end of the file its last page reads as zeros.
    fn map_read(&self, at: u64, len: u64) -> io::Result<()> {
        let pages_end = if self.fixed.is_some() { self.model.end() } else { self.model.end().div_ceil(PAGE) * PAGE };
        let end = (at + len).min(pages_end);
        if at >= end {
            return Ok(());
        }
        let len = (end - at) as usize;
        let found = self.sides[self.active].mapped(at, end, |mapping| Ok(mapping.read(at, len)))?;
        let mut wanted = self.model.slice(at, end - at).to_vec();
        wanted.resize(len, 0);
        self.compare("read of a mapping", at, &found, &wanted)
    }

    fn write(&mut self, o: Operation) -> io::Result<()> {
        let side = &self.sides[self.active];
        let mapped = matches!(o.kind, Kind::MapWrite | Kind::MapSync);
        let at = if o.kind == Kind::Append { self.model.end() } else { o.at };
        // A mapping does not make the file longer.
        let end = if mapped { (at + o.len).min(self.model.end()) } else { at + o.len };
        if at >= end {
            return Ok(());
        }
        let data = fill(o.arg, at, (end - at) as usize);
        match o.kind {
            Kind::Append => side.append(&data)?,
            Kind::DirectWrite => side.direct_write(at, &data)?,
            Kind::Write => side.write(at, &data)?,
            _ => side.mapped(at, end, |mapping| {
                mapping.write(at, &data);
                if o.kind == Kind::MapSync { mapping.sync(at, end) } else { Ok(()) }
            })?,
        }
        self.model.write(at, &data);
        Ok(())
    }

    fn reshape(&mut self, o: Operation) -> io::Result<()> {
        let side = &self.sides[self.active];
        let keep = libc::FALLOC_FL_KEEP_SIZE;
        match o.kind {
            Kind::Truncate => {
                side.truncate(o.at, o.arg == 1)?;
                self.model.resize(o.at);
            }
            Kind::Punch => {
                side.fallocate(libc::FALLOC_FL_PUNCH_HOLE | keep, o.at, o.len)?;
                self.model.zero(o.at, o.len);
            }
            Kind::Copy => {
                let source = self.model.slice(o.at, o.len).to_vec();
                let copied = side.copy(o.at, o.arg, o.len, source.len() as u64)?;
                if copied != source.len() as u64 {
                    return Err(io::Error::other(format!("{copied} bytes were copied instead of {}", source.len())));
                }
                if copied > 0 {
                    self.model.write(o.arg, &source);
                }
            }
            _ => {
                let mode = if o.kind == Kind::Zero { libc::FALLOC_FL_ZERO_RANGE } else { 0 };
                side.fallocate(mode | if o.arg == 1 { keep } else { 0 }, o.at, o.len)?;
                if o.kind == Kind::Zero {
                    self.model.zero(o.at, o.len);
                }
                if o.arg == 0 && o.at + o.len > self.model.end() {
                    self.model.resize(o.at + o.len);
                }
            }
        }
        Ok(())
    }

    /// What is said to be a hole has to be zeros. The contrary is allowed.
    fn seek(&self, at: u64) -> io::Result<()> {
        let side = &self.sides[self.active];
        side.sync(false)?;
        let end = self.model.end();
        let data = side.seek(at, libc::SEEK_DATA)?;
        let hole = side.seek(at, libc::SEEK_HOLE)?;
        let wrong = |what: &str| Err(io::Error::other(format!("{what}: data at {data:?}, hole at {hole:?} from {at}")));
        if at >= end {
            return if data.is_none() && hole.is_none() { Ok(()) } else { wrong("SEEK behind the end is not ENXIO") };
        }
        if data.is_some_and(|d| d < at || d >= end) || hole.is_none_or(|h| h < at || h > end) {
            return wrong("SEEK leads out of the file");
        }
        if self.model.slice(at, data.unwrap_or(end) - at).iter().any(|byte| *byte != 0) {
            return wrong("SEEK_DATA passes over data");
        }
        let Some(hole) = hole.filter(|h| *h < end) else { return Ok(()) };
        let until = side.seek(hole, libc::SEEK_DATA)?.unwrap_or(end);
        if self.model.slice(hole, until.saturating_sub(hole)).iter().any(|byte| *byte != 0) {
            return wrong("SEEK_HOLE tells a hole where data is");
        }
        Ok(())
    }

    fn reopen(&mut self, how: u64) -> io::Result<()> {
        let (length, side) = (self.length(), &mut self.sides[self.active]);
        if how & Reopen::SYNC != 0 {
            side.sync(false)?;
        }
        side.open(how, length)
    }

    /// Close-to-open: what was closed, or synced, is what another mount sees that opens now.
    fn switch(&mut self, how: u64) -> io::Result<()> {
        let length = self.length();
        if self.sides.len() == 1 {
            return self.reopen(how);
        }
        let side = &mut self.sides[self.active];
        if how & Reopen::SYNC != 0 {
            side.sync(false)?;
            side.rest();
        } else {
            side.close()?;
        }
        self.active ^= 1;
        self.sides[self.active].open(how, length)?;
        self.whole()
    }

    /// Compare everything.
    pub fn whole(&self) -> io::Result<()> {
        let (base, len) = (self.model.base, self.model.bytes.len());
        // With others there is more behind.
        let beyond = if self.fixed.is_some() { 0 } else { 1 };
        let found = self.sides[self.active].read(base, len + beyond)?;
        self.compare("pread of everything", base, &found, &self.model.bytes)
    }

    /// Close, open, compare everything, and through the other mount, too.
    pub fn finish(&mut self) -> Result<(), String> {
        for how in [Reopen::SYNC, 0] {
            self.switch(how).and_then(|()| self.whole()).map_err(|e| format!("at the end: {e}"))?;
        }
        self.sides.iter_mut().try_for_each(|side| side.close()).map_err(|e| format!("at the end: {e}"))
    }
}

/// Do what `options` ask for, print what came out; true if all agreed.
pub fn run(options: &Options) -> bool {
    if options.jobs > 1 && options.job.is_none() {
        return run_jobs(options);
    }
    watch_signals(options.seed);
    let began = Instant::now();
    let name = options.job.map_or_else(String::new, |job| format!(" (job {job})"));
    match one(options) {
        Ok(done) => {
            let rate = done.len() as f64 / began.elapsed().as_secs_f64();
            println!("seed {}{name}: {} operations agree, {rate:.0}/s: {}", options.seed, done.len(), counts(&done));
            true
        }
        Err((done, error)) => {
            report(options, &done, &error);
            false
        }
    }
}

type Failed = (Vec<Operation>, String);

fn one(options: &Options) -> Result<Vec<Operation>, Failed> {
    let early = |e: String| (Vec::new(), e);
    let replay = options.replay.as_deref().map(read_log).transpose().map_err(early)?;
    let (path, second) = (own_path(options, &options.path), options.second.as_deref().map(|p| own_path(options, p)));
    let part = options.shared.then(|| part(options));
    let mut trial =
        Trial::new(&path, second.as_deref(), part).map_err(|e| early(format!("{}: {e}", path.display())))?;
    let mut plan = Plan::new(options.seed, bounds(options, part));
    let ops = replay.as_ref().map_or(options.ops, |log| log.len() as u64);
    for number in 0..ops {
        let operation = match &replay {
            Some(log) => log[number as usize],
            None => plan.next(number + 1, trial.end()),
        };
        if number > 0 && number % PROGRESS == 0 {
            println!("seed {}: {number} operations", options.seed);
        }
        if let Err(error) = trial.step(operation) {
            return Err((trial.done, error));
        }
    }
    match trial.finish() {
        Ok(()) => {
            // What is left is for whoever looks into a failure.
            if !options.shared {
                let _ = fs::remove_file(&path);
            }
            Ok(trial.done)
        }
        Err(error) => Err((trial.done, error)),
    }
}

fn own_path(options: &Options, path: &Path) -> PathBuf {
    match options.job {
        Some(job) if !options.shared => added(path, &job.to_string()),
        _ => path.to_path_buf(),
    }
}

/// Position and length of this process's part, and the length of the file. The borders are not those of pages.
fn part(options: &Options) -> (u64, u64, u64) {
    let len = options.length / PAGE * PAGE + 1000;
    (options.job.unwrap_or(0) * len, len, options.jobs * len)
}

fn bounds(options: &Options, part: Option<(u64, u64, u64)>) -> Bounds {
    let (start, len) = part.map_or((0, options.length / PAGE * PAGE), |(start, len, _)| (start, len));
    let mut without = options.without.clone();
    if options.shared {
        without.extend(ALONE);
    }
    if options.second.is_none() {
        without.push(Kind::Switch);
    }
    Bounds { without, start, end: start + len, oplen: options.oplen.min(len), shared: options.shared }
}

fn read_log(path: &Path) -> Result<Vec<Operation>, String> {
    let text = fs::read_to_string(path).map_err(|e| format!("{}: {e}", path.display()))?;
    text.lines().filter(|line| !line.starts_with('#') && !line.is_empty()).map(str::parse).collect()
}

fn counts(done: &[Operation]) -> String {
    let count = |kind| done.iter().filter(|o| o.kind == kind).count();
    let parts: Vec<_> = NAMES.iter().map(|(kind, name)| format!("{name} {}", count(*kind))).collect();
    parts.join(", ")
}

/// Print and keep what failed, and a shorter sequence if one is asked for and found.
fn report(options: &Options, done: &[Operation], error: &str) {
    let number = done.len().saturating_sub(1);
    println!("FAILED: seed {}, operation {number}: {error}", options.seed);
    for (number, operation) in done.iter().enumerate().skip(done.len().saturating_sub(TAIL)) {
        println!("  {number:7}  {operation}");
    }
    let default = || std::env::temp_dir().join(format!("fsx-{}.log", options.seed));
    let log = options.log.clone().unwrap_or_else(default);
    keep(&log, options, done);
    if options.shrink && !options.shared && !done.is_empty() {
        match shrink(options, done) {
            Some(short) => {
                println!("a shorter sequence that fails, {} operations:", short.len());
                short.iter().for_each(|operation| println!("  {operation}"));
                keep(&added(&log, "short"), options, &short);
            }
            None => println!("no shorter sequence fails by itself: it depends on time"),
        }
    }
}

fn keep(log: &Path, options: &Options, operations: &[Operation]) {
    let mut text = format!("# seed {}\n", options.seed);
    operations.iter().for_each(|operation| text.push_str(&format!("{operation}\n")));
    match fs::write(log, text) {
        Ok(()) => println!("kept in {0}; again: fs3-fsx FILE --replay {0}", log.display()),
        Err(e) => println!("{}: {e}", log.display()),
    }
}

/// Start this program once for each job and wait; the first failure ends all.
fn run_jobs(options: &Options) -> bool {
    if options.shared {
        let (_, _, whole) = part(options);
        if let Err(e) = Side::new(&options.path).make(whole) {
            println!("FAILED: {}: {e}", options.path.display());
            return false;
        }
    }
    let mut children: Vec<Child> = Vec::new();
    let mut failed = false;
    for job in 0..options.jobs {
        match start_job(options, job) {
            Ok(child) => children.push(child),
            Err(e) => {
                println!("FAILED: job {job}: {e}");
                failed = true;
            }
        }
    }
    for child in &mut children {
        if failed {
            let _ = child.kill();
        }
        failed |= !child.wait().is_ok_and(|status| status.success());
    }
    if options.shared && !failed {
        let _ = fs::remove_file(&options.path);
    }
    !failed
}

fn start_job(options: &Options, job: u64) -> io::Result<Child> {
    let mut command = Command::new(std::env::current_exe()?);
    // What is given later holds.
    command.args(std::env::args_os().skip(1));
    command.args(["--seed".to_string(), (options.seed + job).to_string(), "--job".into(), job.to_string()]);
    if let Some(log) = &options.log {
        command.arg("--log").arg(added(log, &job.to_string()));
    }
    command.spawn()
}

/// A page of a mapping that cannot be read or written is SIGBUS: say where before ending.
fn watch_signals(seed: u64) {
    SEED.store(seed, Ordering::Relaxed);
    let handler: extern "C" fn(libc::c_int) = on_sigbus;
    // SAFETY: the handler only writes to standard output and ends the process, which signal handlers may do.
    unsafe { libc::signal(libc::SIGBUS, handler as libc::sighandler_t) };
}

extern "C" fn on_sigbus(_: libc::c_int) {
    let mut line = *b"FAILED: SIGBUS: seed ...................., operation ....................\n";
    put(&mut line[21..41], SEED.load(Ordering::Relaxed));
    put(&mut line[53..73], NUMBER.load(Ordering::Relaxed));
    // SAFETY: system calls that signal handlers may use.
    unsafe {
        libc::write(1, line.as_ptr().cast(), line.len());
        libc::_exit(1);
    }
}

/// Decimal digits, without memory of the heap.
fn put(field: &mut [u8], mut number: u64) {
    for digit in field.iter_mut().rev() {
        *digit = b'0' + (number % 10) as u8;
        number /= 10;
    }
}
