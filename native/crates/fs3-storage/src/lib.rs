//! fs3-storage
