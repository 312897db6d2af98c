//! Several requests at the same time.
//!
//! A task costs more than a small request: it is woken on some thread, and its answer wakes another one. So requests of a
//! batch run within the caller's task, as long as they have few bytes to checksum; more are spread over tasks.

use std::future::poll_fn;
use std::pin::Pin;
use std::task::Poll;

use fs3_rt::JoinSet;

use crate::trace;

/// Bytes that one task checksums.
const TASK_BYTES: usize = 1 << 20;
/// Bytes up to which the caller's task does it all.
const ALONE_BYTES_MAX: usize = 2 << 20;
/// Requests of one task, each of which looks at all of them when one is answered.
const TASK_REQUESTS_MAX: usize = 32;

/// Run requests, each with its bytes; results in no order.
pub(super) async fn run<F, T>(requests: Vec<(usize, F)>) -> Vec<T>
where
    F: Future<Output = Vec<T>> + Send + 'static,
    T: Send + 'static,
{
    let bytes: usize = requests.iter().map(|(bytes, _)| bytes).sum();
    if requests.len() <= TASK_REQUESTS_MAX && bytes <= ALONE_BYTES_MAX {
        return all(requests.into_iter().map(|(_, request)| request).collect()).await;
    }
    let mut tasks = JoinSet::new();
    let (mut group, mut sum) = (Vec::new(), 0);
    for (bytes, request) in requests {
        if !group.is_empty() && (sum + bytes > TASK_BYTES || group.len() == TASK_REQUESTS_MAX) {
            tasks.spawn(trace::inherit(all(std::mem::take(&mut group))));
            sum = 0;
        }
        group.push(request);
        sum += bytes;
    }
    tasks.spawn(trace::inherit(all(group)));
    tasks.join_all().await.into_iter().flatten().collect()
}

/// Run all within this task.
async fn all<F, T>(requests: Vec<F>) -> Vec<T>
where
    F: Future<Output = Vec<T>>,
{
    let mut running: Vec<Pin<Box<F>>> = requests.into_iter().map(Box::pin).collect();
    let mut done = Vec::with_capacity(running.len());
    poll_fn(|cx| {
        running.retain_mut(|request| match request.as_mut().poll(cx) {
            Poll::Ready(results) => {
                done.extend(results);
                false
            }
            Poll::Pending => true,
        });
        if running.is_empty() { Poll::Ready(()) } else { Poll::Pending }
    })
    .await;
    done
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn every_request_is_run_whatever_they_have_to_carry() {
        for bytes in [0, 1000, 400_000, 3 << 20] {
            let request = |number: u32| async move {
                fs3_rt::yield_now().await;
                vec![number]
            };
            let mut results = run((0..100).map(|number| (bytes, request(number))).collect()).await;
            results.sort_unstable();
            assert_eq!(results, (0..100).collect::<Vec<_>>());
        }
        assert_eq!(run(Vec::<(usize, std::future::Ready<Vec<u32>>)>::new()).await, Vec::<u32>::new());
    }
}
