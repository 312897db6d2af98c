//! Users and groups of this machine and those of the cluster, where they differ.

use fs3_client::{Code, Error, Result};

/// Shown, and acting, for ids that the other side does not have.
pub const NOBODY: u32 = 65_534;

/// The `count` ids from `local` on, on this machine, are those from `cluster` on in the cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IdRange {
    /// First id on this machine.
    pub local: u32,
    /// First id in the cluster.
    pub cluster: u32,
    /// How many.
    pub count: u32,
}

/// How ids of one kind correspond.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum IdMap {
    /// They are the same.
    #[default]
    Same,
    /// Everything is shown as this id's, and done as this id.
    All(u32),
    /// Those in the ranges correspond. The first range that has an id counts.
    Ranges(Vec<IdRange>),
}

/// Users and groups of one mount.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct IdMaps {
    /// User ids.
    pub users: IdMap,
    /// Group ids.
    pub groups: IdMap,
}

/// `id` counted from `from`, if it is one of `count`, as the same one counted from `to`.
fn moved(id: u32, from: u32, to: u32, count: u32) -> Option<u32> {
    let distance = id.checked_sub(from).filter(|distance| *distance < count)?;
    to.checked_add(distance)
}

impl IdMap {
    fn to_cluster(&self, local: u32) -> Option<u32> {
        match self {
            Self::Same => Some(local),
            Self::All(id) => Some(*id),
            Self::Ranges(ranges) => ranges.iter().find_map(|r| moved(local, r.local, r.cluster, r.count)),
        }
    }

    /// What this machine is shown for an id of the cluster.
    pub fn shown(&self, cluster: u32) -> u32 {
        match self {
            Self::Same => cluster,
            Self::All(id) => *id,
            Self::Ranges(ranges) => {
                ranges.iter().find_map(|r| moved(cluster, r.cluster, r.local, r.count)).unwrap_or(NOBODY)
            }
        }
    }

    /// Who somebody of this machine is in the cluster.
    pub fn acting(&self, local: u32) -> u32 {
        self.to_cluster(local).unwrap_or(NOBODY)
    }

    /// The groups of the cluster that somebody of these groups of this machine is in.
    pub fn acting_groups(&self, local: &[u32]) -> Vec<u32> {
        match self {
            Self::All(_) => Vec::new(),
            _ => local.iter().filter_map(|id| self.to_cluster(*id)).collect(),
        }
    }

    /// The owner that `chown` to `local` shall write; `None`: nothing, everything is this id's already.
    /// Errors: InvalidArgument for an id that the cluster does not have.
    pub fn written(&self, local: u32) -> Result<Option<u32>> {
        let unknown = || Error::new(Code::InvalidArgument, "the mount maps no id of the cluster to this one");
        match self {
            Self::All(id) if local == *id => Ok(None),
            Self::All(_) => Err(unknown()),
            _ => self.to_cluster(local).map(Some).ok_or_else(unknown),
        }
    }
}

impl IdMaps {
    /// Whether ids mean the same on both sides.
    pub fn same(&self) -> bool {
        *self == Self::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ranges() -> IdMap {
        let range = |local, cluster, count| IdRange { local, cluster, count };
        IdMap::Ranges(vec![range(1000, 0, 1), range(2000, 500, 10)])
    }

    #[test]
    fn ids_in_ranges_correspond_and_others_are_nobody() {
        let map = ranges();
        for (local, cluster) in [(1000, 0), (2000, 500), (2009, 509)] {
            assert_eq!((map.acting(local), map.shown(cluster)), (cluster, local));
            assert_eq!(map.written(local).unwrap(), Some(cluster));
        }
        for other in [0, 1, 999, 1001, 1999, 2010, u32::MAX] {
            assert_eq!(map.acting(other), NOBODY);
            assert_eq!(map.written(other).unwrap_err().code, Code::InvalidArgument);
        }
        assert_eq!((map.shown(1), map.shown(510), map.shown(u32::MAX)), (NOBODY, NOBODY, NOBODY));
        assert_eq!(map.acting_groups(&[5, 2003, 1000]), vec![503, 0]);
    }

    #[test]
    fn one_id_for_all_is_shown_acts_and_is_never_written() {
        let map = IdMap::All(33);
        assert_eq!((map.shown(0), map.acting(0)), (33, 33));
        assert_eq!(map.written(33).unwrap(), None);
        assert_eq!(map.written(34).unwrap_err().code, Code::InvalidArgument);
        assert!(map.acting_groups(&[0, 33]).is_empty());
    }

    #[test]
    fn a_range_that_goes_over_the_largest_id_maps_what_there_is() {
        let map = IdMap::Ranges(vec![IdRange { local: 0, cluster: u32::MAX - 1, count: 10 }]);
        assert_eq!((map.acting(1), map.acting(2)), (u32::MAX, NOBODY));
        assert!(IdMaps::default().same() && !IdMaps { users: map, ..IdMaps::default() }.same());
    }
}
