//! Reading a socket straight to where the bytes stay.

use std::{io, mem::MaybeUninit, os::fd::AsFd};

use bytes::BytesMut;

/// Reads once into the spare capacity of `buf`, `most` bytes at most; 0 is the end of file.
#[expect(unsafe_code, reason = "clearing 64 KiB before each read would cost more than the read")]
pub(crate) fn read(socket: impl AsFd, buf: &mut BytesMut, most: usize) -> io::Result<usize> {
    let spare = buf.spare_capacity_mut();
    let most = most.min(spare.len());
    let len = read_to(socket, &mut spare[..most])?;
    // SAFETY: read() has filled that many bytes of the spare capacity.
    unsafe { buf.set_len(buf.len() + len) };
    Ok(len)
}

/// Reads once; so many bytes at the beginning of `room` are set then.
pub(crate) fn read_to(socket: impl AsFd, room: &mut [MaybeUninit<u8>]) -> io::Result<usize> {
    Ok(rustix::io::read(socket, room).map(|(read, _)| read.len())?)
}
