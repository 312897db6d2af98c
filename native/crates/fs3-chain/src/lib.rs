//! fs3-chain
