//! fs3-fuse
