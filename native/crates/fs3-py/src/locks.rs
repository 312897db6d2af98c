//! Locks of files between clients, for a mount that is served by Python.

use fs3_client::{FileLock, KeptAlive};
use parking_lot::Mutex;
use pyo3::prelude::*;

use crate::operation::Operation;
use crate::records::Attr;
use crate::runtime::Owned;

/// A lock: numbers of `fs3.v1.LockKind` and `LockType`, owner, first and last byte, process.
#[derive(FromPyObject)]
pub struct Lock(i32, i32, u64, u64, u64, u32);

impl From<Lock> for FileLock {
    fn from(lock: Lock) -> Self {
        let Lock(kind, r#type, owner, start, end, pid) = lock;
        Self { kind, r#type, owner, start, end, pid }
    }
}

fn tuple(lock: &FileLock) -> (i32, i32, u64, u64, u64, u32) {
    (lock.kind, lock.r#type, lock.owner, lock.start, lock.end, lock.pid)
}

/// The locks that a client has, made by `Client.locks`. Thread-safe.
#[pyclass(frozen, module = "fs3._native")]
pub struct Locks {
    client: Owned<fs3_client::Client>,
    kept: Owned<Mutex<Option<KeptAlive>>>,
}

impl Locks {
    pub fn new(client: fs3_client::Client) -> Self {
        Self { client: Owned::new(client), kept: Owned::new(Mutex::new(None)) }
    }

    fn native(&self) -> PyResult<fs3_client::Client> {
        Ok(self.client.get()?.clone())
    }
}

#[pymethods]
impl Locks {
    /// Have the services keep what the client has, or let go: without it locks end after the session time.
    fn keep(&self, on: bool) -> PyResult<()> {
        let client = self.native()?;
        let mut kept = self.kept.get()?.lock();
        if on != kept.is_some() {
            *kept = on.then(|| client.keep_alive());
        }
        Ok(())
    }

    /// Changes when the locks may have been given to others, because no service has heard of the client for too long.
    #[getter]
    fn era(&self) -> PyResult<u64> {
        Ok(self.client.get()?.lock_era())
    }

    /// Set or change a lock: attributes of the file and the era of the lock; None when another one is in the way. With
    /// `wait` it then has a place in the queue for half a minute: call this again after `wait`.
    fn set(&self, inode: u64, lock: Lock, wait: bool) -> PyResult<Operation> {
        let client = self.native()?;
        let work = async move { client.lock(inode, lock.into(), wait).await };
        Ok(Operation::new(work, |py, granted| {
            granted.map(|granted| Ok::<_, PyErr>((Py::new(py, Attr::from(granted.attr))?, granted.era))).transpose()
        }))
    }

    /// End the locks that the owner of `lock` has in its range.
    fn unlock(&self, inode: u64, lock: Lock) -> PyResult<Operation> {
        let client = self.native()?;
        Ok(Operation::new(async move { client.unlock(inode, lock.into()).await }, |_, ()| Ok(())))
    }

    /// Give up the place in the queue for a lock.
    fn leave(&self, inode: u64, lock: Lock) -> PyResult<Operation> {
        let client = self.native()?;
        Ok(Operation::new(async move { client.leave_lock_queue(inode, lock.into()).await }, |_, ()| Ok(())))
    }

    /// Wait, for some seconds, until a lock that is queued for may be granted; whether it may. Takes nothing.
    fn wait(&self, inode: u64, lock: Lock) -> PyResult<Operation> {
        let client = self.native()?;
        Ok(Operation::new(async move { client.await_lock(inode, lock.into()).await }, |_, free| Ok(free)))
    }

    /// The first lock in the way of `lock`, and whether it is this client's; None without one.
    fn get(&self, inode: u64, lock: Lock) -> PyResult<Operation> {
        let client = self.native()?;
        let work = async move { client.get_lock(inode, lock.into()).await };
        Ok(Operation::new(work, |_, found| Ok(found.map(|(lock, own)| (tuple(&lock), own)))))
    }
}
