//! Compiles the shared schemas in `proto/` with a pure-Rust protobuf compiler.
use std::path::PathBuf;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let root = PathBuf::from(std::env::var("CARGO_MANIFEST_DIR")?).join("../../../proto");
    let names = ["frame", "routing", "mgmtd", "meta", "storage"];
    let files: Vec<_> = names.iter().map(|n| root.join(format!("fs3/v1/{n}.proto"))).collect();
    println!("cargo:rerun-if-changed={}", root.display());
    let set = protox::compile(&files, [&root])?;
    prost_build::Config::new().bytes(["."]).compile_fds(set)?;
    Ok(())
}
