//! The layout vectors that the Python side holds to as well.

use fs3_proto::v1::{ChainTable, Layout, Routing};
use serde_json::Value;

use crate::plan::pieces;
use crate::routing::RoutingView;

fn number(value: &Value) -> u64 {
    value.as_u64().expect("a number")
}

#[test]
fn chunks_and_chains_are_those_of_the_golden_vectors() {
    let vectors: Vec<Value> =
        serde_json::from_str(include_str!("../../../../tests/golden/layout.json")).expect("golden vectors");
    assert!(!vectors.is_empty());
    for vector in &vectors {
        let chain_ids = vector["table"].as_array().expect("a table").iter().map(|id| number(id) as u32).collect();
        let tables = vec![ChainTable { table_id: 1, table_version: 1, chain_ids, replicas: 3 }];
        let view = RoutingView::new(Routing { tables, ..Default::default() });
        let layout = Layout {
            table_id: 1,
            table_version: 1,
            chunk_bytes: number(&vector["chunk_bytes"]) as u32,
            stripe: number(&vector["stripe"]) as u32,
            first: number(&vector["first"]) as u32,
            stripe_first: number(&vector["stripe_first"]) as u32,
            stripe_max: number(&vector["stripe_max"]) as u32,
        };
        for pair in vector["chain_of"].as_array().expect("pairs") {
            assert_eq!(view.chain_of(&layout, number(&pair[0])).map(u64::from), Some(number(&pair[1])), "{vector}");
        }
        for range in vector["pieces"].as_array().expect("ranges") {
            let (offset, length) = (number(&range["offset"]), number(&range["length"]) as usize);
            let found: Vec<[u64; 4]> = pieces(7, layout.chunk_bytes, offset, length)
                .expect("a range within the limits")
                .map(|p| [p.chunk.index.into(), p.offset.into(), p.len.into(), offset + p.at as u64])
                .collect();
            let expected: Vec<[u64; 4]> = range["pieces"]
                .as_array()
                .expect("pieces")
                .iter()
                .map(|piece| std::array::from_fn(|i| number(&piece[i])))
                .collect();
            assert_eq!(found, expected, "{offset}+{length} of {vector}");
        }
    }
}
