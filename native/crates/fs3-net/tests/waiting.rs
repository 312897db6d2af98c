//! Threads that block for answers and receive them themselves.

mod common;

use common::*;
use fs3_core::{Code, Region, Result, crc_blocks, pack_crcs};
use fs3_net::{Connection, Reply, Sink, Waiter};
use fs3_proto::v1::Method;
use std::convert::Infallible;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;
use tokio::runtime::Handle;

/// How often a waiting thread looks around.
const CHECK_EVERY: Duration = Duration::from_millis(20);

/// A thread that makes calls by blocking for each.
struct Caller {
    waiter: Waiter,
    runtime: Handle,
    connection: Connection,
}

impl Caller {
    fn call(&mut self, method: Method, number: u64, timeout: Duration) -> Result<Reply> {
        self.transfer(method, number, 0, timeout)
    }

    /// Have as many bytes echoed.
    fn echo(&mut self, bytes: usize) {
        let reply = self.transfer(Method::StorageWrite, bytes as u64, bytes, LONG).unwrap();
        assert_eq!(reply.lengths, [bytes]);
        assert_eq!(reply.crcs, pack_crcs(&crc_blocks(0, &pattern(bytes))));
        assert!(reply.windows[0][..] == pattern(bytes));
    }

    fn transfer(&mut self, method: Method, number: u64, bytes: usize, timeout: Duration) -> Result<Reply> {
        let payload = if bytes > 0 { vec![Region::from_vec(pattern(bytes))] } else { Vec::new() };
        let sink = if bytes > 0 { one_window(bytes) } else { Sink::none() };
        let call = pin!(self.connection.call(method, body(number), payload, sink, timeout));
        let done = self.waiter.block_on(&self.runtime, call, CHECK_EVERY, || Ok::<_, Infallible>(()));
        done.unwrap_or_else(|never| match never {})
    }
}

/// Begin a thread that calls on the connection.
fn thread<T: Send + 'static>(
    connection: &Connection,
    work: impl FnOnce(&mut Caller) -> T + Send + 'static,
) -> JoinHandle<T> {
    let (runtime, connection) = (Handle::current(), connection.clone());
    std::thread::spawn(move || work(&mut Caller { waiter: Waiter::new().unwrap(), runtime, connection }))
}

/// Its result, without blocking the runtime.
async fn joined<T: Send + 'static>(thread: JoinHandle<T>) -> T {
    tokio::task::spawn_blocking(move || thread.join().unwrap()).await.unwrap()
}

