//! `fs3-faultdisk BACKING MOUNTPOINT SOCKET SEED`: serve the files of BACKING on MOUNTPOINT until killed, with faults
//! as ordered through the Unix socket SOCKET. Orders are JSON lines: `{"do": "set", "faults": {"write_eio": 0.1}}`,
//! `{"do": "cut", "seed": 7}`, `{"do": "rot", "count": 3, "seed": 7, "only": "data"}`, `{"do": "heal_rot"}`,
//! `{"do": "counts"}`.

use std::error::Error;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use fs3_faultdisk::{Tree, mount, serve};

fn run() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().collect();
    let [_, backing, mountpoint, socket, seed] = &arguments[..] else {
        return Err("usage: fs3-faultdisk BACKING MOUNTPOINT SOCKET SEED".into());
    };
    let tree = Arc::new(Tree::new(Path::new(backing), seed.parse()?)?);
    mount(tree.clone(), Path::new(mountpoint))?;
    let _ = std::fs::remove_file(socket);
    // Whoever can connect sees a mount that is in place.
    serve(&tree, &UnixListener::bind(socket)?);
    Ok(())
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("fs3-faultdisk: {e}");
            ExitCode::FAILURE
        }
    }
}
