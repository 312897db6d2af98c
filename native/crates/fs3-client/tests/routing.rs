//! A client follows the routing, whatever way it is told.
mod common;

use std::time::Duration;

use common::{FakeCluster, NODES};
use fs3_client::Client;

/// Wait until the client has the cluster's routing, the same in everything.
async fn follows(cluster: &FakeCluster, client: &Client) {
    let follows = async {
        while client.routing() != *cluster.state.routing.borrow() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), follows).await.expect("the client follows");
}

#[tokio::test]
async fn who_knows_a_routing_is_told_what_changed() {
    let cluster = FakeCluster::start().await;
    let client = cluster.client().await;
    follows(&cluster, &client).await;
    cluster.drop_from_chains(NODES[1]);
    follows(&cluster, &client).await;
    cluster.state.routing.send_modify(|routing| {
        routing.version += 1;
        routing.nodes.pop();
    });
    follows(&cluster, &client).await;
    assert_eq!(cluster.state.log.lock().routings, [false, true, true]);
}

#[tokio::test]
async fn a_delta_to_another_routing_is_refused_and_the_whole_asked_for() {
    let cluster = FakeCluster::start().await;
    let client = cluster.client().await;
    follows(&cluster, &client).await;
    let before = client.routing_version();
    cluster.faults(|faults| faults.misfits = 1);
    cluster.drop_from_chains(NODES[1]);
    follows(&cluster, &client).await;
    assert!(client.routing_version() > before);
    assert_eq!(cluster.state.log.lock().routings, [false, true, false]);
    cluster.drop_from_chains(NODES[2]);
    follows(&cluster, &client).await;
    assert_eq!(cluster.state.log.lock().routings, [false, true, false, true]);
}
