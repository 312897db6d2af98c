//! Orders from a test: one JSON object per line in, one out.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixListener;

use serde::Deserialize;
use serde_json::{Value, json};

use crate::faults::Faults;
use crate::tree::Tree;

/// Longest order in bytes.
const ORDER_BYTES_MAX: u64 = 64 << 10;

#[derive(Deserialize)]
#[serde(tag = "do", rename_all = "snake_case", deny_unknown_fields)]
enum Order {
    /// Put these faults in force, and no others.
    Set { faults: Faults },
    /// Let blocks rot.
    Rot { count: u64, seed: u64, only: String },
    /// Undo rot.
    HealRot,
    /// Count what happened.
    Counts,
    /// Cut the power.
    Cut { seed: u64 },
}

fn obey(tree: &Tree, line: &str) -> Result<Value, String> {
    let order: Order = serde_json::from_str(line).map_err(|e| e.to_string())?;
    match order {
        Order::Set { faults } => tree.set_faults(faults),
        Order::Rot { count, seed, only } => {
            let rotten = tree.rot(count, seed, &only).map_err(|e| e.to_string())?;
            return Ok(json!({ "rotten": rotten }));
        }
        Order::HealRot => tree.heal_rot(),
        Order::Counts => return serde_json::to_value(tree.counts()).map_err(|e| e.to_string()),
        Order::Cut { seed } => {
            let losses = tree.cut(seed).map_err(|e| e.to_string())?;
            return serde_json::to_value(losses).map_err(|e| e.to_string());
        }
    }
    Ok(json!({}))
}

/// Obey orders on `listener`, one connection after the other, for ever.
pub fn serve(tree: &Tree, listener: &UnixListener) {
    for stream in listener.incoming().flatten() {
        let Ok(mut writer) = stream.try_clone() else { continue };
        let mut line = String::new();
        if BufReader::new(stream.take(ORDER_BYTES_MAX)).read_line(&mut line).is_err() {
            continue;
        }
        let answer = obey(tree, &line).unwrap_or_else(|message| json!({ "error": message }));
        let _ = writeln!(writer, "{answer}");
    }
}
