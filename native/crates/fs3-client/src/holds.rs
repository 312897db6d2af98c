//! Tells the service which inodes are open for reading, so that they stay when another client removes their last name.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use fs3_core::Result;
use fs3_proto::v1::{HoldRequest, HoldResponse, Method};
use fs3_rt::Instant;

use crate::inner::Inner;
use crate::open_inodes::{Batch, HOLDS_MAX};

/// What becomes due within this time goes into one request.
const GATHER: Duration = Duration::from_millis(500);

/// Begins the task that tells the service with the first open for reading: clients that only write have none.
#[derive(Default)]
pub(crate) struct HoldTask(AtomicBool);

impl HoldTask {
    pub fn need(&self, inner: &Arc<Inner>) {
        if !self.0.load(Ordering::Relaxed) && !self.0.swap(true, Ordering::Relaxed) {
            inner.runtime.spawn(keep_holds(inner.clone()));
        }
    }
}

/// Keep the service informed until the client is closed.
async fn keep_holds(inner: Arc<Inner>) {
    let mut holding = false;
    while !inner.closed.load(Ordering::Relaxed) {
        let now = Instant::now();
        let Some(due) = inner.inodes.next_due(now) else {
            inner.inodes.to_tell.notified().await;
            continue;
        };
        fs3_rt::sleep(due.saturating_duration_since(now).max(GATHER)).await;
        while tell_batch(&inner, &mut holding).await {}
        if holding && !inner.inodes.has_holds() {
            holding = false;
            inner.session_closed();
        }
    }
}

/// Send one request, if there is something to tell; true when there may be more. `holding`: keepalives are sent for holds.
async fn tell_batch(inner: &Inner, holding: &mut bool) -> bool {
    let batch = inner.inodes.take_batch(Instant::now());
    if batch.len() == 0 {
        return false;
    }
    if !std::mem::replace(holding, true) {
        inner.session_opened();
    }
    match tell(inner, &batch).await {
        Ok(gone) => inner.inodes.told(&batch, &gone),
        Err(error) if error.retryable() => {
            tracing::debug!(%error, inodes = batch.len(), "could not tell which files are open");
            inner.inodes.not_told(batch, Instant::now());
            return false;
        }
        Err(error) => {
            tracing::warn!(%error, "the service holds no files that are open for reading");
            inner.inodes.told(&batch, &batch.begin);
        }
    }
    batch.len() == HOLDS_MAX
}

/// The inodes that the service does not hold because they are gone.
async fn tell(inner: &Inner, batch: &Batch) -> Result<Vec<u64>> {
    let request = HoldRequest { op: inner.op_id(), begin: batch.begin.clone(), end: batch.end.clone() };
    let response: HoldResponse = inner.meta(Method::MetaHold, &request).await?;
    Ok(response.gone)
}

/// End all holds. What fails is left to the service, which ends those of clients that are gone.
pub(crate) async fn end_all(inner: &Inner) {
    for batch in inner.inodes.take_holds() {
        if let Err(error) = tell(inner, &batch).await {
            tracing::debug!(%error, "could not end holds");
            return;
        }
    }
}
