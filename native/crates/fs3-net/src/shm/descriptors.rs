//! Descriptors between processes, through a Unix socket.

use std::fs::File;
use std::io;
use std::mem::size_of;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

/// Most descriptors in a message.
pub(super) const DESCRIPTORS_MAX: usize = 2;

/// Room for the control part of a message, aligned as it must be.
#[repr(C)]
union ControlRoom {
    bytes: [u8; 64],
    _align: libc::cmsghdr,
}

/// Send bytes (at least one) and descriptors as one message.
pub(super) fn send(stream: &UnixStream, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
    assert!(!bytes.is_empty() && descriptors.len() <= DESCRIPTORS_MAX);
    let mut part = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
    let mut room = ControlRoom { bytes: [0; 64] };
    // SAFETY: a message header of zeros is an empty one.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    (message.msg_iov, message.msg_iovlen) = (&raw mut part, 1);
    if !descriptors.is_empty() {
        let length = (descriptors.len() * size_of::<RawFd>()) as u32;
        message.msg_control = (&raw mut room).cast();
        // SAFETY: the room is large enough for the header and DESCRIPTORS_MAX descriptors, and aligned.
        unsafe {
            message.msg_controllen = libc::CMSG_SPACE(length) as _;
            let header = libc::CMSG_FIRSTHDR(&raw const message);
            (*header).cmsg_level = libc::SOL_SOCKET;
            (*header).cmsg_type = libc::SCM_RIGHTS;
            (*header).cmsg_len = libc::CMSG_LEN(length) as _;
            for (i, descriptor) in descriptors.iter().enumerate() {
                libc::CMSG_DATA(header).cast::<RawFd>().add(i).write_unaligned(descriptor.as_raw_fd());
            }
        }
    }
    // SAFETY: everything the header points to lives until the call returns.
    let sent = unsafe { libc::sendmsg(stream.as_raw_fd(), &raw const message, libc::MSG_NOSIGNAL) };
    match usize::try_from(sent) {
        Ok(n) if n == bytes.len() => Ok(()),
        Ok(_) => Err(io::ErrorKind::WriteZero.into()),
        Err(_) => Err(io::Error::last_os_error()),
    }
}

/// Receive a message: how many bytes came into `bytes`, and the descriptors with them.
pub(super) fn receive(stream: &UnixStream, bytes: &mut [u8]) -> io::Result<(usize, Vec<File>)> {
    let mut part = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
    let mut room = ControlRoom { bytes: [0; 64] };
    // SAFETY: a message header of zeros is an empty one.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    (message.msg_iov, message.msg_iovlen) = (&raw mut part, 1);
    message.msg_control = (&raw mut room).cast();
    message.msg_controllen = size_of::<ControlRoom>() as _;
    // SAFETY: everything the header points to lives until the call returns.
    let received = unsafe { libc::recvmsg(stream.as_raw_fd(), &raw mut message, libc::MSG_CMSG_CLOEXEC) };
    let received = usize::try_from(received).map_err(|_| io::Error::last_os_error())?;
    let mut files = Vec::new();
    // SAFETY: the kernel has filled the room with whole control messages, which the macros walk.
    unsafe {
        let mut header = libc::CMSG_FIRSTHDR(&raw const message);
        while !header.is_null() {
            if (*header).cmsg_level == libc::SOL_SOCKET && (*header).cmsg_type == libc::SCM_RIGHTS {
                let length = (*header).cmsg_len as usize - libc::CMSG_LEN(0) as usize;
                for i in 0..length / size_of::<RawFd>() {
                    let fd = libc::CMSG_DATA(header).cast::<RawFd>().add(i).read_unaligned();
                    files.push(File::from(OwnedFd::from_raw_fd(fd)));
                }
            }
            header = libc::CMSG_NXTHDR(&raw const message, header);
        }
    }
    Ok((received, files))
}

/// Whether the process at the other end has this user, or one of the two is root.
pub(super) fn peer_is_trusted(stream: &UnixStream) -> io::Result<bool> {
    let mut peer = libc::ucred { pid: 0, uid: u32::MAX, gid: u32::MAX };
    let mut length = size_of::<libc::ucred>() as libc::socklen_t;
    let out = (&raw mut peer).cast();
    // SAFETY: the out pointers are valid and the length is that of the structure.
    let done =
        unsafe { libc::getsockopt(stream.as_raw_fd(), libc::SOL_SOCKET, libc::SO_PEERCRED, out, &raw mut length) };
    if done < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: cannot fail.
    let own = unsafe { libc::geteuid() };
    Ok(peer.uid == own || peer.uid == 0 || own == 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::fd::AsFd;

    #[test]
    fn descriptors_arrive_with_their_bytes() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (mut reader, writer) = std::io::pipe().unwrap();
        send(&ours, b"nonce", &[writer.as_fd()]).unwrap();
        drop(writer);
        let mut bytes = [0; 16];
        let (n, mut files) = receive(&theirs, &mut bytes).unwrap();
        assert_eq!((&bytes[..n], files.len()), (&b"nonce"[..], 1));
        files[0].write_all(b"through").unwrap();
        files.clear();
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, "through");
        assert!(peer_is_trusted(&ours).unwrap());
    }

    #[test]
    fn a_message_without_descriptors_has_none() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        send(&ours, b"x", &[]).unwrap();
        let (n, files) = receive(&theirs, &mut [0; 4]).unwrap();
        assert_eq!((n, files.len()), (1, 0));
    }
}
