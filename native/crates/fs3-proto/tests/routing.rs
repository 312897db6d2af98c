//! Deltas of the routing against the vectors that Python is held to as well.

use fs3_proto::routing::{Misfit, apply, diff};
use fs3_proto::v1::{Routing, RoutingDelta};
use prost::Message;
use serde_json::Value;

fn message<M: Message + Default>(vector: &Value, name: &str) -> M {
    let hex = vector[name].as_str().expect("a message in hexadecimal");
    let byte = |at: usize| u8::from_str_radix(&hex[at..at + 2], 16).expect("hexadecimal digits");
    let bytes: Vec<u8> = (0..hex.len()).step_by(2).map(byte).collect();
    M::decode(bytes.as_slice()).expect("a message")
}

fn vectors() -> Vec<(Routing, Routing, RoutingDelta)> {
    let vectors: Vec<Value> =
        serde_json::from_str(include_str!("../../../../tests/golden/routing.json")).expect("golden vectors");
    assert!(!vectors.is_empty());
    vectors.iter().map(|v| (message(v, "old"), message(v, "new"), message(v, "delta"))).collect()
}

#[test]
fn golden_deltas_are_made_and_applied() {
    for (old, new, delta) in vectors() {
        assert_eq!(diff(&old, &new), delta);
        assert_eq!(apply(&old, delta), Ok(new));
    }
}

#[test]
fn a_delta_to_anything_else_is_refused() {
    for (old, new, delta) in vectors() {
        let refused = |spoil: &dyn Fn(&mut RoutingDelta)| {
            let mut spoilt = delta.clone();
            spoil(&mut spoilt);
            assert_eq!(apply(&old, spoilt), Err(Misfit));
        };
        refused(&|d| d.from_version += 1);
        refused(&|d| d.changed = None);
        refused(&|d| d.changed.as_mut().expect("is there").history += 1);
        refused(&|d| d.changed.as_mut().expect("is there").version = old.version);
        refused(&|d| d.counts.as_mut().expect("is there").chain_versions ^= 1);
        refused(&|d| d.counts = None);
        assert_eq!(apply(&new, delta.clone()), Err(Misfit));
    }
}
