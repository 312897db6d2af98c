//! fs3-io
