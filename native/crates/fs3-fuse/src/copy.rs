//! `copy_file_range(2)`: bytes go from storage to storage through this process, not through the application.

use std::sync::Arc;

use fs3_client::{Error, Result};
use tokio::task::JoinSet;

use crate::buffers::LARGE;
use crate::caller::Who;
use crate::core::{Core, Handle};
use crate::inode::Place;
use crate::told::Teller;

/// Bytes that one request copies: the kernel cannot give it up, and asks again for the rest.
const COPY_BYTES_MAX: u64 = 64 << 20;
/// Pieces under way at a time.
const PIECES_MAX: usize = 8;

/// A range to copy.
#[derive(Clone, Copy)]
pub(crate) struct Range {
    pub from: u64,
    pub to: u64,
    pub bytes: u64,
}

impl Core {
    /// Copy a range of one file into another, or to another place of the same one; holes stay holes. Returns how many
    /// bytes were copied: fewer than asked for at the end of the file, or when there is much to do.
    pub async fn copy(self: &Arc<Self>, who: &Who, from: &Arc<Handle>, to: &Arc<Handle>, range: Range) -> Result<u64> {
        if let Some(error) = to.inode.new_error(&to.told, Teller::Write) {
            return Err(error);
        }
        if !who.is_root() && to.inode.has_set_id() {
            self.drop_set_id(to.inode.id).await?;
        }
        from.inode.flush(&self.io).await;
        let length = from.inode.length(&*self.file(from).await?);
        let end = range.from.saturating_add(range.bytes).min(length);
        let (mut position, mut moved) = (range.from, 0);
        while position < end && moved < COPY_BYTES_MAX {
            let data = self.with_file(from, |file| async move { file.seek_data(position).await }).await?;
            let data = data.unwrap_or(end).min(end);
            if data > position {
                self.copy_hole(to, range.to + (position - range.from), data - position).await?;
                position = data;
                continue;
            }
            let hole = self.with_file(from, |file| async move { file.seek_hole(position).await }).await?;
            let bytes = (hole.unwrap_or(end).min(end) - position).min(COPY_BYTES_MAX - moved);
            let piece = Range { from: position, to: range.to + (position - range.from), bytes };
            self.copy_data(from, to, piece).await?;
            position += bytes;
            moved += bytes;
        }
        Ok(position - range.from)
    }

    /// Make a hole, as long as it is; the file ends behind it at least.
    async fn copy_hole(&self, to: &Arc<Handle>, offset: u64, bytes: u64) -> Result<()> {
        to.inode.flush(&self.io).await;
        let made = self.with_file(to, |file| async move {
            file.punch(offset, bytes).await?;
            file.extend(offset.saturating_add(bytes)).await
        });
        let made = made.await;
        to.inode.reshaped(&self.io);
        made
    }

    async fn copy_data(self: &Arc<Self>, from: &Arc<Handle>, to: &Arc<Handle>, range: Range) -> Result<()> {
        let mut pieces = JoinSet::new();
        for done in (0..range.bytes).step_by(LARGE) {
            if pieces.len() >= PIECES_MAX {
                pieces.join_next().await.unwrap_or(Ok(Ok(()))).map_err(broke_off)??;
            }
            let (core, from, to) = (self.clone(), from.clone(), to.clone());
            let bytes = (range.bytes - done).min(LARGE as u64) as usize;
            pieces.spawn(async move { core.copy_piece(&from, &to, range.from + done, range.to + done, bytes).await });
        }
        while let Some(ended) = pieces.join_next().await {
            ended.map_err(broke_off)??;
        }
        Ok(())
    }

    async fn copy_piece(
        &self,
        from: &Arc<Handle>,
        to: &Arc<Handle>,
        source: u64,
        target: u64,
        bytes: usize,
    ) -> Result<()> {
        let read = self.with_file(from, |file| async move { self.read_exact(&file, source, bytes).await }).await?;
        self.finish_write(to, Place::At(target), &read).await
    }
}

fn broke_off(error: impl std::fmt::Display) -> Error {
    Error::new(fs3_client::Code::Internal, format!("a piece of a copy failed: {error}")).maybe_applied()
}
