//! `fs3-fsx FILE`: see [`fs3_fsx::USAGE`].

use std::process::ExitCode;
use std::time::{SystemTime, UNIX_EPOCH};

use fs3_fsx::{Options, USAGE, run};

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments.iter().any(|word| word == "--help" || word == "-h") {
        println!("{USAGE}");
        return ExitCode::SUCCESS;
    }
    let seed = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs());
    match Options::parse(&arguments, seed) {
        Ok(options) if run(&options) => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(message) => {
            eprintln!("fs3-fsx: {message}\n\n{USAGE}");
            ExitCode::from(2)
        }
    }
}
