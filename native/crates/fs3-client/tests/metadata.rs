//! Metadata calls, sessions and lengths against fakes.
mod common;

use std::sync::Arc;
use std::time::Duration;

use common::{FakeCluster, eventually};
use fs3_client::{Attr, Caller, Client, ClientConfig, CreateOptions, OpenFile, OpenOptions, Region, Setattr, at_path};
use fs3_core::Code;
use fs3_proto::v1::Method;

async fn create(client: &Client, name: &str) -> Arc<OpenFile> {
    let options = CreateOptions { mode: 0o644, write: true, read: true, exclusive: true, ..Default::default() };
    client.create(&Caller::default(), at_path(name.as_bytes(), false), options).await.unwrap()
}

async fn open(client: &Client, name: &str, write: bool) -> Arc<OpenFile> {
    let options = OpenOptions { read: true, write, truncate: false };
    client.open(&Caller::default(), at_path(name.as_bytes(), false), options).await.unwrap()
}

async fn stat(client: &Client, name: &str) -> fs3_client::Result<Attr> {
    client.stat(&Caller::default(), at_path(name.as_bytes(), false)).await
}

fn seen(cluster: &FakeCluster, method: Method) -> Vec<(u64, usize)> {
    let log = cluster.state.log.lock();
    log.metas.iter().filter(|(m, ..)| *m == method).map(|&(_, op, meta)| (op, meta)).collect()
}

#[tokio::test]
async fn a_create_whose_answer_was_lost_is_repeated_with_the_same_id_elsewhere() {
    let cluster = FakeCluster::start().await;
    let client = cluster.client().await;
    cluster.faults(|faults| {
        faults.lose_answers.insert(Method::MetaCreate as i32, 1);
    });
    assert!(create(&client, "f").await.created());
    let tries = seen(&cluster, Method::MetaCreate);
    assert_eq!(tries.len(), 2);
    assert_eq!(tries[0].0, tries[1].0, "the same operation");
    assert_ne!(tries[0].1, tries[1].1, "another meta service");
}

#[tokio::test]
async fn final_errors_are_not_retried() {
    let cluster = FakeCluster::start().await;
    let client = cluster.client().await;
    assert_eq!(stat(&client, "none").await.unwrap_err().code, Code::NotFound);
    assert_eq!(seen(&cluster, Method::MetaStat).len(), 1);
}

#[tokio::test]
async fn metadata_goes_on_when_a_meta_dies_or_hangs() {
    let mut cluster = FakeCluster::start().await;
    let client = Client::connect(ClientConfig { meta_attempt_timeout: Duration::from_millis(200), ..cluster.config() })
        .await
        .unwrap();
    create(&client, "f").await;
    let using = seen(&cluster, Method::MetaCreate)[0].1 as u32;
    cluster.faults(|faults| {
        faults.hung.insert(using);
    });
    stat(&client, "f").await.unwrap();
    cluster.faults(|faults| faults.hung.clear());
    cluster.kill(3 - using);
    stat(&client, "f").await.unwrap();
}

#[tokio::test]
async fn one_known_meta_is_enough_to_find_the_others() {
    let mut cluster = FakeCluster::start().await;
    let config = ClientConfig { metas: vec![cluster.metas[0].clone()], ..cluster.config() };
    let client = Client::connect(config).await.unwrap();
    create(&client, "f").await;
    cluster.kill(1);
    stat(&client, "f").await.unwrap();
}

#[tokio::test]
async fn a_wrong_token_or_cluster_is_refused_at_once() {
    let cluster = FakeCluster::start().await;
    let config = ClientConfig { token: "wrong".into(), ..cluster.config() };
    assert_eq!(Client::connect(config).await.err().unwrap().code, Code::Unauthenticated);
    let config = ClientConfig { cluster_id: Some("other".into()), ..cluster.config() };
    assert_eq!(Client::connect(config).await.err().unwrap().code, Code::WrongCluster);
    assert_eq!(Client::connect(ClientConfig::default()).await.err().unwrap().code, Code::InvalidArgument);
}

#[tokio::test]
async fn nobody_there_is_one_clear_error_within_the_timeout() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let metas = vec![listener.local_addr().unwrap().to_string()];
    drop(listener);
    let config = ClientConfig { metas, op_timeout: Duration::from_millis(300), ..Default::default() };
    let error = Client::connect(config).await.err().unwrap();
    assert_eq!(error.code, Code::Unavailable);
    assert!(error.message.contains("no meta service answered"), "{error}");
}

#[tokio::test]
async fn acknowledged_writes_show_in_every_view_of_the_client_and_elsewhere_after_close() {
    let cluster = FakeCluster::start().await;
    let (client, other) = (cluster.client().await, cluster.client().await);
    let writer = create(&client, "f").await;
    let reader = open(&client, "f", false).await;
    writer.write(0, Region::from_vec(b"hello".to_vec())).await.unwrap();
    assert_eq!((reader.length(), stat(&client, "f").await.unwrap().length), (5, 5));
    assert!(stat(&client, "f").await.unwrap().mtime_ns > 0);
    assert_eq!(stat(&other, "f").await.unwrap().length, 0);
    writer.close().await.unwrap();
    assert_eq!(open(&other, "f", false).await.length(), 5);
    assert_eq!(writer.write(0, Region::from_vec(b"x".to_vec())).await.unwrap_err().code, Code::StaleHandle);
}

