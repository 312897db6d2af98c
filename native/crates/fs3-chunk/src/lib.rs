//! fs3-chunk
