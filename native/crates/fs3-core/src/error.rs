use std::borrow::Cow;

/// Result with the error every layer shares.
pub type Result<T, E = Error> = std::result::Result<T, E>;

macro_rules! codes {
    ($($(#[$doc:meta])* $name:ident = $value:literal / $errno:ident / $retry:literal,)*) => {
        /// What went wrong; the numbers are those of `fs3.v1.Code` on the wire.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(u16)]
        pub enum Code { $($(#[$doc])* $name = $value,)* }

        impl Code {
            /// The code with this wire number; unknown numbers are `Internal`.
            pub fn from_wire(value: u16) -> Self {
                match value { $($value => Self::$name,)* _ => Self::Internal }
            }
            /// The errno a POSIX caller sees.
            pub fn errno(self) -> i32 {
                match self { $(Self::$name => libc::$errno,)* }
            }
            /// Whether the same request may succeed later or elsewhere.
            pub fn retryable(self) -> bool {
                match self { $(Self::$name => $retry,)* }
            }
        }
    };
}

codes! {
    /// A bug.
    Internal = 1 / EIO / false,
    /// A malformed argument.
    InvalidArgument = 2 / EINVAL / false,
    /// No such file or directory.
    NotFound = 3 / ENOENT / false,
    /// It is there already.
    Exists = 4 / EEXIST / false,
    /// A component is not a directory.
    NotDirectory = 5 / ENOTDIR / false,
    /// It is a directory.
    IsDirectory = 6 / EISDIR / false,
    /// The directory has entries.
    NotEmpty = 7 / ENOTEMPTY / false,
    /// Permission bits forbid it.
    Access = 8 / EACCES / false,
    /// Only the owner or root may do it.
    NotPermitted = 9 / EPERM / false,
    /// A name over 255 bytes or a path over its limit.
    NameTooLong = 10 / ENAMETOOLONG / false,
    /// The disks are full.
    NoSpace = 11 / ENOSPC / false,
    /// Beyond the largest file.
    FileTooLarge = 12 / EFBIG / false,
    /// Too many symlinks.
    SymlinkLoop = 13 / ELOOP / false,
    /// Mounted read-only.
    ReadOnly = 15 / EROFS / false,
    /// The inode or session is gone.
    StaleHandle = 16 / ESTALE / false,
    /// nlink at its limit.
    TooManyLinks = 17 / EMLINK / false,
    /// Not offered.
    NotSupported = 18 / EOPNOTSUPP / false,
    /// No such extended attribute.
    NoData = 19 / ENODATA / false,
    /// The name of an extended attribute is empty or too long.
    OutOfRange = 20 / ERANGE / false,
    /// The value of an extended attribute is too long.
    TooLarge = 21 / E2BIG / false,
    /// A directory above has no room left by its quota.
    QuotaExceeded = 22 / EDQUOT / false,
    /// It would come under another quota.
    CrossQuota = 23 / EXDEV / false,
    /// Bad or missing token.
    Unauthenticated = 30 / EACCES / false,
    /// The other side belongs to another cluster.
    WrongCluster = 31 / EINVAL / false,
    /// Version or framing not understood.
    Protocol = 32 / EPROTO / false,
    /// The deadline passed.
    Timeout = 33 / ETIMEDOUT / true,
    /// Nobody there, or not now.
    Unavailable = 34 / EIO / true,
    /// A limit is reached.
    Busy = 35 / EBUSY / true,
    /// A frame limit.
    MessageTooBig = 36 / EMSGSIZE / false,
    /// Unknown method.
    Unimplemented = 37 / ENOSYS / false,
    /// Ask the primary.
    NotPrimary = 38 / EIO / true,
    /// Chain version differs.
    StaleChain = 50 / EIO / true,
    /// The target does not serve now.
    NotServing = 51 / EIO / true,
    /// No committed version: a hole.
    ChunkNotFound = 52 / ENOENT / false,
    /// Stored bytes are rotten.
    ChecksumMismatch = 53 / EIO / false,
    /// A successor lacks an earlier update.
    VersionGap = 54 / EIO / false,
    /// The disk reported an error.
    DiskError = 55 / EIO / false,
    /// Damaged on the way.
    PayloadChecksum = 56 / EIO / true,
    /// A newer request of the same channel was applied.
    Superseded = 57 / EIO / false,
}

/// An operating error: code, one line for a person, hints. Cheap to clone.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    /// What went wrong.
    pub code: Code,
    /// One line: what is wrong and, where there is something to do, what.
    pub message: Cow<'static, str>,
    /// The effect may or may not have happened.
    pub maybe_applied: bool,
    /// Newest routing version the reporter knows; 0 if none.
    pub routing_version: u64,
}

impl Error {
    /// An error without hints.
    pub fn new(code: Code, message: impl Into<Cow<'static, str>>) -> Self {
        Self { code, message: message.into(), maybe_applied: false, routing_version: 0 }
    }

    /// The same error, marked as possibly applied.
    pub fn maybe_applied(mut self) -> Self {
        self.maybe_applied = true;
        self
    }

    /// The same error with the reporter's routing version.
    pub fn with_routing(mut self, version: u64) -> Self {
        self.routing_version = version;
        self
    }

    /// The errno a POSIX caller sees.
    pub fn errno(&self) -> i32 {
        self.code.errno()
    }

    /// Whether the same request may succeed later or elsewhere.
    pub fn retryable(&self) -> bool {
        self.code.retryable()
    }
}
