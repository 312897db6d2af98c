//! fs3-net
