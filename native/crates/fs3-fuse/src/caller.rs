//! Who is asking: user, group and, only where they matter, the supplementary groups.

use std::future::Future;

use fs3_client::{Caller, Code, Result};

use crate::ids::IdMaps;

/// Groups taken over at most; the kernel's own limit is the same.
const GROUPS_MAX: usize = 65_536;

/// The process behind a request. Its ids are those of this machine.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Who {
    pub uid: u32,
    pub gid: u32,
    pid: u32,
    /// `None`: they are the same in the cluster.
    ids: Option<&'static IdMaps>,
}

impl Who {
    pub fn of(request: &fuser::Request, ids: Option<&'static IdMaps>) -> Self {
        Self { uid: request.uid(), gid: request.gid(), pid: request.pid(), ids }
    }

    /// Whether it is the superuser in the cluster.
    pub fn is_root(&self) -> bool {
        self.caller().uid == 0
    }

    pub fn new(uid: u32, gid: u32, pid: u32, ids: Option<&'static IdMaps>) -> Self {
        Self { uid, gid, pid, ids }
    }

    /// The thread.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// The caller without its supplementary groups.
    pub fn caller(&self) -> Caller {
        let (uid, gid) = match self.ids {
            None => (self.uid, self.gid),
            Some(ids) => (ids.users.acting(self.uid), ids.groups.acting(self.gid)),
        };
        Caller { uid, gid, groups: Vec::new() }
    }

    /// The caller with its supplementary groups, read from `/proc` now.
    pub fn caller_with_groups(&self) -> Caller {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid)).unwrap_or_default();
        let groups = parse_groups(&status);
        let groups = self.ids.map_or(groups.clone(), |ids| ids.groups.acting_groups(&groups));
        Caller { groups, ..self.caller() }
    }

    /// The process, of which the request only tells the thread; `None` when it is gone or out of this daemon's sight.
    pub fn process(&self) -> Option<u32> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid)).ok()?;
        status.lines().find_map(|l| l.strip_prefix("Tgid:"))?.trim().parse().ok()
    }

    /// Run `op`, first without the supplementary groups; when it is refused, again with them. A refused
    /// operation has had no effect, so trying again is safe.
    pub async fn run<T, F: Future<Output = Result<T>>>(&self, op: impl Fn(Caller) -> F) -> Result<T> {
        match op(self.caller()).await {
            Err(e) if !self.is_root() && matches!(e.code, Code::Access | Code::NotPermitted) => {
                let caller = self.caller_with_groups();
                if caller.groups.is_empty() { Err(e) } else { op(caller).await }
            }
            other => other,
        }
    }
}

/// The superuser: for what the kernel has already permitted.
pub(crate) fn superuser() -> Caller {
    Caller::default()
}

fn parse_groups(status: &str) -> Vec<u32> {
    let line = status.lines().find_map(|l| l.strip_prefix("Groups:")).unwrap_or_default();
    line.split_whitespace().filter_map(|g| g.parse().ok()).take(GROUPS_MAX).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use fs3_client::Error;
    use std::sync::Mutex;

    #[test]
    fn groups_are_found_in_the_status_of_a_process() {
        assert_eq!(parse_groups("Name:\tx\nGroups:\t4 24 1000 \nSeccomp:\t0\n"), vec![4, 24, 1000]);
        assert!(parse_groups("Groups:\t\n").is_empty() && parse_groups("").is_empty());
    }

    #[tokio::test]
    async fn only_a_refused_caller_is_asked_for_its_groups() {
        let me = Who { uid: 1000, gid: 1000, pid: 0, ids: None };
        let seen = Mutex::new(0);
        let refused = me
            .run(|caller| {
                *seen.lock().unwrap() += 1;
                async move {
                    assert!(caller.groups.is_empty());
                    Err::<(), _>(Error::new(Code::Access, "no"))
                }
            })
            .await;
        // Process 0 has no groups to add, so the refusal stands.
        assert_eq!((refused.unwrap_err().code, *seen.lock().unwrap()), (Code::Access, 1));
    }
}
