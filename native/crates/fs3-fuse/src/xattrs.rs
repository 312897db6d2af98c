//! Extended attributes.
//!
//! Programs ask for some on every file they list, and the kernel asks for one before it writes. The attributes of an
//! inode tell which there are, so that the service is not asked for those that are not.

use bytes::Bytes;
use fs3_client::{Code, Error, Result, SetxattrMode, XattrBit, at_inode};

use crate::caller::{Who, superuser};
use crate::core::Core;

const USER: &[u8] = b"user.";
const CAPABILITY: &[u8] = b"security.capability";
const ACCESS_ACL: &[u8] = b"system.posix_acl_access";
const DEFAULT_ACL: &[u8] = b"system.posix_acl_default";

fn is_acl(name: &[u8]) -> bool {
    name == ACCESS_ACL || name == DEFAULT_ACL
}

/// Errors: NotSupported for a name of a kind that is not kept.
fn check_kind(name: &[u8]) -> Result<()> {
    if is_acl(name) || [USER, b"trusted.", b"security."].iter().any(|prefix| name.starts_with(prefix)) {
        return Ok(());
    }
    Err(Error::new(
        Code::NotSupported,
        "there are extended attributes user.*, trusted.*, security.* and access control lists",
    ))
}

/// The bit that an inode with this attribute has.
fn bit_of(name: &[u8]) -> XattrBit {
    match name {
        CAPABILITY => XattrBit::Capability,
        ACCESS_ACL => XattrBit::AccessAcl,
        DEFAULT_ACL => XattrBit::DefaultAcl,
        _ => XattrBit::Any,
    }
}

impl Core {
    /// Access control lists name users and groups of the cluster; where these are others here, there are no lists here.
    fn check_name(&self, name: &[u8]) -> Result<()> {
        check_kind(name)?;
        if self.ids.is_some() && is_acl(name) {
            return Err(Error::new(Code::NotSupported, "no access control lists where ids are mapped"));
        }
        Ok(())
    }

    /// Whether an inode has what `bit` stands for, as far as the kernel's attributes of it tell.
    async fn has_xattr(&self, inode: u64, bit: XattrBit) -> Result<bool> {
        let mut known = self.known_xattrs(inode);
        if known.is_none() {
            self.getattr(inode).await?;
            known = self.known_xattrs(inode);
        }
        Ok(known.is_none_or(|bits| bits & bit as u32 != 0))
    }

    /// Errors: NoData, Access, NotSupported.
    pub async fn getxattr(&self, who: Who, inode: u64, name: &[u8]) -> Result<Bytes> {
        self.check_name(name)?;
        if !self.has_xattr(inode, bit_of(name)).await? {
            return Err(Error::new(Code::NoData, "there is no such extended attribute"));
        }
        if name.starts_with(USER) {
            return who.run(|c| async move { self.client.getxattr(&c, at_inode(inode), name).await }).await;
        }
        // The kernel has checked the caller's capabilities; where it asks for itself, in anybody's name, there are none.
        self.client.getxattr(&superuser(), at_inode(inode), name).await
    }

    /// The names that the caller may know of, a zero byte behind each.
    pub async fn listxattr(&self, who: Who, inode: u64) -> Result<Bytes> {
        if !self.has_xattr(inode, XattrBit::Any).await? {
            return Ok(Bytes::new());
        }
        let names = self.client.listxattr(&who.caller(), at_inode(inode)).await?;
        let names = names.iter().filter(|name| self.check_name(name).is_ok());
        Ok(names.flat_map(|name| name.iter().copied().chain([0])).collect())
    }

    /// Errors: Exists, NoData, Access, NotPermitted, NotSupported, NoSpace, TooLarge.
    pub async fn setxattr(&self, who: Who, inode: u64, name: &[u8], value: &[u8], flags: i32) -> Result<()> {
        self.check_name(name)?;
        let mode = SetxattrMode::from_flags(flags)?;
        if name == CAPABILITY {
            // What was written before must not take it away when it is published.
            self.settle(inode).await?;
        }
        let result = if name.starts_with(USER) {
            who.run(|c| async move { self.client.setxattr(&c, at_inode(inode), name, value, mode).await }).await
        } else if is_acl(name) {
            // Without its groups the service would take a set-group-id bit away from a member of the group.
            self.client.setxattr(&who.caller_with_groups(), at_inode(inode), name, value, mode).await
        } else {
            self.client.setxattr(&superuser(), at_inode(inode), name, value, mode).await
        };
        self.dir_attrs.forget(inode);
        self.tell(result?);
        Ok(())
    }

    /// Errors: NoData, Access, NotPermitted, NotSupported.
    pub async fn removexattr(&self, who: Who, inode: u64, name: &[u8]) -> Result<()> {
        self.check_name(name)?;
        let result = if name.starts_with(USER) || is_acl(name) {
            who.run(|c| async move { self.client.removexattr(&c, at_inode(inode), name).await }).await
        } else {
            // The kernel removes capabilities before a write, in the name of who writes.
            self.client.removexattr(&superuser(), at_inode(inode), name).await
        };
        self.dir_attrs.forget(inode);
        self.tell(result?);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_kept_kinds_are_asked_for() {
        for name in [&b"user.x"[..], b"trusted.x", b"security.selinux", ACCESS_ACL, DEFAULT_ACL] {
            assert!(check_kind(name).is_ok());
        }
        for name in [&b"system.nfs4_acl"[..], b"users.x", b"user", b""] {
            assert_eq!(check_kind(name).unwrap_err().code, Code::NotSupported);
        }
    }
}