/// Sizes that fit the read buffer, that do not, and none in particular.
fn size(seed: usize) -> usize {
    1 + (seed * 7919) % [100, 5_000, 300_000][seed % 3]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn threads_and_tasks_that_share_a_connection_all_get_their_answers() {
    let service = Scripted::new(64 << 20);
    let (server, addr) = serve(&service).await;
    let connection = connect(&addr).await;
    let threads: Vec<_> = (0..6usize)
        .map(|t| thread(&connection, move |caller| (0..200).for_each(|i| caller.echo(size(t * 1000 + i)))))
        .collect();
    let tasks: Vec<_> = (0..2usize)
        .map(|t| {
            let connection = connection.clone();
            tokio::spawn(async move {
                for bytes in (0..200).map(|i| size(t * 500 + i)) {
                    let sink = one_window(bytes);
                    let call = connection.call(Method::StorageRead, body(bytes as u64), Vec::new(), sink, LONG);
                    assert!(call.await.unwrap().windows[0][..] == pattern(bytes));
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
    for thread in threads {
        joined(thread).await;
    }
    assert_eq!(connection.in_flight(), 0);
    server.shutdown(LONG).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thread_that_gives_up_leaves_reading_to_those_that_still_wait() {
    let service = Scripted::new(64 << 20);
    let (server, addr) = serve(&service).await;
    let (connection, control) = (connect(&addr).await, connect(&addr).await);
    for _ in 0..20 {
        // The first becomes the reader, as nobody else has a call under way.
        let first = thread(&connection, |caller| {
            (0..10).for_each(|_| caller.echo(10));
            caller.call(Method::StorageSync, 1, Duration::from_millis(30)).err().map(|e| (e.code, e.maybe_applied))
        });
        service.waiting.acquire().await.unwrap().forget();
        let second =
            thread(&connection, |caller| (caller.call(Method::StorageSync, 2, LONG).unwrap(), caller.echo(100_000)).1);
        service.waiting.acquire().await.unwrap().forget();
        assert_eq!(joined(first).await, Some((Code::Timeout, true)));
        let opened = control.call(Method::StorageRemove, body(2), Vec::new(), Sink::none(), LONG).await;
        assert!(opened.is_ok());
        joined(second).await;
    }
    server.shutdown(LONG).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_that_ends_fails_the_calls_of_all_threads() {
    let service = Scripted::new(64 << 20);
    for _ in 0..20 {
        let (server, addr) = serve(&service).await;
        let connection = connect(&addr).await;
        let threads: Vec<_> = (0..4)
            .map(|_| {
                thread(&connection, |caller| {
                    (0..5).for_each(|_| caller.echo(10));
                    caller.call(Method::StorageSync, 1, LONG).err().map(|e| (e.code, e.maybe_applied))
                })
            })
            .collect();
        service.waiting.acquire_many(4).await.unwrap().forget();
        drop(server);
        for thread in threads {
            assert_eq!(joined(thread).await, Some((Code::Unavailable, true)));
        }
        service.gate.add_permits(4);
        assert!(connection.is_closed() && connection.in_flight() == 0);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_that_ends_while_nobody_reads_it_is_noticed() {
    let service = Scripted::new(64 << 20);
    let (server, addr) = serve(&service).await;
    let connection = connect(&addr).await;
    joined(thread(&connection, |caller| (0..20).for_each(|_| caller.echo(10)))).await;
    drop(server);
    eventually("the end is noticed", || connection.is_closed()).await;
    let late = joined(thread(&connection, |caller| caller.call(Method::Ping, 0, LONG).err().map(|e| e.code))).await;
    assert_eq!(late, Some(Code::Unavailable));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_task_is_answered_on_a_connection_that_threads_have_just_used() {
    let service = Scripted::new(64 << 20);
    let (server, addr) = serve(&service).await;
    let connection = connect(&addr).await;
    for bytes in 1..100 {
        joined(thread(&connection, |caller| (0..3).for_each(|_| caller.echo(10)))).await;
        let sink = one_window(bytes);
        let call = connection.call(Method::StorageRead, body(bytes as u64), Vec::new(), sink, LONG);
        assert!(call.await.unwrap().windows[0][..] == pattern(bytes));
    }
    server.shutdown(LONG).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wait_ends_when_its_check_fails_and_the_call_is_given_up() {
    let service = Scripted::new(64 << 20);
    let (server, addr) = serve(&service).await;
    let connection = connect(&addr).await;
    let interrupted = thread(&connection, |caller| {
        (0..5).for_each(|_| caller.echo(10));
        let call = pin!(caller.connection.call(Method::StorageSync, body(1), Vec::new(), Sink::none(), LONG));
        caller.waiter.block_on(&caller.runtime, call, CHECK_EVERY, || Err("a signal")).err()
    });
    assert_eq!(joined(interrupted).await, Some("a signal"));
    assert_eq!(connection.in_flight(), 0);
    service.gate.add_permits(1);
    joined(thread(&connection, |caller| caller.echo(1000))).await;
    server.shutdown(LONG).await;
}

#[test]
fn a_thread_is_woken_by_what_is_no_connection() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let mut waiter = Waiter::new().unwrap();
    for number in 0..200 {
        let (sender, receiver) = tokio::sync::oneshot::channel();
        runtime.spawn(async move { sender.send(number).unwrap() });
        let done = waiter.block_on(runtime.handle(), pin!(receiver), LONG, || Err::<(), _>("woken too late"));
        assert_eq!(done, Ok(Ok(number)));
    }
}

impl Caller {
    /// Begin a call and attend to it; what becomes of it.
    fn attend(&mut self, method: Method, number: u64) -> mpsc::Receiver<Result<Reply>> {
        let ((tell, told), connection) = (mpsc::channel(), self.connection.clone());
        let ended = Arc::new(AtomicBool::new(false));
        let end = ended.clone();
        let operation = async move {
            let called = connection.call(method, body(number), Vec::new(), Sink::none(), LONG).await;
            tell.send(called).unwrap();
            end.store(true, Ordering::Relaxed);
        };
        let runtime = fs3_rt::Handle::from(self.runtime.clone());
        self.waiter.attend(&self.runtime, || runtime.begin(operation), || ended.load(Ordering::Relaxed));
        told
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_that_threads_attend_to_are_all_answered_beside_others() {
    let service = Scripted::new(64 << 20);
    let (server, addr) = serve(&service).await;
    let connection = connect(&addr).await;
    let attending = (0..3).map(|_| {
        thread(&connection, |caller| {
            for number in 0..300 {
                assert!(caller.attend(Method::StorageRemove, number).recv_timeout(LONG).unwrap().is_ok());
            }
        })
    });
    let blocking = thread(&connection, |caller| (0..100).for_each(|i| caller.echo(size(i))));
    for thread in attending.collect::<Vec<_>>() {
        joined(thread).await;
    }
    joined(blocking).await;
    assert_eq!(connection.in_flight(), 0);
    server.shutdown(LONG).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_call_that_takes_long_goes_on_without_the_thread_that_attended_to_it() {
    let service = Scripted::new(64 << 20);
    let (server, addr) = serve(&service).await;
    let connection = connect(&addr).await;
    let told = joined(thread(&connection, |caller| {
        (0..5).for_each(|_| caller.echo(10));
        caller.attend(Method::StorageSync, 1)
    }))
    .await;
    service.waiting.acquire().await.unwrap().forget();
    assert!(told.try_recv().is_err());
    service.gate.add_permits(1);
    assert!(tokio::task::spawn_blocking(move || told.recv_timeout(LONG)).await.unwrap().unwrap().is_ok());
    server.shutdown(LONG).await;
}
