//! Open files.

use std::sync::Arc;

use fs3_client::OpenFile;
use fs3_client::trace::{Outcome, Shown};
use pyo3::prelude::*;

use crate::buffer::{readable, writable};
use crate::operation::Operation;
use crate::records::Attr;
use crate::runtime::Owned;
use crate::trace;

/// An open file. All methods may be called from any thread at once; offsets and lengths are bytes.
#[pyclass(frozen, module = "fs3._native")]
pub struct File {
    file: Owned<Arc<OpenFile>>,
    /// As it was opened, for traces.
    path: Arc<[u8]>,
}

impl File {
    pub fn new(file: Arc<OpenFile>, path: Arc<[u8]>) -> Self {
        Self { file: Owned::new(file), path }
    }

    pub fn open_file(&self) -> PyResult<Arc<OpenFile>> {
        Ok(self.file.get()?.clone())
    }

    /// The path that it was opened by.
    pub fn path(&self) -> Arc<[u8]> {
        self.path.clone()
    }

    fn shown(&self, name: &'static str, offset: Option<u64>) -> PyResult<Shown> {
        Ok(trace::on_file(name, self.file.get()?, &self.path, offset))
    }

    fn attr_operation<F>(&self, name: &'static str, work: impl FnOnce(Arc<OpenFile>) -> F) -> PyResult<Operation>
    where
        F: Future<Output = fs3_core::Result<fs3_client::Attr>> + Send + 'static,
    {
        let work = self.shown(name, None)?.run(work(self.open_file()?), Outcome::plain);
        Ok(Operation::new(work, |py, attr| Py::new(py, Attr::from(attr))))
    }
}

#[pymethods]
impl File {
    /// The inode.
    #[getter]
    fn inode(&self) -> PyResult<u64> {
        Ok(self.file.get()?.inode())
    }

    /// The length in bytes as this client knows it.
    #[getter]
    fn length(&self) -> PyResult<u64> {
        Ok(self.file.get()?.length())
    }

    /// Whether the open made the file.
    #[getter]
    fn created(&self) -> PyResult<bool> {
        Ok(self.file.get()?.created())
    }

    /// Whether it is open for writing.
    #[getter]
    fn writable(&self) -> PyResult<bool> {
        Ok(self.file.get()?.writable())
    }

    /// Attributes as last seen, merged with this client's acknowledged writes. No round trip.
    fn attr(&self) -> PyResult<Attr> {
        Ok(Attr::from(self.file.get()?.attr()))
    }

    /// Fill a writable contiguous buffer from `offset`; the count, short only at the end of the file. Bytes of the
    /// buffer beyond the count are undefined.
    fn pread_into(&self, buffer: &Bound<'_, PyAny>, offset: u64) -> PyResult<Operation> {
        let (file, region) = (self.open_file()?, writable(buffer)?);
        let work = async move { file.read(offset, region).await };
        let work = self.shown("read", Some(offset))?.run(work, |(result, _)| Outcome::counted(result));
        Ok(Operation::with(work, |py, (result, region)| {
            drop(region);
            result.map_err(|error| crate::errors::to_python(py, &error))
        }))
    }

    /// Write a contiguous buffer at `offset`; returns the count after every serving replica has all of it.
    fn pwrite(&self, buffer: &Bound<'_, PyAny>, offset: u64) -> PyResult<Operation> {
        let (file, region) = (self.open_file()?, readable(buffer)?);
        let work = async move {
            let result = file.write(offset, region.clone()).await;
            // The buffer goes back where the interpreter is at hand.
            (result, region)
        };
        let work = self.shown("write", Some(offset))?.run(work, |(result, _)| Outcome::counted(result));
        Ok(Operation::with(work, |py, (result, region)| {
            drop(region);
            result.map_err(|error| crate::errors::to_python(py, &error))
        }))
    }

    /// Write a contiguous buffer at the end of the file; its end. Appends never overlap, of whichever clients.
    fn append(&self, buffer: &Bound<'_, PyAny>) -> PyResult<Operation> {
        let (file, region) = (self.open_file()?, readable(buffer)?);
        let work = async move { (file.append(region.clone()).await, region) };
        let work = self.shown("append", None)?.run(work, |(end, region)| Outcome {
            bytes: end.is_ok().then_some(region.len() as u64),
            ..Outcome::plain(end)
        });
        Ok(Operation::with(work, |py, (result, region)| {
            drop(region);
            result.map_err(|error| crate::errors::to_python(py, &error))
        }))
    }

    /// Make acknowledged writes survive power loss of all nodes; publish length and mtime.
    fn sync(&self) -> PyResult<Operation> {
        self.attr_operation("sync", |file| async move { file.sync().await })
    }

    /// Publish length and mtime to other clients.
    fn publish(&self) -> PyResult<Operation> {
        self.attr_operation("publish", |file| async move { file.publish().await })
    }

    /// Make `length` bytes from `offset` on a hole.
    fn punch(&self, offset: u64, length: u64) -> PyResult<Operation> {
        let file = self.open_file()?;
        let work =
            self.shown("punch", Some(offset))?.run(async move { file.punch(offset, length).await }, Outcome::plain);
        Ok(Operation::with(work, |py, result| result.map_err(|error| crate::errors::to_python(py, &error))))
    }

    /// Make it at least `length` bytes long without writing; it never becomes shorter.
    fn extend(&self, length: u64) -> PyResult<Operation> {
        let file = self.open_file()?;
        let work = self.shown("extend", None)?.run(async move { file.extend(length).await }, Outcome::plain);
        Ok(Operation::new(work, |_, ()| Ok(())))
    }

    /// Reading it changes no access time from here on.
    fn keep_atime(&self) -> PyResult<()> {
        self.file.get()?.keep_atime();
        Ok(())
    }

    /// It was read, as far as access times go, though the bytes came from a cache of the caller.
    fn note_read(&self) -> PyResult<()> {
        self.file.get()?.note_read();
        Ok(())
    }

    /// The first byte at or after `offset` that is in a hole (`hole`) or is not; None when there is none in the file.
    fn seek_sparse(&self, offset: u64, hole: bool) -> PyResult<Operation> {
        let file = self.open_file()?;
        let work = async move { if hole { file.seek_hole(offset).await } else { file.seek_data(offset).await } };
        let work = self.shown("seek_sparse", Some(offset))?.run(work, Outcome::plain);
        Ok(Operation::new(work, |_, position| Ok(position)))
    }

    /// Cut or extend to `length`.
    fn truncate(&self, length: u64) -> PyResult<Operation> {
        self.attr_operation("truncate", move |file| async move { file.truncate(length).await })
    }

    /// Ask the service for the attributes.
    fn refresh(&self) -> PyResult<Operation> {
        self.attr_operation("stat", |file| async move { file.refresh().await })
    }

    /// Publish length and mtime and end the session; again: nothing.
    fn close(&self) -> PyResult<Operation> {
        self.attr_operation("close", |file| async move { file.close().await })
    }
}
