//! Requests of processes that are being killed.
//!
//! The kernel keeps a killed process until its request is answered, which may take as long as an operation may. So a
//! request that changes nothing is given up as soon as its process is being killed. Other signals do not count: a
//! program does not expect `stat` to be interrupted.

use std::collections::HashMap;
use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::runtime::Handle;
use tokio::sync::oneshot;

/// How often a process that got a signal is looked at until its request is answered: the kernel tells of the first signal only.
const LOOK_AGAIN: Duration = Duration::from_millis(50);
/// How long after the kernel's word the request itself may arrive.
const ARRIVAL_MAX: Duration = Duration::from_secs(1);
/// Bit of SIGKILL in the sets of `/proc/PID/status`; the kernel sets it for every signal that ends a process at once.
const KILLED: u64 = 1 << (libc::SIGKILL - 1);

/// Who waits for a request: its number, and the thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Asker {
    unique: u64,
    pid: u32,
}

impl Asker {
    pub fn of(request: &fuser::Request) -> Self {
        Self { unique: request.unique().0, pid: request.pid() }
    }
}

struct Waiting {
    pid: u32,
    kill: oneshot::Sender<()>,
}

/// Requests under way that may be given up. Thread-safe.
#[derive(Default)]
pub(crate) struct Kills {
    waiting: Mutex<HashMap<u64, Waiting>>,
}

struct Entry {
    kills: Arc<Kills>,
    unique: u64,
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.kills.waiting.lock().remove(&self.unique);
    }
}

impl Kills {
    /// Run `operation`, which is dropped in the middle if its asker is being killed.
    pub fn run(self: &Arc<Self>, runtime: &Handle, asker: Asker, operation: impl Future<Output = ()> + Send + 'static) {
        let Asker { unique, pid } = asker;
        let entry = Entry { kills: self.clone(), unique };
        let (kill, killed) = oneshot::channel();
        self.waiting.lock().insert(unique, Waiting { pid, kill });
        fs3_rt::Handle::from(runtime.clone()).begin(async move {
            let _entry = entry;
            tokio::select! {
                biased;
                () = operation => {}
                Ok(()) = killed => {}
            }
        });
    }

    fn look(&self, unique: u64) -> Look {
        let mut waiting = self.waiting.lock();
        match waiting.get(&unique) {
            None => Look::Unknown,
            Some(request) if is_killed(request.pid) => match waiting.remove(&unique) {
                Some(request) => Look::Killed(request.kill),
                None => Look::Unknown,
            },
            Some(_) => Look::Waiting,
        }
    }

    /// The kernel says that the process of a request got a signal.
    pub fn interrupted(self: &Arc<Self>, runtime: &Handle, unique: u64) {
        let kills = self.clone();
        runtime.spawn(async move {
            let (begun, mut seen) = (Instant::now(), false);
            loop {
                match kills.look(unique) {
                    Look::Killed(kill) => {
                        let _ = kill.send(());
                        return;
                    }
                    Look::Waiting => seen = true,
                    Look::Unknown if seen || begun.elapsed() >= ARRIVAL_MAX => return,
                    Look::Unknown => {}
                }
                tokio::time::sleep(LOOK_AGAIN).await;
            }
        });
    }
}

/// What a look at a request finds.
enum Look {
    Unknown,
    Waiting,
    /// Its process is being killed; what gives it up.
    Killed(oneshot::Sender<()>),
}

fn is_killed(pid: u32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/status")).is_ok_and(|status| has_kill(&status))
}

fn has_kill(status: &str) -> bool {
    let sets = status.lines().filter_map(|l| l.strip_prefix("SigPnd:").or_else(|| l.strip_prefix("ShdPnd:")));
    sets.filter_map(|set| u64::from_str_radix(set.trim(), 16).ok()).any(|set| set & KILLED != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_kill_counts() {
        assert!(has_kill("Name:\tcat\nSigPnd:\t0000000000000100\nShdPnd:\t0000000000000000\n"));
        assert!(has_kill("SigPnd:\t0000000000000000\nShdPnd:\t0000000000004100\n"));
        assert!(!has_kill("SigPnd:\t0000000000004000\nShdPnd:\t0000000000000002\nSigBlk:\t0000000000000100\n"));
        assert!(!has_kill(""));
    }

    #[tokio::test]
    async fn a_request_ends_by_itself_when_its_process_got_another_signal() {
        let (kills, runtime) = (Arc::new(Kills::default()), Handle::current());
        let (send, receive) = oneshot::channel::<()>();
        let (done, ended) = oneshot::channel::<()>();
        kills.run(&runtime, Asker { unique: 7, pid: std::process::id() }, async move {
            receive.await.unwrap();
            done.send(()).unwrap();
        });
        kills.interrupted(&runtime, 7);
        tokio::time::sleep(LOOK_AGAIN * 3).await;
        assert!(kills.waiting.lock().contains_key(&7));
        send.send(()).unwrap();
        ended.await.unwrap();
        while kills.waiting.lock().contains_key(&7) {
            tokio::task::yield_now().await;
        }
    }
}
