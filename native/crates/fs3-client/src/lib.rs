//! fs3-client