#[tokio::test]
async fn a_truncate_is_not_undone_by_the_length_report_of_earlier_writes() {
    let cluster = FakeCluster::start().await;
    let client = cluster.client().await;
    let file = create(&client, "f").await;
    file.write(0, Region::from_vec(vec![7; 10_000])).await.unwrap();
    client.truncate(&Caller::default(), at_path(b"f", true), 100).await.unwrap();
    assert_eq!(file.length(), 100);
    assert_eq!(file.close().await.unwrap().length, 100);
    assert_eq!(stat(&cluster.client().await, "f").await.unwrap().length, 100);
}

#[tokio::test]
async fn an_unlinked_file_lives_until_its_last_close_here() {
    let cluster = FakeCluster::start().await;
    let client = cluster.client().await;
    create(&client, "f").await.close().await.unwrap();
    let (first, second) = (open(&client, "f", false).await, open(&client, "f", false).await);
    assert_eq!(client.unlink(&Caller::default(), at_path(b"f", false), None).await.unwrap().nlink, 0);
    cluster.state.log.lock().closes.clear();
    first.close().await.unwrap();
    assert!(cluster.state.log.lock().closes.is_empty());
    drop(second);
    eventually("the hold is released", || cluster.state.log.lock().closes.len() == 1).await;
}

#[tokio::test]
async fn unlinking_a_file_that_is_not_open_holds_nothing() {
    let cluster = FakeCluster::start().await;
    let client = cluster.client().await;
    let open = create(&client, "open").await;
    create(&client, "f").await.close().await.unwrap();
    cluster.state.log.lock().closes.clear();
    let inode = stat(&client, "f").await.unwrap().inode;
    client.unlink(&Caller::default(), at_path(b"f", false), Some(inode)).await.unwrap();
    assert!(cluster.state.log.lock().closes.is_empty());
    open.close().await.unwrap();
}

#[tokio::test]
async fn keepalives_are_sent_while_a_session_is_open() {
    let cluster = FakeCluster::start().await;
    let client = cluster.client().await;
    assert!(seen(&cluster, Method::MetaKeepalive).is_empty());
    let file = create(&client, "f").await;
    eventually("keepalives", || seen(&cluster, Method::MetaKeepalive).len() >= 2).await;
    file.close().await.unwrap();
}

/// What the services were told is open, and what is not any more.
fn holds(cluster: &FakeCluster) -> Vec<(Vec<u64>, Vec<u64>)> {
    cluster.state.log.lock().holds.iter().map(|hold| (hold.begin.clone(), hold.end.clone())).collect()
}

#[tokio::test]
async fn what_is_open_for_reading_for_a_while_is_held_until_it_is_closed() {
    let cluster = FakeCluster::start().await;
    let attempt = Duration::from_millis(200);
    let client = Client::connect(ClientConfig { meta_attempt_timeout: attempt, ..cluster.config() }).await.unwrap();
    for name in ["short", "long", "last", "written"] {
        create(&client, name).await.close().await.unwrap();
    }
    cluster.faults(|faults| {
        faults.lose_answers.insert(Method::MetaHold as i32, 1);
    });
    let written = open(&client, "written", true).await;
    let (long, last) = (open(&client, "long", false).await, open(&client, "last", false).await);
    open(&client, "short", false).await.close().await.unwrap();
    let both = vec![long.inode(), last.inode()];
    eventually("the holds", || holds(&cluster) == [(both.clone(), vec![])]).await;
    written.close().await.unwrap();
    let keepalives = seen(&cluster, Method::MetaKeepalive).len();
    eventually("keepalives", || seen(&cluster, Method::MetaKeepalive).len() >= keepalives + 2).await;
    let inode = long.inode();
    drop(long);
    eventually("the end of a hold", || holds(&cluster).last() == Some(&(vec![], vec![inode]))).await;
    client.close().await;
    assert_eq!(holds(&cluster).last(), Some(&(vec![], vec![last.inode()])));
    assert_eq!(holds(&cluster).len(), 3, "one call for each, and nothing of the others");
}

#[tokio::test]
async fn a_dropped_file_is_closed_and_reported() {
    let cluster = FakeCluster::start().await;
    let client = cluster.client().await;
    let file = create(&client, "f").await;
    file.write(0, Region::from_vec(b"hello".to_vec())).await.unwrap();
    drop(file);
    eventually("the close", || cluster.state.log.lock().closes.len() == 1).await;
    assert_eq!(stat(&cluster.client().await, "f").await.unwrap().length, 5);
}

#[tokio::test]
async fn a_closed_client_fails_at_once_and_leaves_no_task() {
    let cluster = FakeCluster::start().await;
    let before = tokio::runtime::Handle::current().metrics().num_alive_tasks();
    let client = cluster.client().await;
    client.close().await;
    assert_eq!(stat(&client, "f").await.unwrap_err().code, Code::Unavailable);
    drop(client);
    let metrics = tokio::runtime::Handle::current().metrics();
    eventually("all tasks end", || metrics.num_alive_tasks() <= before).await;
}

#[tokio::test]
async fn setting_the_time_wins_over_the_report_of_earlier_writes() {
    let cluster = FakeCluster::start().await;
    let client = cluster.client().await;
    let file = create(&client, "f").await;
    file.write(0, Region::from_vec(b"hello".to_vec())).await.unwrap();
    let change = Setattr { mtime_ns: Some(5), ..Default::default() };
    let attr = client.setattr(&Caller::default(), at_path(b"f", false), change).await.unwrap();
    assert_eq!(attr.mtime_ns, 5);
    file.close().await.unwrap();
    assert_eq!(cluster.state.log.lock().reports[0].mtime_ns, 5);
}
