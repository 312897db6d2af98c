//! Connections of iWARP ports. The connection manager makes them; a key that the hello carries tells them apart.

use super::unavailable;
use fs3_core::{Code, Error, Result};
use fs3_verbs::cm::{CmId, Event, Listener};
use parking_lot::Mutex;
use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Weak};
use std::time::Duration;
use tokio::sync::oneshot;

/// How long the connection manager may take to connect two ends.
pub(super) const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// How often the thread of a listener looks whether it is still needed.
const ATTENTION: Duration = Duration::from_millis(500);

type Key = [u8; 16];

/// Takes the connections of one port. Its thread ends when it is dropped.
pub(super) struct Acceptor {
    listener: Listener,
    expected: Mutex<HashMap<Key, Expected>>,
}

struct Expected {
    /// Of the queue pair.
    number: u32,
    reads: u8,
    established: oneshot::Sender<CmId>,
}

/// A connection that a client has been told to make.
pub(super) struct Expectation {
    acceptor: Arc<Acceptor>,
    pub key: Key,
    established: Option<oneshot::Receiver<CmId>>,
}

impl Acceptor {
    /// Listen at an address of an iWARP port.
    pub fn start(ip: IpAddr) -> Result<Arc<Self>> {
        let listener = Listener::bind(ip).map_err(unavailable)?;
        let acceptor = Arc::new(Self { listener, expected: Mutex::default() });
        let weak = Arc::downgrade(&acceptor);
        let thread = std::thread::Builder::new().name("fs3-rdma-cm".into());
        let started = thread.spawn(move || accept(&weak));
        started.map_err(|e| Error::new(Code::Unavailable, format!("no thread can be started: {e}")))?;
        Ok(acceptor)
    }

    /// Where clients connect to.
    pub fn port(&self) -> u16 {
        self.listener.port()
    }

    /// Accept one connection for a queue pair; the client has to bring the key.
    pub fn expect(self: &Arc<Self>, number: u32, reads: u8) -> Expectation {
        let mut key = Key::default();
        // SAFETY: fills the array; so few bytes are always had at once.
        let filled = unsafe { libc::getrandom(key.as_mut_ptr().cast(), key.len(), 0) };
        assert_eq!(filled, key.len() as isize, "the system gives random numbers");
        let (established, receiver) = oneshot::channel();
        self.expected.lock().insert(key, Expected { number, reads, established });
        Expectation { acceptor: self.clone(), key, established: Some(receiver) }
    }
}

impl Expectation {
    /// Where the client connects to.
    pub fn port(&self) -> u16 {
        self.acceptor.port()
    }

    /// Wait for the connection.
    pub async fn established(mut self) -> Result<CmId> {
        let receiver = self.established.take().expect("asked once");
        let failed = |why: &str| Error::new(Code::Unavailable, format!("the client's iWARP connection {why}"));
        match tokio::time::timeout(CONNECT_TIMEOUT, receiver).await {
            Ok(Ok(id)) => Ok(id),
            Ok(Err(_)) => Err(failed("was not established")),
            Err(_) => Err(failed("did not come")),
        }
    }
}

impl Drop for Expectation {
    fn drop(&mut self) {
        self.acceptor.expected.lock().remove(&self.key);
    }
}

/// The thread of an acceptor.
fn accept(acceptor: &Weak<Acceptor>) {
    let mut accepted: HashMap<usize, (CmId, oneshot::Sender<CmId>)> = HashMap::new();
    while let Some(acceptor) = acceptor.upgrade() {
        match acceptor.listener.next(ATTENTION) {
            Ok(None) => {}
            Ok(Some(Event::Request { id, data })) => {
                let expected = Key::try_from(data.get(..16).unwrap_or_default()).ok();
                let expected = expected.and_then(|key| acceptor.expected.lock().remove(&key));
                let Some(expected) = expected else {
                    tracing::debug!("an iWARP connection that nobody expects is refused");
                    id.reject();
                    continue;
                };
                match id.accept(expected.number, expected.reads) {
                    Ok(()) => drop(accepted.insert(id.key(), (id, expected.established))),
                    Err(error) => tracing::warn!("{error}"),
                }
            }
            Ok(Some(Event::Established(key))) => {
                if let Some((id, established)) = accepted.remove(&key) {
                    // Nobody waits any more: dropping the id ends the connection.
                    drop(established.send(id));
                }
            }
            Ok(Some(Event::Ended(key))) => drop(accepted.remove(&key)),
            Err(error) => {
                tracing::error!("no iWARP connections are taken any more: {error}");
                return;
            }
        }
    }
}
