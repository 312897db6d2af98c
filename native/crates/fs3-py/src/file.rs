//! Open files.

use std::sync::Arc;

use fs3_client::OpenFile;
use pyo3::prelude::*;

use crate::buffer::{readable, writable};
use crate::operation::Operation;
use crate::records::Attr;
use crate::runtime::Owned;

/// An open file. All methods may be called from any thread at once; offsets and lengths are bytes.
#[pyclass(frozen, module = "fs3._native")]
pub struct File {
    file: Owned<Arc<OpenFile>>,
}

impl File {
    pub fn new(file: Arc<OpenFile>) -> Self {
        Self { file: Owned::new(file) }
    }

    pub fn open_file(&self) -> PyResult<Arc<OpenFile>> {
        Ok(self.file.get()?.clone())
    }

    fn attr_operation<F>(&self, work: impl FnOnce(Arc<OpenFile>) -> F) -> PyResult<Operation>
    where
        F: Future<Output = fs3_core::Result<fs3_client::Attr>> + Send + 'static,
    {
        Ok(Operation::new(work(self.open_file()?), |py, attr| Py::new(py, Attr::from(attr))))
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
        Ok(Operation::with(async move { file.read(offset, region).await }, |py, (result, region)| {
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
        Ok(Operation::with(work, |py, (result, region)| {
            drop(region);
            result.map_err(|error| crate::errors::to_python(py, &error))
        }))
    }

    /// Write a contiguous buffer at the end of the file; its end. Appends never overlap, of whichever clients.
    fn append(&self, buffer: &Bound<'_, PyAny>) -> PyResult<Operation> {
        let (file, region) = (self.open_file()?, readable(buffer)?);
        let work = async move { (file.append(region.clone()).await, region) };
        Ok(Operation::with(work, |py, (result, region)| {
            drop(region);
            result.map_err(|error| crate::errors::to_python(py, &error))
        }))
    }

    /// Make acknowledged writes survive power loss of all nodes; publish length and mtime.
    fn sync(&self) -> PyResult<Operation> {
        self.attr_operation(|file| async move { file.sync().await })
    }

    /// Publish length and mtime to other clients.
    fn publish(&self) -> PyResult<Operation> {
        self.attr_operation(|file| async move { file.publish().await })
    }

    /// Make `length` bytes from `offset` on a hole.
    fn punch(&self, offset: u64, length: u64) -> PyResult<Operation> {
        let file = self.open_file()?;
        Ok(Operation::with(async move { file.punch(offset, length).await }, |py, result| {
            result.map_err(|error| crate::errors::to_python(py, &error))
        }))
    }

    /// Make it at least `length` bytes long without writing; it never becomes shorter.
    fn extend(&self, length: u64) -> PyResult<Operation> {
        let file = self.open_file()?;
        Ok(Operation::new(async move { file.extend(length).await }, |_, ()| Ok(())))
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
        Ok(Operation::new(work, |_, position| Ok(position)))
    }

    /// Cut or extend to `length`.
    fn truncate(&self, length: u64) -> PyResult<Operation> {
        self.attr_operation(move |file| async move { file.truncate(length).await })
    }

    /// Ask the service for the attributes.
    fn refresh(&self) -> PyResult<Operation> {
        self.attr_operation(|file| async move { file.refresh().await })
    }

    /// Publish length and mtime and end the session; again: nothing.
    fn close(&self) -> PyResult<Operation> {
        self.attr_operation(|file| async move { file.close().await })
    }
}
