//! Passing a descriptor over a Unix socket, and knowing who is at its other end.
//!
//! Calls are single system calls on any socket, blocking or not: an asynchronous caller tries again when it gets `WouldBlock`.

use std::{
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg, sockopt::socket_peercred,
};

/// The process at the other end of a Unix socket, as the kernel knew it when it connected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Its process.
    pub pid: u32,
    /// Its user.
    pub uid: u32,
    /// Its group.
    pub gid: u32,
}

/// Who connected.
///
/// # Errors
/// What the system says, for a socket that is not a connected Unix socket.
pub fn peer(socket: impl AsFd) -> io::Result<Peer> {
    let credentials = socket_peercred(socket)?;
    Ok(Peer {
        pid: credentials.pid.as_raw_nonzero().get().unsigned_abs(),
        uid: credentials.uid.as_raw(),
        gid: credentials.gid.as_raw(),
    })
}

/// Who connected, if it is this process's own user.
///
/// # Errors
/// `PermissionDenied`, with both users named, if it is another; else as [`peer`].
pub fn peer_of_same_user(socket: impl AsFd) -> io::Result<Peer> {
    let peer = peer(socket)?;
    let own = rustix::process::geteuid().as_raw();
    if peer.uid == own {
        return Ok(peer);
    }
    let message = format!(
        "process {} runs as user {}, this one as {own}: memory is shared within one user only",
        peer.pid, peer.uid
    );
    Err(io::Error::new(io::ErrorKind::PermissionDenied, message))
}

/// Sends `message` (at least a byte) with a descriptor; answers how many of its bytes went. The descriptor goes with the
/// first.
///
/// # Errors
/// `InvalidInput` for an empty message; what the system says.
pub fn send_descriptor(socket: impl AsFd, message: &[u8], descriptor: BorrowedFd<'_>) -> io::Result<usize> {
    if message.is_empty() {
        let problem = "a descriptor needs a message of at least a byte to go with";
        return Err(io::Error::new(io::ErrorKind::InvalidInput, problem));
    }
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let descriptors = [descriptor];
    if !control.push(SendAncillaryMessage::ScmRights(&descriptors)) {
        return Err(io::Error::other("the control buffer is too small for a descriptor"));
    }
    Ok(sendmsg(
        socket,
        &[IoSlice::new(message)],
        &mut control,
        SendFlags::NOSIGNAL,
    )?)
}

/// Receives up to `message.len()` bytes, and the descriptor that came with them, if one did. No bytes: the other end is
/// closed.
///
/// # Errors
/// `InvalidData` when more descriptors came than one, all of which are closed, or this process may open no more; what the system
/// says.
pub fn receive_descriptor(socket: impl AsFd, message: &mut [u8]) -> io::Result<(usize, Option<OwnedFd>)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = recvmsg(
        socket,
        &mut [IoSliceMut::new(message)],
        &mut control,
        RecvFlags::CMSG_CLOEXEC,
    )?;
    let mut descriptors = Vec::new();
    for control in control.drain() {
        if let RecvAncillaryMessage::ScmRights(more) = control {
            descriptors.extend(more);
        }
    }
    if received.flags.contains(ReturnFlags::CTRUNC) || descriptors.len() > 1 {
        let problem = "more descriptors came than one, or this process may open no more";
        return Err(io::Error::new(io::ErrorKind::InvalidData, problem));
    }
    Ok((received.bytes, descriptors.pop()))
}

#[cfg(test)]
mod tests {
    use std::{
        fs::File,
        io::{Read, Seek, Write},
        os::unix::net::UnixStream,
    };

    use super::*;

    #[test]
    fn a_descriptor_and_its_message_arrive() {
        let (here, there) = UnixStream::pair().unwrap();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"content").unwrap();
        assert_eq!(send_descriptor(&here, b"hello", file.as_fd()).unwrap(), 5);
        let mut message = [0; 16];
        let (bytes, descriptor) = receive_descriptor(&there, &mut message).unwrap();
        assert_eq!(&message[..bytes], b"hello");
        let mut same = File::from(descriptor.unwrap());
        assert!(
            rustix::io::fcntl_getfd(&same)
                .unwrap()
                .contains(rustix::io::FdFlags::CLOEXEC)
        );
        let mut text = String::new();
        same.rewind().unwrap();
        same.read_to_string(&mut text).unwrap();
        assert_eq!(text, "content");
        (&here).write_all(b"plain").unwrap();
        let (bytes, descriptor) = receive_descriptor(&there, &mut message).unwrap();
        assert!(bytes == 5 && descriptor.is_none());
        drop(here);
        assert_eq!(receive_descriptor(&there, &mut message).unwrap().0, 0);
    }

    #[test]
    fn more_descriptors_than_one_are_refused_and_closed() {
        let (here, there) = UnixStream::pair().unwrap();
        let file = tempfile::tempfile().unwrap();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(3))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let descriptors = [file.as_fd(), file.as_fd(), file.as_fd()];
        assert!(control.push(SendAncillaryMessage::ScmRights(&descriptors)));
        sendmsg(&here, &[IoSlice::new(b"x")], &mut control, SendFlags::empty()).unwrap();
        let refused = receive_descriptor(&there, &mut [0; 4]).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::InvalidData);
        assert_eq!(
            send_descriptor(&here, b"", file.as_fd()).unwrap_err().kind(),
            io::ErrorKind::InvalidInput
        );
    }

    #[test]
    fn the_kernel_says_who_is_there() {
        let (here, _there) = UnixStream::pair().unwrap();
        let peer = peer_of_same_user(&here).unwrap();
        assert_eq!(peer.pid, std::process::id());
        assert_eq!(peer.uid, rustix::process::geteuid().as_raw());
        assert!(self::peer(tempfile::tempfile().unwrap()).is_err());
    }
}
