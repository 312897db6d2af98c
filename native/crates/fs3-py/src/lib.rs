//! fs3-py
