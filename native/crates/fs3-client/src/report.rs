//! Telling a replica that the bytes it sent do not match their checksums, so that it looks at its memory and disk.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use fs3_core::ChunkId;
use fs3_proto::v1::{CheckRequest, Method};
use fs3_rt::Instant;
use parking_lot::Mutex;

use crate::inner::Inner;
use crate::read::Source;

/// The same chunk of the same target is not reported again for this long.
const AGAIN_AFTER: Duration = Duration::from_secs(60);
/// Reports remembered at most. When there are more, none is sent until the oldest are forgotten.
const REPORTS_MAX: usize = 64;
/// How long a replica may take to look at one chunk.
const CHECK_TIMEOUT: Duration = Duration::from_secs(10);

/// What was reported lately: when, by target and chunk.
#[derive(Default)]
pub(crate) struct Reports(Mutex<BTreeMap<(u64, ChunkId), Instant>>);

impl Reports {
    /// Whether this is to be reported now.
    fn is_due(&self, target_id: u64, chunk: ChunkId, now: Instant) -> bool {
        let mut sent = self.0.lock();
        sent.retain(|_, at| now < *at + AGAIN_AFTER);
        if sent.len() >= REPORTS_MAX || sent.contains_key(&(target_id, chunk)) {
            return false;
        }
        sent.insert((target_id, chunk), now);
        true
    }
}

/// Report in the background; a failure is the business of the replica's own scrub.
pub(crate) fn mismatch(inner: &Arc<Inner>, source: &Source, chunk: ChunkId) {
    if !inner.reports.is_due(source.target_id, chunk, Instant::now()) {
        return;
    }
    tracing::warn!(target_id = source.target_id, %chunk, "the bytes of a replica do not match their checksums");
    let request = CheckRequest {
        chain_id: source.chain_id,
        target_id: source.target_id,
        chunk_id: Bytes::copy_from_slice(&chunk.to_bytes()),
    };
    let (shared, node_id) = (inner.clone(), source.node_id);
    inner.runtime.spawn(async move {
        let view = shared.view();
        let Some(address) = view.address(node_id) else { return };
        let until = Instant::now() + CHECK_TIMEOUT;
        if let Err(error) = shared.wire.call(address, Method::StorageCheck, request, until).await {
            tracing::debug!(%chunk, %error, "the report was not taken");
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reports_are_not_repeated_soon_and_bounded() {
        let (reports, now) = (Reports::default(), Instant::now());
        let chunk = |index| ChunkId { space: 0, inode: 7, index };
        assert!(reports.is_due(1, chunk(0), now) && !reports.is_due(1, chunk(0), now));
        assert!(reports.is_due(2, chunk(0), now));
        let sent = (1..1000).filter(|&index| reports.is_due(1, chunk(index), now)).count();
        assert_eq!(sent, REPORTS_MAX - 2);
        assert!(reports.is_due(1, chunk(0), now + AGAIN_AFTER));
    }
}
